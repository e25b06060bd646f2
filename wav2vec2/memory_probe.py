"""Try the largest batch before training: what it takes, what is there, and which layout would fit.

The task runs as it is, without DDP, so no process waits for one that has no memory left; then they agree. Nothing that
training knows of changes. The update itself needs no memory: moments, fp32 weights and their gradients are made with
the optimizer, and its kernel works in place.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from common import distributed, memory
from common.data.collate import Batch
from common.data.loader import TrainLoader
from common.errors import ConfigError, DataError, size
from common.sharding import Sharded
from wav2vec2.data_config import DataConfig
from wav2vec2.layout import scale_window, sub_batches_per_update, with_fewer_joined
from wav2vec2.run import Run
from wav2vec2.task import FinetuneTask

log = logging.getLogger(__name__)
CANDIDATES = 8  # batches of which the first that can be read is tried
HOLES = 1.25  # what a heap of the CPU grows to in some updates, by what lies free between tensors; measured: 1.24
FULL = 0.95  # of what is there may be taken by a layout whose need is only predicted


@dataclass(frozen=True)
class Largest:
    """The largest batch of the plan: its first sub-batches and all of them, which are tried; how many each has.

    samples: of its first so many sub-batches, joined and padded.
    """

    batches: list[Batch]
    samples: list[int]

    @property
    def joined(self) -> int:
        """Number of its sub-batches."""
        return len(self.samples)


@dataclass(frozen=True)
class Found:
    """What one process found, in bytes.

    available: what it could hold; need: of the largest batch, None where that is unknown because it failed;
    fits: whether it was done; peaks: with the first of its sub-batches alone, and with the first two, in a run that
    accumulates; what failed is missing.
    """

    available: int
    need: int | None = None
    fits: bool = False
    peaks: tuple[int, ...] = ()

    def predicted(self, largest: Largest, number: int) -> int | None:
        """What the first so many sub-batches take; None where nothing tells."""
        if number <= len(self.peaks):
            return self.peaks[number - 1]
        if len(self.peaks) < 2:
            return None
        one, two = self.peaks
        per_sample = max(two - one, 0) / (largest.samples[1] - largest.samples[0])
        return one + round(per_sample * (largest.samples[number - 1] - largest.samples[0]))


def probe(run: Run) -> None:
    """Try the largest batch, and with --auto_batch smaller ones until one fits; every process has to call it.

    Raises:
        ConfigError: it does not fit; the message says what would.
    """
    if not run.config.run.probe_memory or run.finished:
        return
    if not isinstance(run.train_loader, TrainLoader):
        log.info("memory: a stream does not tell its largest batch beforehand, so none is tried")
        return
    if isinstance(run.engine, Sharded):
        log.info("memory: with --parallel fsdp no process can try a batch without the others, so none is tried")
        return
    while largest := _read_largest(run.train_loader):
        found = distributed.gather_objects(_try(run, largest))
        if all(each.fits for each in found):
            log.info("memory: %s", _report(largest, found))
            return
        _join_fewer(run, largest, found)
    log.info("memory: the largest batches cannot be read, so none is tried")


# ---- Trying ----------------------------------------------------------------------------------------------------------


def _read_largest(loader: TrainLoader) -> Largest | None:
    """The largest batch that can be read; None on all processes where one has none."""
    found = None
    for planned in loader.largest(CANDIDATES):
        numbers = [number for number in (1, 2) if number < len(planned)]
        try:
            batches = [loader.read(planned[:number]) for number in (*numbers, len(planned))]
        except DataError:
            continue  # is told when its update is due
        rows = accumulate(part.rows for part in batches[-1].sub_batches)
        longest = accumulate((part.samples for part in batches[-1].sub_batches), max)
        found = Largest(batches, [number * samples for number, samples in zip(rows, longest, strict=True)])
        break
    return found if all(distributed.gather_objects(found is not None)) else None


def _try(run: Run, largest: Largest) -> Found:
    """What this process makes of the largest batch.

    A GPU says when it is full. On the CPU the first sub-batches come before, and all of them only if they should fit.
    """
    free = memory.available(run.device, distributed.local_processes())
    distributed.barrier()  # nobody begins before all have looked
    accumulates = run.config.data.update_freq > 1
    found = Found(free)
    with _everything_trains(run):
        if run.device.type == "cpu":
            found = _with_few(run, largest, found)
            if len(found.peaks) < len(largest.batches) - 1:
                return found
            predicted = found.predicted(largest, largest.joined)
            if predicted is not None:
                predicted -= 0 if accumulates else _gradient_bytes(run)
                if predicted > free:
                    return replace(found, need=predicted)
        need = _peak(run, largest, -1, free, accumulates=accumulates)
        if need is None and run.device.type != "cpu":
            found = _with_few(run, largest, found)
    on_gpu = run.device.type == "cuda"  # which would have said so
    return replace(found, need=need, fits=need is not None and (on_gpu or need <= free))


def _with_few(run: Run, largest: Largest, found: Found) -> Found:
    """The same with what the first sub-batches take, until one try fails."""
    for place in range(len(largest.batches) - 1):
        peak = _peak(run, largest, place, found.available, accumulates=True)
        if peak is None:
            break
        found = replace(found, peaks=(*found.peaks, peak))
    return found


def _peak(run: Run, largest: Largest, place: int, most: int, *, accumulates: bool) -> int | None:
    """What one of the batches takes as a micro-batch of training, in bytes; None where that is more than there is.

    Beside it lie the other micro-batches of its update (on a GPU those of the next one, too), where they accumulate
    the gradients, and on the CPU a checkpoint that is being written.
    """
    device, task = run.device, run.task
    batch = largest.batches[place]
    run.watchdog.at("trying the largest batch", ids=batch.ids)
    memory.start_peak(device)
    before = memory.peak(device)
    try:
        with memory.limited(device, most):
            beside = torch.zeros(_bytes_beside(run, largest), dtype=torch.uint8, device=device)
            batch = batch.to(device)
            if accumulates:
                for parameter in _trained(run):
                    parameter.grad = torch.zeros_like(parameter)
            count = torch.full((), task.count_units([batch]), dtype=torch.float64, device=device)
            run.optimizer.backward(task(batch, count)[0])
            run.optimizer.clip_grad_norm(run.config.optim.clip_norm)
            del beside
            more = memory.peak(device) - before
            return before + (more if device.type == "cuda" else round(HOLES * more))
    except (RuntimeError, MemoryError) as error:
        if not memory.is_allocation_failure(error):
            raise
        return None
    finally:
        run.optimizer.zero_grad()


@contextmanager
def _everything_trains(run: Run) -> Iterator[None]:
    """No LayerDrop and nothing frozen, which takes most; and draws that training does not see."""
    task, layerdrop = run.task, run.task.layerdrop
    frozen_until = task.freeze_updates if isinstance(task, FinetuneTask) else 0
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        try:
            task.layerdrop = 0.0
            run.set_step(max(run.progress.step, frozen_until))
            yield
        finally:
            task.layerdrop = layerdrop
            run.set_step(run.progress.step)


def _bytes_beside(run: Run, largest: Largest) -> int:
    on_gpu = run.device.type == "cuda"
    batches = (2 if on_gpu else 1) * run.config.data.update_freq - 1
    saves = run.config.run.save and distributed.is_main() and not on_gpu
    return batches * largest.batches[-1].audio_BS.nbytes + (run.checkpoint_bytes() if saves else 0)


def _trained(run: Run) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.task.parameters() if parameter.requires_grad]


def _gradient_bytes(run: Run) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in _trained(run))


# ---- What follows ----------------------------------------------------------------------------------------------------


def _report(largest: Largest, found: Sequence[Found]) -> str:
    """The largest batch, its peak and what is left, of the process that has least left."""
    shares = [((each.need or 0) / each.available, each) for each in found]
    share, each = max(shares, key=lambda pair: pair[0])
    return (
        f"the largest batch ({largest.joined} sub-batches, {largest.samples[-1] / 1e6:.1f} M samples) takes "
        f"{size(each.need or 0)} at its peak, {size(each.available)} are there ({100 * max(1 - share, 0):.0f} % free)"
    )


def _join_fewer(run: Run, largest: Largest, found: Sequence[Found]) -> None:
    """With --auto_batch let the run join fewer sub-batches; else raise the ConfigError that says how many."""
    data = run.config.data
    available, needs = min(each.available for each in found), [each.need for each in found if each.need is not None]
    layout = f"--num_concat_batches {data.num_concat_batches} --update_freq {data.update_freq}"
    too_large = f"more than the {size(available)} that are there"
    if needs and max(needs) > available:
        too_large = f"{size(max(needs))} and {size(available)} are there"
    smaller, need = _fitting(data, largest, found)
    if smaller is None:
        rows = "--bucketing_batch_size" if data.bucketing_batch_size else f"--max_tokens {data.max_tokens}"
        unused = {"--bf16": run.config.precision.o2, "--checkpoint_activations": run.config.run.checkpoint_activations}
        remedies = [name for name, used in unused.items() if not used] or ["a device with more memory"]
        raise ConfigError(
            f"{rows}: not even one sub-batch fits, which needs {too_large}; try {' and '.join(remedies)} before "
            f"{rows.split()[0]}, which is part of the recipe"
        )
    if not run.config.run.auto_batch:
        passes = "" if data.world_batches else f" UPDATE_FREQ={smaller.update_freq}"
        raise ConfigError(
            f"{layout}: the largest batch needs {too_large}; NUM_CONCAT_BATCHES={smaller.num_concat_batches}{passes} "
            f"would fit ({size(need)}): set {'them' if passes else 'it'}, or add --auto_batch"
        )
    log.warning(
        "--auto_batch: the largest batch of %s needs %s; the run goes on with --num_concat_batches %d "
        "--update_freq %d, the same %d sub-batches per update",
        layout,
        too_large,
        smaller.num_concat_batches,
        smaller.update_freq,
        sub_batches_per_update(data, distributed.world_size()),
    )
    apply_layout(run, smaller)


def _fitting(data: DataConfig, largest: Largest, found: Sequence[Found]) -> tuple[DataConfig | None, int]:
    """The layout with most sub-batches joined that fits on all processes, and what it needs; None: there is none."""
    for smaller in with_fewer_joined(data, distributed.world_size()):
        number = smaller.num_concat_batches
        needs = [each.predicted(largest, number) for each in found]
        fitting = [
            need
            for need, each in zip(needs, found, strict=True)
            if need is not None and (number <= len(each.peaks) or need <= FULL * each.available)  # tried, or foretold
        ]
        if len(fitting) == len(found):
            return smaller, max(fitting)
    return None, 0


def apply_layout(run: Run, data: DataConfig) -> None:
    """Let a run that has not begun share its updates as `data` says."""
    if not isinstance(run.train_loader, TrainLoader):
        raise TypeError("a stream has its layout from the start")
    run.config = replace(run.config, data=data)
    run.train_loader.set_layout(concat=data.num_concat_batches, update_freq=data.update_freq)
    if run.optimizer.scaler:
        run.optimizer.scaler.window = scale_window(run.config, distributed.world_size())
