"""Measuring: seconds of work on a device, the rate of its matrix products, peak memory, medians."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError

MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
_STATUS = Path("/proc/self/status")

Work = Callable[[], Any]


@dataclass(frozen=True)
class Stopwatch:
    """Times work on `device`; on a GPU by its own clock, and without waiting for it inside the work."""

    device: torch.device

    def time(self, work: Work, repeats: int, prepare: Work | None = None) -> float:
        """Mean seconds of one call of `work`; `prepare` comes before every call and is not counted."""
        clock = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        return clock(work, repeats, prepare or _nothing) / repeats

    @staticmethod
    def _on_cpu(work: Work, repeats: int, prepare: Work) -> float:
        total = 0.0
        for _ in range(repeats):
            prepare()
            start = time.perf_counter()
            work()
            total += time.perf_counter() - start
        return total

    def _on_gpu(self, work: Work, repeats: int, prepare: Work) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize(self.device)
        for start, end in pairs:
            prepare()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000


def _nothing() -> None:
    pass


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "quartiles": [low, high]}


class MatrixRate:
    """Operations per second of products of square matrices: what a step could reach at most."""

    def __init__(self, stopwatch: Stopwatch, dtype: torch.dtype) -> None:
        self._stopwatch = stopwatch
        self._rates: dict[int, list[float]] = {}
        device = stopwatch.device
        # Random, because on zeros a GPU needs less power and runs faster than it ever does in training.
        self._factors = {size: torch.randn(size, size, device=device).to(dtype) for size in MATRIX_SIZES[device.type]}

    def measure(self, repeats: int) -> None:
        """One more value for every size."""
        for size, factor in self._factors.items():
            seconds = self._stopwatch.time(lambda factor=factor: factor @ factor, repeats)  # type: ignore[misc]
            self._rates.setdefault(size, []).append(2 * size**3 / seconds)

    def result(self) -> dict[str, Any]:
        """`flop_per_s`: the best of the medians; `by_size`: the medians."""
        medians = {size: float(np.median(rates)) for size, rates in self._rates.items()}
        return {"flop_per_s": max(medians.values()), "by_size": {str(size): rate for size, rate in medians.items()}}


def peak_memory(work: Work, repeats: int, device: torch.device) -> dict[str, int]:
    """Bytes: `peak` over some calls of `work`, and `before` them.

    On a GPU what the allocator gave out; on the CPU the resident memory of the process since it began, which makes
    sense in a fresh process only. Raises ConfigError where the system does not tell.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = _highest_resident()
    for _ in range(repeats):
        work()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _highest_resident()
    return {"peak": peak, "before": before}


def _highest_resident() -> int:
    """Highest resident memory of this process, in bytes.

    Not getrusage's ru_maxrss: on Linux a new process inherits that from the one that started it.
    """
    if sys.platform != "linux":
        raise ConfigError("--device cpu: peak memory can be measured on Linux only; run the benchmark there")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
