"""The global order of training: which sub-batches make which update of which epoch, and which rank reads them.

An epoch is one pass over all sub-batches, shuffled and cut into whole updates before ranks are considered. What is
left over sits out, another part in every epoch, and all parts equally often. Where one pass has less than an
update, following passes are appended until it is full. Everything is a pure function of (seed, epoch, position).
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError, DataError
from common.rng import numpy_rng


@dataclass(frozen=True)
class PlannedSubBatch:
    """A sub-batch in an update: the pass over the data (from 1), its number, and its place in the update.

    The pass keys crops and masks, `index` (0 is the longest) negatives and noise. Validation is pass 0.
    """

    epoch_pass: int
    sub_batch: int
    index: int


class UpdateSampler:
    """Plans updates of `sub_batches_per_update` sub-batches; epochs count from 1, positions from 0."""

    def __init__(self, *, lengths: np.ndarray, sub_batches_per_update: int, seed: int) -> None:
        """`lengths`: samples per row of every sub-batch. `updates_per_epoch` is the same for all epochs."""
        if not len(lengths):
            raise DataError("there is no data to train on; check the file list and --min_sample_size")
        self._lengths, self.seed = np.asarray(lengths, np.int64), seed
        self.sub_batches_per_update = sub_batches_per_update
        self._number = len(lengths)
        self._passes = _passes(self._number, sub_batches_per_update)
        self.updates_per_epoch = updates_per_epoch(self._number, sub_batches_per_update)
        self._left_over = self._passes * self._number - self.updates_per_epoch * sub_batches_per_update
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._number

    @property
    def left_over_share(self) -> float:
        """Share of the sub-batches that sits out in an epoch."""
        return self._left_over / (self._passes * self._number)

    def update(self, epoch: int, position: int) -> list[PlannedSubBatch]:
        """The sub-batches of an update, longest first, ties in the order of the plan."""
        passes, sub_batches = self._plan(epoch)
        return [
            PlannedSubBatch(epoch_pass, sub_batch, index)
            for index, (epoch_pass, sub_batch) in enumerate(
                zip(passes[position].tolist(), sub_batches[position].tolist(), strict=True)
            )
        ]

    def micro_batches(
        self, epoch: int, position: int, *, rank: int, world: int, concat: int, update_freq: int
    ) -> list[list[PlannedSubBatch]]:
        """This rank's update_freq micro-batches of `concat` sub-batches.

        Neighbours in length are joined and the ranks alternate: micro-batch f, rank r, slot k has the index
        (f * world + r) * concat + k.
        """
        if world * concat * update_freq != self.sub_batches_per_update:
            raise ConfigError(
                f"--update_freq {update_freq}: {world} processes x {concat} concatenated batches x {update_freq} "
                f"are not the {self.sub_batches_per_update} sub-batches of an update; change one of them"
            )
        update = self.update(epoch, position)
        firsts = ((micro * world + rank) * concat for micro in range(update_freq))
        return [update[first : first + concat] for first in firsts]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pass and number of every sub-batch of the epoch, both (updates, sub-batches per update)."""
        if self._cached is None or self._cached[0] != epoch:
            first = (epoch - 1) * self._passes + 1
            drawn = [self._shuffled(first + later) for later in range(self._passes)]
            drawn[-1] = drawn[-1][~np.isin(drawn[-1], self._resting(epoch))]
            shape = (self.updates_per_epoch, self.sub_batches_per_update)
            sub_batches = np.concatenate(drawn).reshape(shape)
            counts = [len(part) for part in drawn]
            passes = np.repeat(np.arange(first, first + self._passes), counts).reshape(shape)
            by_length = np.argsort(-self._lengths[sub_batches], axis=1, kind="stable")
            self._cached = (
                epoch,
                np.take_along_axis(passes, by_length, 1),
                np.take_along_axis(sub_batches, by_length, 1),
            )
        return self._cached[1], self._cached[2]

    def _shuffled(self, epoch_pass: int) -> np.ndarray:
        """All sub-batches in the order of this pass."""
        return numpy_rng(self.seed, "order", epoch_pass).permutation(self._number)

    def _resting(self, epoch: int) -> np.ndarray:
        """Those that sit out this epoch: the next ones of a fixed random circle, so that all take turns."""
        circle = numpy_rng(self.seed, "rest").permutation(self._number)
        start = (epoch - 1) * self._left_over
        return circle[(start + np.arange(self._left_over)) % self._number]


def updates_per_epoch(sub_batches: int, per_update: int) -> int:
    """Whole updates of an epoch of so many sub-batches."""
    return _passes(sub_batches, per_update) * sub_batches // per_update


def _passes(sub_batches: int, per_update: int) -> int:
    """Passes over the data in an epoch: as many as one update needs."""
    return -(-per_update // sub_batches)


def plan_validation(sub_batches: int, *, rank: int, world: int) -> list[PlannedSubBatch]:
    """This rank's share of a validation, in order; every sub-batch once over all ranks."""
    return [PlannedSubBatch(0, number, number) for number in range(rank, sub_batches, world)]
