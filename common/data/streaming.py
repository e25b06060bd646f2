"""Training on shards that are read one after another, without an index.

Stages: the clips of one worker, shuffled (shard_reading.py) -> pool, cut into sub-batches of like length -> batches ->
updates. Until a batch is made a clip is its bytes and what its header says, so going on behind a saved position
reads but decodes nothing. Every random draw belongs to (seed, pass, rank, worker): a position is, for every worker, a
pass and the number of its micro-batches that were handed out. In a pass every clip comes exactly once over all
ranks and workers.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from common import distributed
from common.data.batching import plan_sub_batches
from common.data.collate import Batch, Collator, FileNews
from common.data.dataset import Waveforms
from common.data.loader import UpdateLoader
from common.data.manifest import Manifest
from common.data.masking import SpanMasking
from common.data.sampler import PlannedSubBatch
from common.data.segment import RandomSegment
from common.data.selection import LengthLimits, check_crop
from common.data.shard_reading import ClipReader, Part, StreamedClip, Tally, shuffled, webdataset
from common.data.shards import shards_of_rank
from common.data.watch import BadFiles
from common.data.workers import read_batches, tidy_worker
from common.errors import ConfigError, DataError, UserError
from common.rng import key, numpy_rng

log = logging.getLogger(__name__)

POOL = 32  # sub-batches that a worker plans together: the more, the closer the lengths within each
FEW = 1000  # clips after which a share of bad ones says something
POOL_OF_JOINED = 4  # micro-batches that are planned together at least


# ---- Clips -> batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamedBatch(Batch):
    """A batch and where its worker stands behind it: so many micro-batches of this pass; clips left out since."""

    epoch_pass: int = 0
    number: int = 0
    left_out: int = 0


PlannedClips = tuple[int, int, list[StreamedClip]]  # of a sub-batch: its number, samples per row, and its clips


@dataclass(frozen=True)
class Budget:
    """How clips become sub-batches, and these micro-batches (see batching.plan_sub_batches)."""

    max_tokens: int | None
    max_sentences: int | None
    multiple: int
    crop: bool
    concat: int

    def is_full(self, clips: int, samples: int) -> bool:
        """Whether a pool of so much is planned."""
        number = max(POOL, POOL_OF_JOINED * self.concat)
        by_rows = self.max_sentences is not None and clips >= number * self.max_sentences
        return by_rows or (self.max_tokens is not None and samples >= number * self.max_tokens)

    def cut(
        self, pool: Sequence[StreamedClip], numbers: Iterator[int], rng: np.random.Generator, *, keep: bool
    ) -> tuple[list[list[PlannedClips]], list[StreamedClip]]:
        """Micro-batches of sub-batches of like length, in random order, and the clips that are left for the next pool.

        keep: leave clips that do not fill a micro-batch; `numbers`: for the sub-batches.
        """
        plan = plan_sub_batches(
            np.array([clip.planned for clip in pool]),
            max_tokens=self.max_tokens,
            max_sentences=self.max_sentences,
            multiple=self.multiple,
            crop=self.crop,
            max_sample_size=None,
            rng=rng,
        )
        parts = [[pool[place] for place in plan.utterances(number).tolist()] for number in range(len(plan))]
        if keep and (odd := len(parts) % self.concat):
            left = [clip for part in parts[-odd:] for clip in part]
            parts = parts[:-odd]
        else:
            left = []
        planned = [(next(numbers), int(plan.samples[number]), part) for number, part in enumerate(parts)]
        joined = [planned[first : first + self.concat] for first in range(0, len(planned), self.concat)]
        return [joined[place] for place in rng.permutation(len(joined)).tolist()], left


class BatchStream(IterableDataset):
    """The endless batches of one rank: what is done in its workers."""

    def __init__(
        self,
        shards: Sequence[str],
        reader: ClipReader,
        budget: Budget,
        collate: Collator,
        *,
        strategy: str,
        shuffle_n: int,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        update_freq: int,
    ) -> None:
        self.shards, self._reader, self.budget, self._collate = tuple(shards), reader, budget, collate
        self.shuffle_n, self.update_freq = shuffle_n, update_freq
        self.parts = [Part(strategy, rank, world, worker, workers, seed) for worker in range(workers)]
        self.places = [(1, 0)] * workers  # of every worker: its pass, and how many micro-batches of it were handed out
        self.next_worker = 0

    def __iter__(self) -> Iterator[StreamedBatch | UserError]:
        """The batches of this worker. An error of the data is yielded: torch would wrap a raised one in a traceback."""
        info = get_worker_info()
        number = info.id if info else 0
        try:
            yield from self._batches((self.next_worker + number) % len(self.parts), number)
        except UserError as error:
            yield error

    def clips(self, worker: int, epoch_pass: int, tally: Tally) -> Iterator[StreamedClip]:
        """The clips of a worker in a pass, shuffled, not decoded."""
        part = self.parts[worker]
        members = part.members(self.shards, epoch_pass)
        found = (clip for shard, name, files in members for clip in self._reader.clips(shard, name, files, tally))
        rng = numpy_rng(part.seed, "shuffle", epoch_pass, part.rank, worker)
        return shuffled(found, self.shuffle_n, rng) if self.shuffle_n > 1 else found

    def _batches(self, worker: int, turn: int) -> Iterator[StreamedBatch]:
        """Batches from the saved place on; `turn` is the number of the first in the order of all workers."""
        epoch_pass, done = self.places[worker]
        tally, in_vain = Tally(), 0
        while True:
            handed_out = done
            begin, cpu_begin = time.perf_counter(), time.thread_time()
            for number, parts in enumerate(self._planned(worker, epoch_pass, tally), start=1):
                batch = None if number <= done else self._make(parts, worker, epoch_pass, turn, tally)
                if batch is not None:
                    tidy_worker(number)
                    seconds, cpu_seconds = time.perf_counter() - begin, time.thread_time() - cpu_begin
                    news = FileNews(batch.news.converted, tuple(tally.bad), seconds, cpu_seconds)
                    yield replace(batch, news=news, number=number, left_out=tally.left_out)
                    turn, handed_out = turn + len(self.parts), number
                    begin, cpu_begin = time.perf_counter(), time.thread_time()
                if number <= handed_out:
                    tally.clear()
            in_vain = 0 if handed_out else in_vain + 1
            if (
                in_vain > len(self.parts) * self.parts[worker].world
            ):  # clips that are taken in turns come to all by then
                raise DataError(self._nothing(tally))
            epoch_pass, done = epoch_pass + 1, 0

    def _nothing(self, tally: Tally) -> str:
        """Why a worker has nothing to do."""
        why = "all are outside the limits of length" if tally.left_out else "there are too few"
        if tally.bad:
            why = f"they cannot be used: {tally.bad[-1]}"
        return (
            f"{self.shards[0]}: of the clips of {len(self.shards)} shards none is left for one of the workers, {why}; "
            "check shards, limits and --shard_manifests, or use fewer --num_workers"
        )

    def _planned(self, worker: int, epoch_pass: int, tally: Tally) -> Iterator[list[PlannedClips]]:
        """The micro-batches of a pass."""
        part = self.parts[worker]
        rng = numpy_rng(part.seed, "pool", epoch_pass, part.rank, worker)
        numbers = itertools.count(part.rank * len(self.parts) + worker, part.world * len(self.parts))
        pool: list[StreamedClip] = []
        samples = 0
        for clip in self.clips(worker, epoch_pass, tally):
            pool.append(clip)
            samples += clip.planned
            if self.budget.is_full(len(pool), samples):
                joined, pool = self.budget.cut(pool, numbers, rng, keep=True)
                samples = sum(clip.planned for clip in pool)
                yield from joined
        if pool:
            yield from self.budget.cut(pool, numbers, rng, keep=False)[0]

    def _make(
        self, parts: Sequence[PlannedClips], worker: int, epoch_pass: int, turn: int, tally: Tally
    ) -> StreamedBatch | None:
        """The batch of a micro-batch; None where no clip of it can be used."""
        part = self.parts[worker]
        first = (turn % self.update_freq * part.world + part.rank) * self.budget.concat
        planned, samples = [], []
        for index, (number, longest, clips) in enumerate(parts, start=first):
            rows = self._reader.usable(clips, longest, epoch_pass, tally)
            if rows:
                planned.append(PlannedSubBatch(epoch_pass, number, index))
                samples.append(rows)
        if not planned:
            return None
        batch = self._collate(planned, samples)
        return StreamedBatch(**{each.name: getattr(batch, each.name) for each in fields(batch)}, epoch_pass=epoch_pass)


# ---- Updates ---------------------------------------------------------------------------------------------------------


class StreamLoader(UpdateLoader):
    """The updates of a stream; an epoch is so many of them.

    What a rank has handed out is, for each of its workers, a pass and a number of micro-batches.
    """

    def __init__(
        self,
        stream: BatchStream,
        *,
        epoch_size: int,
        num_workers: int,
        pin_memory: bool,
        sample_rate: int,
        bad_files: BadFiles,
        max_bad_share: float,
        plan: Mapping[str, int],
    ) -> None:
        """`plan`: numbers that must agree for a saved position to mean the same."""
        super().__init__(
            updates_per_epoch=epoch_size,
            update_freq=stream.update_freq,
            num_workers=num_workers,
            pin_memory=pin_memory,
            sample_rate=sample_rate,
            bad_files=bad_files,
        )
        self._stream, self._max_bad_share = stream, max_bad_share
        self._clips = self._left_out = 0
        self._plan = dict(plan)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and the places of all ranks' workers: all ranks have to call it together."""
        places = dict(distributed.gather_objects((self._rank, [list(place) for place in self._stream.places])))
        position = {"epoch": self.epoch, "position": self.position, "next_worker": self._stream.next_worker}
        return {**position, "places": places, **self._plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind a saved position; with the start of a new pass if the stream is another one now."""
        self.close()
        self.epoch, self.position = state["epoch"], state["position"]
        places = state.get("places", {})
        changed = {name: value for name, value in self._plan.items() if state.get(name) != value}
        if not changed and self._rank in places:
            self._stream.places = [(place[0], place[1]) for place in places[self._rank]]
            self._stream.next_worker = state["next_worker"]
            return
        log.warning(
            "the stream is not that of the checkpoint (now %s): epoch %d starts again, with another pass",
            ", ".join(f"{name} {value}, was {state.get(name)}" for name, value in changed.items()) or "other processes",
            self.epoch,
        )
        latest = max((place[0] for rank in places.values() for place in rank), default=0)
        self._stream.places = [(latest + 1, 0) for _ in self._stream.places]
        self._stream.next_worker = self.position = 0

    @property
    def _rank(self) -> int:
        return self._stream.parts[0].rank

    def _batches(self) -> Iterator[Batch]:
        return read_batches(self._stream, None, self._num_workers, self._pin_memory, self._bad_files)

    def _take(self, batch: Batch) -> None:
        """Take note of where the worker of a batch stands, too."""
        if not isinstance(batch, StreamedBatch):
            raise TypeError(f"{type(batch).__name__} does not come from a stream")
        stream = self._stream
        stream.places[stream.next_worker] = (batch.epoch_pass, batch.number)
        stream.next_worker = (stream.next_worker + 1) % len(stream.places)
        self._left_out += batch.left_out
        self._clips += batch.num_rows
        super()._take(batch)
        if batch.news.bad and len(self._bad_files) > self._max_bad_share * max(self._clips, FEW):
            raise DataError(
                f"{batch.news.bad[-1]}; {len(self._bad_files)} clips cannot be used, after {self._clips} that can, "
                f"which is more than --max_bad_share {self._max_bad_share:g}"
            )

    def _end_epoch(self) -> None:
        """Log what the epoch has left out."""
        super()._end_epoch()
        if self._left_out:
            log.info("epoch %d left out %d clips outside the limits of length", self.epoch, self._left_out)
        self._left_out = 0


def stream_loader(
    shards: Sequence[str],
    *,
    strategy: str,
    shuffle_n: int,
    epoch_size: int,
    short: str = "keep",
    sample_rate: int,
    normalize: bool,
    num_frames: Callable[[Any], Any],
    seed: int,
    max_tokens: int | None,
    crop: bool,
    manifest: Manifest | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    max_sample_size: int | None = None,
    limits: LengthLimits | None = None,
    trim_silence: bool = False,
    segment: RandomSegment | None = None,
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
    skip_bad: bool = False,
    max_bad_share: float = 0.0,
    bad_files: Path | None = None,
) -> StreamLoader:
    """Training batches of a stream of shards; arguments not named here are those of prepare.train_loader.

    `strategy`: "scatter" or "replicate"; `shuffle_n`: clips of the shuffle buffer; `epoch_size`: updates; `short`:
    what clips below max_sample_size do, "keep", "skip" or "pad"; `manifest`: its utterances are trained on, others are
    left out. ConfigError for what cannot work, also without the library.
    """
    if epoch_size < 1:
        raise ConfigError("--epoch_size: is needed with --streaming; give the number of updates that make an epoch")
    if not (max_tokens or max_sentences):
        raise ConfigError("--max_tokens: a stream needs it, or --batch_size; give one of them")
    webdataset("tariterators")
    shards_of_rank(list(shards), strategy, rank, world)  # too few are refused now
    if max_sample_size is not None:
        check_crop(np.zeros(1), max_sample_size, num_frames, labels=False)
    reader = ClipReader(
        Waveforms(sample_rate, normalize, trim_silence, segment),
        limits=limits or LengthLimits(),
        num_frames=num_frames,
        max_sample_size=max_sample_size,
        seed=seed,
        encode=encode,
        manifest=manifest,
        skip_bad=skip_bad,
        max_tokens=max_tokens,
        short=short,
    )
    budget = Budget(max_tokens, max_sentences, required_batch_size_multiple, crop, concat)
    stream = BatchStream(
        shards,
        reader,
        budget,
        Collator(num_frames, seed, time_mask, channel_mask, channels),
        strategy=strategy,
        shuffle_n=shuffle_n,
        seed=seed,
        rank=rank,
        world=world,
        workers=max(num_workers, 1),
        update_freq=update_freq,
    )
    log.info("a stream of %d shards (%s), %d updates per epoch", len(shards), strategy, epoch_size)
    settings = (
        *shards,
        strategy,
        shuffle_n,
        budget,
        limits,
        short,
        segment,
        trim_silence,
        max_sample_size,
        sample_rate,
    )
    plan = {"seed": seed, "processes": world, "num_workers": num_workers, "update_freq": update_freq}
    return StreamLoader(
        stream,
        epoch_size=epoch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        sample_rate=sample_rate,
        bad_files=BadFiles(bad_files, utterances=math.inf, max_share=1.0),  # how many there are is not known
        max_bad_share=max_bad_share,
        plan=plan | {"shards": len(shards), "settings": key(*map(str, settings), len(manifest or ()))},
    )
