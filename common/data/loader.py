"""Batches for training and validation: workers, prefetch, and a position that is counted on hand-out."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from common.data.batching import SubBatches
from common.data.collate import Batch, Collator, FileNews
from common.data.dataset import Sample, SpeechDataset
from common.data.sampler import VALIDATION, PlannedSubBatch, UpdateSampler
from common.data.watch import BadFiles, Conversions, Work
from common.data.workers import read_batches, tidy_worker
from common.errors import DataError, UserError

log = logging.getLogger(__name__)
POSITION = ("epoch", "position", "updates_per_epoch")  # where a loader stands; the rest says of which plan
MOST_REPLACED = 100  # sub-batches one after another of which nothing can be used
CPU = torch.device("cpu")


class BatchMaker(Dataset):
    """Reads planned sub-batches and collates them: the part of the work that is done in the workers."""

    def __init__(
        self,
        dataset: SpeechDataset,
        sub_batches: SubBatches,
        collate: Collator,
        *,
        skip_bad: bool = False,
        fill: bool = False,
    ) -> None:
        """`sub_batches`: places in the dataset; `skip_bad`: leave out files that cannot be used.

        `fill`: rows are padded to the planned length of their sub-batches, not to the longest there is.
        """
        self._dataset, self.sub_batches, self._collate = dataset, sub_batches, collate
        self._skip_bad, self._fill = skip_bad, fill
        self._made = 0

    def __getitem__(self, planned: Sequence[PlannedSubBatch]) -> Batch | FileNews | UserError:
        """The joined batch, or only news where nothing is left of it.

        An error of the data is returned: torch would wrap a raised one in a traceback.
        """
        self._made += 1
        tidy_worker(self._made)
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        bad: list[str] = []
        try:
            parts = [(plan, *self._samples(plan, bad)) for plan in planned]
            parts = [part for part in parts if part[1]]
            if not parts:
                return FileNews(bad=tuple(bad))
            plans, samples, widths = zip(*parts, strict=True)
            batch = self._collate(plans, samples, width=max(widths) if self._fill else 0)
        except UserError as error:
            return error
        seconds, cpu_seconds = time.perf_counter() - begin, time.thread_time() - cpu_begin
        return replace(batch, news=FileNews(batch.news.converted, tuple(bad), seconds, cpu_seconds))

    def _samples(self, plan: PlannedSubBatch, bad: list[str]) -> tuple[list[Sample], int]:
        """The samples of a sub-batch, and its planned length.

        Where none can be used, in training those of the next one: an update needs its sub-batches.
        """
        for later in range(min(MOST_REPLACED, len(self.sub_batches))):
            number = (plan.sub_batch + later) % len(self.sub_batches)
            samples = self._usable(plan.epoch_pass, number, bad)
            if samples or plan.epoch_pass == VALIDATION:
                return samples, int(self.sub_batches.samples[number])
        raise DataError(f"{bad[-1]}; and so it is with all files of many sub-batches; see utils/check_data.py")

    def _usable(self, epoch_pass: int, sub_batch: int, bad: list[str]) -> list[Sample]:
        """The samples of a sub-batch that can be read; messages of the others go to `bad`."""
        longest = int(self.sub_batches.samples[sub_batch])
        samples = []
        for place in self.sub_batches.utterances(sub_batch).tolist():
            try:
                samples.append(self._dataset.sample(place, longest=longest, epoch_pass=epoch_pass))
            except DataError as error:
                if not self._skip_bad:
                    raise
                bad.append(str(error))
        return samples


class UpdateLoader(ABC):
    """Endless updates, handed out one by one: what lists and streams have in common."""

    def __init__(
        self,
        *,
        updates_per_epoch: int,
        update_freq: int,
        num_workers: int,
        pin_memory: bool,
        sample_rate: int,
        bad_files: BadFiles,
    ) -> None:
        """`updates_per_epoch` is the same in all epochs."""
        self.updates_per_epoch = updates_per_epoch
        self.epoch, self.position = 1, 0
        self._update_freq, self._num_workers, self._pin_memory = update_freq, num_workers, pin_memory
        self._updates: Iterator[list[Batch]] | None = None
        self._bad_files, self._conversions, self._work = bad_files, Conversions(sample_rate), Work(num_workers)

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last update of the epoch has been handed out."""
        return self.position >= self.updates_per_epoch

    @property
    def next_place(self) -> tuple[int, int]:
        """Epoch and position of the update that comes next."""
        return (self.epoch + 1, 0) if self.at_epoch_end else (self.epoch, self.position)

    def take_work(self) -> Work:
        """What it took to make the batches that were handed out since the last call."""
        work, self._work = self._work, Work(self._num_workers)
        return work

    def next_update(self, device: torch.device = CPU) -> list[Batch]:
        """This rank's micro-batches of the next update, on a device that is the same in all calls.

        An error of the data is raised here, when its update is due. On a GPU the following update is then being
        copied already.
        """
        start = time.perf_counter()
        if self.at_epoch_end:
            self._end_epoch()
            self.epoch, self.position = self.epoch + 1, 0
        starts = self._updates is None
        if self._updates is None:
            updates = self._read()
            self._updates = copied_ahead(updates, device) if device.type == "cuda" else updates
        batches = next(self._updates)
        for batch in batches:
            self._take(batch)
        # the start of the workers is no sign of what is to come
        self._work.add(batches, waited=0.0 if starts else time.perf_counter() - start)
        self.position += 1
        return batches

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and the plan that this refers to: all ranks call it together."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind a saved position, or begin the epoch again if the plan is another one now."""

    def read_again(self, epoch: int, position: int) -> list[Batch] | None:
        """This rank's micro-batches of an update that has been handed out; None where that cannot be: of a stream."""
        return None

    def close(self) -> None:
        """Stop the workers; the next update starts new ones."""
        self._updates = None

    @abstractmethod
    def _batches(self) -> Iterator[Batch]:
        """Micro-batches from the present position on, on the host, without end."""

    def _read(self) -> Iterator[list[Batch]]:
        batches = self._batches()
        while True:
            yield [next(batches) for _ in range(self._update_freq)]

    def _take(self, batch: Batch) -> None:
        """Take note of what a worker found. DataError when too many files are bad."""
        self._conversions.add(batch.news.converted)
        self._bad_files.add(batch.news.bad)

    def _end_epoch(self) -> None:
        self._conversions.tell()
        self._bad_files.begin_pass()


class TrainLoader(UpdateLoader):
    """The updates of a list, in an order that only (seed, epoch, position) decide."""

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
        sample_rate: int,
        bad_files: BadFiles,
    ) -> None:
        """world, concat and update_freq must be enough for the sampler's sub-batches per update, and not more."""
        super().__init__(
            updates_per_epoch=sampler.updates_per_epoch,
            update_freq=update_freq,
            num_workers=num_workers,
            pin_memory=pin_memory,
            sample_rate=sample_rate,
            bad_files=bad_files,
        )
        self._maker, self._sampler = maker, sampler
        self._rank, self._world = rank, world
        self.set_layout(concat=concat, update_freq=update_freq)

    def set_layout(self, *, concat: int, update_freq: int) -> None:
        """Share the same updates in another way from here on: so many joined, so many micro-batches."""
        self.close()
        self._layout = {"world": self._world, "concat": concat, "update_freq": update_freq}
        self._update_freq = update_freq
        self._sampler.micro_batches(1, 0, rank=self._rank, **self._layout)  # a wrong product is refused now

    def largest(self, number: int) -> list[list[PlannedSubBatch]]:
        """The `number` largest micro-batches of the epoch that comes next or goes on, of all ranks, largest first."""
        epoch = self.epoch + int(self.at_epoch_end)
        return self._sampler.largest(epoch, self._maker.sub_batches.rows, number=number, **self._layout)

    def read(self, planned: Sequence[PlannedSubBatch]) -> Batch:
        """A batch out of its turn, made in this process; DataError where it cannot be read."""
        batch = self._maker[planned]
        if isinstance(batch, UserError):
            raise batch
        if isinstance(batch, FileNews):
            raise DataError(batch.bad[-1])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position of what has been handed out, and the plan that they refer to."""
        place = self.epoch, self.position, self.updates_per_epoch
        return dict(zip(POSITION, place, strict=True)) | self._fingerprint()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind a saved position; from the start of its epoch if the plan is another one now."""
        self.close()
        self.epoch, self.position = state["epoch"], state["position"]
        now, was = self._fingerprint(), {key: state[key] for key in state if key not in POSITION}
        changed = [key for key in {**now, **was} if now.get(key) != was.get(key)]
        if changed and self.position >= state.get("updates_per_epoch", math.inf):
            self.position = self.updates_per_epoch  # that epoch is done
        elif changed and self.position:
            log.warning(
                "the data or its batches are not those of the checkpoint (now %s): epoch %d starts again",
                ", ".join(f"{key} {now.get(key)}, was {was.get(key)}" for key in changed),
                self.epoch,
            )
            self.position = 0

    def read_again(self, epoch: int, position: int) -> list[Batch]:
        """This rank's micro-batches of any update, made in this process."""
        keys = self._sampler.micro_batches(epoch, position, rank=self._rank, **self._layout)
        return list(read_batches(self._maker, keys, 0, False, self._bad_files))

    def _batches(self) -> Iterator[Batch]:
        keys = self._keys(self.epoch, self.position)
        return read_batches(self._maker, keys, self._num_workers, self._pin_memory, self._bad_files)

    def _fingerprint(self) -> dict[str, Any]:
        """What must agree for a position to mean the same."""
        plan = self._maker.sub_batches
        return {
            "utterances": len(plan.order),
            "sub_batches": len(plan),
            "sub_batches_per_update": self._sampler.sub_batches_per_update,
            "seed": self._sampler.seed,
            "plan": plan.checksum,
            **self._sampler.arrangement,
        }

    def _keys(self, epoch: int, position: int) -> Iterator[list[PlannedSubBatch]]:
        """Micro-batches from a position on, without end: workers do not stop between epochs."""
        while True:
            for update in range(position, self.updates_per_epoch):
                yield from self._sampler.micro_batches(epoch, update, rank=self._rank, **self._layout)
            epoch, position = epoch + 1, 0


class ValidLoader:
    """Every utterance once over all ranks, whole; ranks may have unequal numbers of batches, even none."""

    def __init__(
        self,
        maker: BatchMaker,
        planned: Sequence[PlannedSubBatch],
        *,
        num_workers: int,
        pin_memory: bool,
        bad_files: BadFiles,
    ) -> None:
        """`planned`: this rank's sub-batches."""
        self._maker, self._planned = maker, planned
        self._num_workers, self._pin_memory, self._bad_files = num_workers, pin_memory, bad_files

    def __len__(self) -> int:
        return len(self._planned)

    def __iter__(self) -> Iterator[Batch]:
        keys = [[plan] for plan in self._planned]
        if not keys:
            return
        self._bad_files.begin_pass()
        workers = min(self._num_workers, len(keys))
        for batch in read_batches(self._maker, keys, workers, self._pin_memory, self._bad_files):
            self._bad_files.add(batch.news.bad)
            yield batch


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
