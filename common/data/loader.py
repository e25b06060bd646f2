"""Batches for training and validation: workers, prefetch, and a position that is counted on hand-out."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.data.batching import SubBatches, plan_sub_batches
from common.data.collate import Batch, Collator
from common.data.dataset import SpeechDataset
from common.data.manifest import Manifest
from common.data.masking import SpanMasking
from common.data.sampler import PlannedSubBatch, UpdateSampler, plan_validation
from common.errors import ConfigError, DataError, UserError
from common.rng import numpy_rng

log = logging.getLogger(__name__)
PREFETCH_PER_WORKER = 2
CPU = torch.device("cpu")


class BatchMaker(Dataset):
    """Reads planned sub-batches and collates them: the part of the work that is done in the workers."""

    def __init__(self, dataset: SpeechDataset, sub_batches: SubBatches, collate: Collator) -> None:
        """`sub_batches`: positions in the dataset's manifest."""
        self._dataset, self.sub_batches, self._collate = dataset, sub_batches, collate

    def __getitem__(self, planned: Sequence[PlannedSubBatch]) -> Batch | UserError:
        """The joined batch. An error of the data is returned: torch would wrap a raised one in a traceback."""
        try:
            return self._collate(planned, [self._samples(plan) for plan in planned])
        except UserError as error:
            return error

    def _samples(self, plan: PlannedSubBatch) -> list[Any]:
        longest = int(self.sub_batches.samples[plan.sub_batch])
        return [
            self._dataset.sample(int(index), longest=longest, epoch_pass=plan.epoch_pass)
            for index in self.sub_batches.utterances(plan.sub_batch)
        ]


class TrainLoader:
    """Endless updates, in an order that only (seed, epoch, position) decide."""

    def __init__(
        self,
        maker: BatchMaker,
        sampler: UpdateSampler,
        *,
        rank: int,
        world: int,
        concat: int,
        update_freq: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        """The product of world, concat and update_freq must be the sampler's sub-batches per update."""
        self._maker, self._sampler = maker, sampler
        self._layout = {"rank": rank, "world": world, "concat": concat, "update_freq": update_freq}
        sampler.micro_batches(1, 0, **self._layout)  # a wrong product is refused now
        self._update_freq, self._num_workers, self._pin_memory = update_freq, num_workers, pin_memory
        self.epoch, self.position = 1, 0
        self._updates: Iterator[list[Batch]] | None = None
        self._wait_seconds = 0.0

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; the same in all."""
        return self._sampler.updates_per_epoch

    @property
    def left_over_share(self) -> float:
        """Share of the sub-batches that sits out in an epoch."""
        return self._sampler.left_over_share

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last update of the epoch has been handed out."""
        return self.position >= self.updates_per_epoch

    def take_wait_seconds(self) -> float:
        """Seconds spent waiting for data since the last call."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def next_update(self, device: torch.device = CPU) -> list[Batch]:
        """This rank's micro-batches of the next update, on a device that is the same in all calls.

        An error of the data is raised here, when its update is due. On a GPU the following update is then being
        copied already.
        """
        start = time.perf_counter()
        if self.at_epoch_end:
            self.epoch, self.position = self.epoch + 1, 0
        if self._updates is None:
            updates = self._read(self.epoch, self.position)
            self._updates = copied_ahead(updates, device) if device.type == "cuda" else updates
        batches = next(self._updates)
        self.position += 1
        self._wait_seconds += time.perf_counter() - start
        return batches

    def state_dict(self) -> dict[str, int]:
        """Epoch and position of what has been handed out, and the plan that they refer to."""
        return {"epoch": self.epoch, "position": self.position, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind a saved position; from the start of its epoch if the plan is another one now."""
        self.close()
        self.epoch, self.position = state["epoch"], state["position"]
        changed = {key: value for key, value in self._fingerprint().items() if state.get(key) != value}
        if changed and self.position:
            log.warning(
                "the data or its batches are not those of the checkpoint (now %s): epoch %d starts again",
                ", ".join(f"{key} {value}, was {state.get(key)}" for key, value in changed.items()),
                self.epoch,
            )
            self.position = 0

    def close(self) -> None:
        """Stop the workers; the next update starts new ones."""
        self._updates = None

    def _read(self, epoch: int, position: int) -> Iterator[list[Batch]]:
        """Updates from a position on, on the host, without end."""
        keys = self._keys(epoch, position)
        batches = _batches(self._maker, keys, self._num_workers, self._pin_memory)
        while True:
            yield [next(batches) for _ in range(self._update_freq)]

    def _fingerprint(self) -> dict[str, int]:
        """Numbers that must agree for a position to mean the same."""
        plan = self._maker.sub_batches
        return {
            "utterances": len(plan.order),
            "sub_batches": len(plan),
            "sub_batches_per_update": self._sampler.sub_batches_per_update,
            "seed": self._sampler.seed,
        }

    def _keys(self, epoch: int, position: int) -> Iterator[list[PlannedSubBatch]]:
        """Micro-batches from a position on, without end: workers do not stop between epochs."""
        while True:
            for update in range(position, self.updates_per_epoch):
                yield from self._sampler.micro_batches(epoch, update, **self._layout)
            epoch, position = epoch + 1, 0


class ValidLoader:
    """Every utterance once over all ranks, whole; ranks may have unequal numbers of batches, even none."""

    def __init__(
        self, maker: BatchMaker, planned: Sequence[PlannedSubBatch], *, num_workers: int, pin_memory: bool
    ) -> None:
        """`planned`: this rank's sub-batches."""
        self._maker, self._planned = maker, planned
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self._planned)

    def places(self, batch: Batch) -> list[int]:
        """Positions in the manifest of the rows of a batch."""
        plan = self._maker.sub_batches
        return [int(index) for part in batch.sub_batches for index in plan.utterances(part.index)]

    def __iter__(self) -> Iterator[Batch]:
        if not self._planned:
            return iter(())
        keys = [[plan] for plan in self._planned]
        return _batches(self._maker, keys, min(self._num_workers, len(keys)), self._pin_memory)


def copied_ahead(updates: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same endless updates on a GPU, each copied there while the one before it computes; errors come in their turn.

    The copies are made on a stream of their own, and each stream waits for the other where it must, on the device:
    the computation for the copy of what is handed out, and a copy for all computation that was started before it.
    The second wait is what `Tensor.record_stream` would be for: the memory of a batch belongs to the stream that
    filled it, so once Python has let go of the batch the allocator gives it to the next copy, though the computation
    may still be reading. Two updates lie on the device at a time, and an update is handed out when the next one has
    come from the workers. Pinned memory of the host needs no care: torch keeps it until the copy is done.
    """
    side = torch.cuda.Stream(device)

    def copy_next() -> list[Batch] | UserError | RuntimeError:
        try:
            update = next(updates)
        except (UserError, RuntimeError) as error:  # torch tells of a dead worker by the latter
            return error
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            return [batch.to(device) for batch in update]

    copied = copy_next()
    while not isinstance(copied, (UserError, RuntimeError)):
        torch.cuda.current_stream(device).wait_stream(side)  # ahead of the next copy, which it shall not wait for
        handed_out, copied = copied, copy_next()
        yield handed_out
        del handed_out  # its memory serves the next copy
    raise copied


def train_loader(
    manifest: Manifest,
    *,
    sample_rate: int,
    normalize: bool,
    num_frames: Callable[[Any], Any],
    seed: int,
    max_tokens: int,
    crop: bool,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    max_sample_size: int | None = None,
    min_sample_size: int = 0,
    time_mask: SpanMasking | None = None,
    channel_mask: SpanMasking | None = None,
    channels: int = 0,
    encode: Callable[[str, str], list[int]] | None = None,
    rank: int = 0,
    world: int = 1,
    concat: int = 1,
    update_freq: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> TrainLoader:
    """Training batches of a manifest; `crop`: rows to the shortest of their sub-batch (else they are padded).

    Utterances below min_sample_size are dropped, those above max_sample_size cropped; both are reported.
    DataError where nothing is left, an utterance gives no frame, or a label is unknown.
    """
    kept = _drop_short(manifest, min_sample_size, sample_rate)
    if max_sample_size is not None and num_frames(max_sample_size) < 1:
        raise ConfigError(f"--max_sample_size {max_sample_size}: gives no frame; give more samples")
    if encode is not None and max_sample_size and kept.num_samples.max() > max_sample_size:
        raise ConfigError(
            f"--max_sample_size {max_sample_size}: would cut audio but not its labels; leave it out when there "
            "are labels, or remove long utterances from the list"
        )
    _check_frames(kept, num_frames)
    dataset = SpeechDataset(kept, sample_rate=sample_rate, normalize=normalize, seed=seed, encode=encode)
    dataset.check_labels(num_frames(kept.num_samples))
    plan = plan_sub_batches(
        kept.num_samples,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        multiple=required_batch_size_multiple,
        crop=crop,
        max_sample_size=max_sample_size,
        rng=numpy_rng(seed, "length_order"),
    )
    sampler = UpdateSampler(lengths=plan.samples, sub_batches_per_update=world * concat * update_freq, seed=seed)
    collate = Collator(num_frames, seed, time_mask, channel_mask, channels)
    _report(kept, plan, sampler)
    return TrainLoader(
        BatchMaker(dataset, plan, collate),
        sampler,
        rank=rank,
        world=world,
        concat=concat,
        update_freq=update_freq,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def valid_loader(
    manifest: Manifest,
    *,
    sample_rate: int,
    normalize: bool,
    num_frames: Callable[[Any], Any],
    seed: int,
    max_tokens: int | None,
    max_sentences: int | None = None,
    time_mask: SpanMasking | None = None,
    encode: Callable[[str, str], list[int]] | None = None,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> ValidLoader:
    """Validation batches of a manifest, padded; an utterance above max_tokens is a batch of its own."""
    _check_frames(manifest, num_frames)
    dataset = SpeechDataset(manifest, sample_rate=sample_rate, normalize=normalize, seed=seed, encode=encode)
    dataset.check_labels(num_frames(manifest.num_samples))
    plan = plan_sub_batches(
        manifest.num_samples,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        multiple=1,
        crop=False,
        max_sample_size=max_tokens,  # for the plan only: of two utterances above the budget each is alone
        rng=numpy_rng(seed, "length_order"),
    )
    plan = replace(plan, samples=np.maximum.reduceat(manifest.num_samples[plan.order], plan.offsets[:-1]))
    maker = BatchMaker(dataset, plan, Collator(num_frames, seed, time_mask))
    planned = plan_validation(len(plan), rank=rank, world=world)
    return ValidLoader(maker, planned, num_workers=num_workers, pin_memory=pin_memory)


def _batches(
    maker: BatchMaker, keys: Iterable[list[PlannedSubBatch]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Batches in the order of the keys; errors that were returned are raised."""
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # a private one: starting to iterate must not draw from the global one
        **_worker_options(num_workers),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _worker_options(num_workers: int) -> dict[str, Any]:
    """How workers start.

    Forked on Linux: the arrays of a manifest are shared instead of copied, and no worker imports torch again.
    It is safe although the parent may hold a GPU and threads, because workers only use NumPy, libsndfile and
    single-threaded tensors on the CPU. Elsewhere forking is unsafe or unknown, so the platform's default is used.
    """
    if num_workers == 0:
        return {}
    options: dict[str, Any] = {"prefetch_factor": PREFETCH_PER_WORKER, "worker_init_fn": _start_worker}
    if sys.platform == "linux":
        options["multiprocessing_context"] = "fork"
    return options


def _start_worker(_: int) -> None:
    """Leave Ctrl-C to the main process, which then ends the workers; torch itself has them end on SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _drop_short(manifest: Manifest, min_sample_size: int, sample_rate: int) -> Manifest:
    """The utterances of at least min_sample_size; what is dropped is logged."""
    kept = manifest.select(manifest.num_samples >= min_sample_size)
    dropped = len(manifest) - len(kept)
    if not len(kept):
        raise DataError(
            f"{manifest.where(0)}: all {dropped} utterances of {manifest.name} are shorter than "
            f"--min_sample_size {min_sample_size}; give a smaller one"
        )
    hours = kept.hours(sample_rate)
    log.info("%s: %d utterances, %.2f hours", manifest.name, len(kept), hours)
    if dropped:
        log.info(
            "%s: %d utterances, %.2f hours, are shorter than %d samples and were dropped",
            manifest.name,
            dropped,
            manifest.hours(sample_rate) - hours,
            min_sample_size,
        )
    return kept


def _check_frames(manifest: Manifest, num_frames: Callable[[Any], Any]) -> None:
    """Refuse utterances shorter than the receptive field of the model."""
    short = np.flatnonzero(num_frames(manifest.num_samples) < 1)
    if len(short):
        utterance = manifest[int(short[0])]
        raise DataError(
            f"{utterance.where}: {utterance.source} has {utterance.num_samples} samples, too short for one frame "
            f"({len(short)} such utterances); remove them from the list or, for training, set --min_sample_size"
        )


def _report(manifest: Manifest, plan: SubBatches, sampler: UpdateSampler) -> None:
    """Log the plan: sub-batches, updates, and what of the data an epoch does not use."""
    used = np.minimum(manifest.num_samples[plan.order], np.repeat(plan.samples, plan.rows))
    log.info(
        "%s: %d sub-batches, %d updates of %d per epoch; %.1f %% of the samples are cut off by cropping, "
        "%.1f %% of the sub-batches sit out in each epoch",
        manifest.name,
        len(plan),
        sampler.updates_per_epoch,
        sampler.sub_batches_per_update,
        100 * (1 - used.sum() / manifest.num_samples.sum()),
        100 * sampler.left_over_share,
    )
