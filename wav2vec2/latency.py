"""How long inference takes: latencies of batches, and the speed of whole passes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.data.collate import Batch
from wav2vec2.logging import LATENCY_PERCENTILES, LATENCY_STAGES

log = logging.getLogger(__name__)

STATISTICS = ("avg", *map(str, LATENCY_PERCENTILES))


class Stopwatch:
    """Seconds of every batch until it is on the device (`data`) and from there to its log-probabilities (`model`).

    It waits for the device at both ends of the model, once per batch: otherwise CUDA would still be computing when
    the clock is read. Reading the best paths right after would wait as well. `seconds` are those of whole passes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = 0.0
        self.data: list[float] = []
        self.model: list[float] = []
        self.seconds = 0.0

    def start(self) -> None:
        """Begin a pass, together with the other processes."""
        distributed.barrier()
        self._begin = time.perf_counter()

    def stop(self) -> None:
        """End a pass."""
        self.seconds += time.perf_counter() - self._begin

    def fetch(self, speech: Iterable[tuple[Batch, list[int]]]) -> Iterator[tuple[Batch, list[int]]]:
        """The batches, on the device; their time is the wait for the workers and the copy."""
        source = iter(speech)
        while True:
            begin = time.perf_counter()
            item = next(source, None)
            if item is None:
                return
            batch = item[0].to(self._device)
            self.data.append(self._since(begin))
            yield batch, item[1]

    def run(self, function: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """What the function makes of the batch."""
        begin = time.perf_counter()
        result = function(batch)
        self.model.append(self._since(begin))
        return result

    def _since(self, begin: float) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin


def timing(watch: Stopwatch, *, warmup_steps: int, hours: float) -> dict[str, float]:
    """Speed and latencies (ms per batch) over all processes, each of which must call it.

    `warmup_steps`: batches at the start of every process that count for the speed only; `hours`: audio of all
    timed passes and processes. Without a batch to measure there are no latencies.
    """
    parts = distributed.gather_objects((watch.data[warmup_steps:], watch.model[warmup_steps:], watch.seconds))
    values = {"speech_rate": hours * 3600 / max(seconds for _, _, seconds in parts)}
    data, model = (1000 * np.concatenate([part[stage] for part in parts]) for stage in (0, 1))
    if not len(data):
        log.warning("--warmup_steps %d: leaves no batch whose latency counts", warmup_steps)
        return values
    for stage, of_stage in zip(LATENCY_STAGES, (data, model, data + model), strict=True):
        numbers = of_stage.mean(), *np.percentile(of_stage, LATENCY_PERCENTILES)
        values |= {f"latency_{stage}_{name}": float(n) for name, n in zip(STATISTICS, numbers, strict=True)}
    return values


def latency_table(values: Mapping[str, float]) -> list[str]:
    """The latencies among the values as lines of a table, headed by the mean length of an utterance.

    `values` are those of timing(), `hours` of audio and the number of `utterances`. No lines without latencies.
    """
    if not any(name.startswith("latency_") for name in values):
        return []
    head = f"{'ms per batch':12}" + "".join(f"{name if name == 'avg' else name + ' %':>10}" for name in STATISTICS)
    head += f"  (utterances of {3600 * values['hours'] / values['utterances']:.2f} s on average)"
    rows = [
        f"{stage:12}" + "".join(f"{values[f'latency_{stage}_{name}']:10.2f}" for name in STATISTICS) + f"  {what}"
        for stage, what in LATENCY_STAGES.items()
    ]
    return [head, *rows]
