"""The global order of training: which sub-batches make which update of which epoch, and which rank reads them.

An epoch is one pass over all sub-batches, shuffled and cut into whole updates before ranks are considered. What is
left over sits out, another part in every epoch, and all parts equally often. Where one pass has less than an
update, following passes are appended until it is full. Updates exchange sub-batches with their neighbours, so that
those that are joined have like lengths. With weights of datasets a pass has more or less of each.
With a bucketing strategy an epoch is arranged bucket after bucket instead. Everything is a pure function of
(seed, epoch, position) and the plan, so a run continues anywhere.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.data.buckets import bucket_order
from common.errors import ConfigError, DataError
from common.rng import numpy_rng

VALIDATION = 0  # the pass of validation; those of training count from 1
WINDOW = 8  # updates that exchange sub-batches
ALIKE = 8  # sub-batches of like length that stay together: NUM_CONCAT_BATCHES of the recipes


@dataclass(frozen=True)
class PlannedSubBatch:
    """A sub-batch in an update: the pass over the data, its number, and its place in the update.

    The pass keys crops and masks, `index` (0 is the longest) negatives and noise. No pass has a sub-batch twice.
    idle: another rank trains on it, too, and here it only keeps this one in step.
    """

    epoch_pass: int
    sub_batch: int
    index: int
    idle: bool = False


class UpdateSampler:
    """Plans updates of `sub_batches_per_update` sub-batches; epochs count from 1, positions from 0.

    strategy: None mixes all sub-batches. "fixed_order" and "synced_randomized" visit bucket after bucket, in the
    order of `bucket_order`, all ranks the same one: only an update that spans a border has two. "fully_randomized"
    deals every bucket to `world` ranks, and each visits the buckets in an order of its own, so the ranks of an
    update are in different ones. Within a bucket sub-batches are shuffled anew in every pass.
    """

    def __init__(
        self,
        *,
        lengths: np.ndarray,
        sub_batches_per_update: int,
        seed: int,
        buckets: np.ndarray | None = None,
        datasets: np.ndarray | None = None,
        dataset_weights: Sequence[float] | None = None,
        strategy: str | None = None,
        world: int = 1,
    ) -> None:
        """`lengths`, `buckets`, `datasets`: samples per row, bucket and dataset of every sub-batch.

        `dataset_weights`: how often the sub-batches of every dataset come in a pass, on average; None: once.
        `updates_per_epoch` is the same for all epochs.
        """
        if not len(lengths):
            raise DataError("there is no data to train on; check the file list and --min_sample_size")
        self._lengths, self.seed = np.asarray(lengths, np.int64), seed
        self.sub_batches_per_update = sub_batches_per_update
        self._strategy, self._buckets = strategy, np.zeros(len(lengths), np.int64)
        if strategy is not None:
            if buckets is None:
                raise ConfigError(f"--bucketing_strategy {strategy}: there are no buckets; set --num_batch_buckets")
            self._buckets = np.unique(buckets, return_inverse=True)[1]
            bucket_order(strategy, 1, 1)  # an unknown one is refused now
        self._lanes = world if strategy == "fully_randomized" else 1
        if sub_batches_per_update % self._lanes:
            raise ConfigError(
                f"--bucketing_strategy {strategy}: {sub_batches_per_update} sub-batches of an update cannot be "
                f"shared by {world} processes; change --update_freq"
            )
        self._weights = dataset_weights
        self._turns: _Turns | None = None
        self._per_pass = len(lengths)
        if dataset_weights is not None:
            dataset_of = np.zeros(len(lengths), np.int64) if datasets is None else datasets
            self._turns = _Turns(dataset_of, dataset_weights, seed)
            self._per_pass = self._turns.per_pass
        self._passes = _passes(self._per_pass, sub_batches_per_update)
        self.updates_per_epoch = updates_per_epoch(self._per_pass, sub_batches_per_update)
        self._per_epoch = self.updates_per_epoch * sub_batches_per_update
        self._left_over = self._passes * self._per_pass - self._per_epoch
        self._alike = sub_batches_alike(sub_batches_per_update)
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def arrangement(self) -> dict[str, str]:
        """How the order differs from all sub-batches mixed, for a checkpoint to compare; nothing where it does not."""
        weights = " ".join(f"{weight:g}" for weight in self._weights or ())
        named = {"strategy": self._strategy or "", "dataset_weights": weights}
        return {name: value for name, value in named.items() if value} | (
            {"processes": str(self._lanes)} if self._lanes > 1 else {}
        )

    @property
    def left_over_share(self) -> float:
        """Share of the sub-batches that sits out in an epoch."""
        return self._left_over / (self._passes * self._per_pass)

    def update(self, epoch: int, position: int) -> list[PlannedSubBatch]:
        """The sub-batches of an update, longest first, ties in random order.

        fully_randomized: rank r has those at r, r + world, r + 2 world and so on, its longest first.
        """
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
        """This rank's update_freq micro-batches of at most `concat` sub-batches and at least one.

        Neighbours in length are joined and the ranks alternate: of the s = f * world + r slots of micro-batch f and
        rank r each has its part of the update, and parts differ by one sub-batch at most. Where there are more slots
        than sub-batches, some repeat one that does not count. With fully_randomized neighbours are those of the rank.
        """
        self._check_layout(world, concat, update_freq)
        update, found = self.update(epoch, position), []
        for slot in range(rank, world * update_freq, world):
            first, stop = self._share(slot, world * update_freq)
            places = self._places(slot, world, concat, update_freq)
            found.append(
                [replace(update[at], index=index, idle=first == stop) for index, at in enumerate(places, first)]
            )
        return found

    def largest(
        self, epoch: int, rows: np.ndarray, *, number: int, world: int, concat: int, update_freq: int
    ) -> list[list[PlannedSubBatch]]:
        """The `number` micro-batches of an epoch, of all ranks, with most samples as they are padded, most first.

        `rows`: of every sub-batch.
        """
        self._check_layout(world, concat, update_freq)
        sub_batches = self._plan(epoch)[1]
        sizes = []
        for slot in range(world * update_freq):
            joined = sub_batches[:, list(self._places(slot, world, concat, update_freq))]
            sizes.append(rows[joined].sum(1) * self._lengths[joined].max(1))
        slots, positions = np.unravel_index(
            np.argsort(-np.concatenate(sizes), kind="stable")[:number], (len(sizes), len(sub_batches))
        )
        layout = {"world": world, "concat": concat, "update_freq": update_freq}
        return [
            self.micro_batches(epoch, position, rank=slot % world, **layout)[slot // world]
            for slot, position in zip(slots.tolist(), positions.tolist(), strict=True)
        ]

    def _check_layout(self, world: int, concat: int, update_freq: int) -> None:
        """Refuse a layout with too few places for an update, or with passes that it does not need."""
        number, per_pass = self.sub_batches_per_update, world * concat
        exact = self._lanes > 1
        if not (update_freq - 1) * per_pass < number <= update_freq * per_pass or (exact and number % per_pass):
            raise ConfigError(
                f"--update_freq {update_freq}: {world} processes x {concat} concatenated batches x {update_freq} "
                f"are not the {number} sub-batches of an update; change one of them"
            )
        if self._lanes not in (1, world):
            raise ValueError(f"the plan is for {self._lanes} processes, not for {world}")

    def _share(self, slot: int, slots: int) -> tuple[int, int]:
        """The indices [first, stop) of an update that one of so many slots has."""
        number = self.sub_batches_per_update
        return slot * number // slots, (slot + 1) * number // slots

    def _places(self, slot: int, world: int, concat: int, update_freq: int) -> range:
        """Where in an update the sub-batches of a slot lie, one at least."""
        if self._lanes > 1:
            micro, rank = divmod(slot, world)
            return range(rank + micro * concat * world, rank + (micro + 1) * concat * world, world)
        first, stop = self._share(slot, world * update_freq)
        return range(first, max(stop, first + 1))

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pass and number of every sub-batch of the epoch, both (updates, sub-batches per update)."""
        if self._cached is None or self._cached[0] != epoch:
            passes, sub_batches = self._drawn(epoch)
            lanes = []
            for places in self._arranged(epoch, sub_batches):
                updates = places.reshape(self.updates_per_epoch, -1)
                if self._strategy is None and self._alike > 1:
                    updates = self._gathered(epoch, updates, self._lengths[sub_batches])
                by_length = np.argsort(-self._lengths[sub_batches[updates]], axis=1, kind="stable")
                lanes.append(np.take_along_axis(updates, by_length, 1))
            joined = np.stack(lanes, axis=2).reshape(self.updates_per_epoch, -1)
            self._cached = epoch, passes[joined], sub_batches[joined]
        return self._cached[1], self._cached[2]

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pass and number of every sub-batch of the epoch, shuffled, both (sub-batches of the epoch,) int32."""
        if self._turns is not None:
            passes, sub_batches = self._turns.between((epoch - 1) * self._per_epoch, epoch * self._per_epoch)
            order = numpy_rng(self.seed, "order", epoch).permutation(self._per_epoch)
            return passes[order], sub_batches[order]
        first = (epoch - 1) * self._passes + 1
        drawn = [self._shuffled(first + later) for later in range(self._passes)]
        resting = np.zeros(len(self), bool)
        resting[self._resting(epoch)] = True
        drawn[-1] = drawn[-1][~resting[drawn[-1]]]
        passes = np.arange(first, first + self._passes, dtype=np.int32)
        return np.repeat(passes, [len(part) for part in drawn]), np.concatenate(drawn)

    def _arranged(self, epoch: int, sub_batches: np.ndarray) -> list[np.ndarray]:
        """Places in the epoch's shuffled sub-batches, lane by lane in the order in which they are visited."""
        places = np.arange(len(sub_batches), dtype=np.int32)
        if self._strategy is None:
            return [places]
        bucket_of = self._buckets[sub_batches]
        if self._lanes > 1:
            places = places[np.argsort(bucket_of, kind="stable")]  # every rank gets its part of every bucket
        number, lanes = int(self._buckets.max()) + 1, []
        for rank in range(self._lanes):
            lane = places[rank :: self._lanes]
            turn_of = np.argsort(bucket_order(self._strategy, number, epoch, seed=self.seed, rank=rank))
            lanes.append(lane[np.argsort(turn_of[bucket_of[lane]], kind="stable")])
        return lanes

    def _gathered(self, epoch: int, updates: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The same places, exchanged among the updates of a window such that each has groups of like length.

        Joined sub-batches are padded to the longest of them. From one update alone the shortest would be joined with
        much longer ones, which is 8 % of padding in the Base recipe; from a window it is about 1 %.
        """
        rng, parts = numpy_rng(self.seed, "groups", epoch), []
        for first in range(0, len(updates), WINDOW):
            window = updates[first : first + WINDOW]
            places = window.ravel()
            groups = places[np.argsort(-lengths[places], kind="stable")].reshape(-1, self._alike)
            parts.append(groups[rng.permutation(len(groups))].reshape(window.shape))
        return np.concatenate(parts)

    def _shuffled(self, epoch_pass: int) -> np.ndarray:
        """All sub-batches in the order of this pass."""
        return numpy_rng(self.seed, "order", epoch_pass).permutation(len(self)).astype(np.int32)

    def _resting(self, epoch: int) -> np.ndarray:
        """Those that sit out this epoch: the next ones of a fixed random circle, so that all take turns."""
        circle = numpy_rng(self.seed, "rest").permutation(len(self))
        start = (epoch - 1) * self._left_over
        return circle[(start + np.arange(self._left_over)) % len(self)]


class _Turns:
    """Endless turns through datasets by weight, of which every epoch takes the next part.

    A pass is a fixed random circle of slots: dataset i has round(weight_i * n_i) of them, and at least one. The
    sub-batches of a dataset lie on a fixed random circle, too, and each of its slots takes the next one: whole
    multiples come in every pass, the rest takes turns, and all sub-batches of a dataset come equally often. Nothing
    needs to sit out besides. The pass of a sub-batch is its turn around the circle of its dataset.
    """

    def __init__(self, datasets: np.ndarray, weights: Sequence[float], seed: int) -> None:
        sizes = np.bincount(datasets, minlength=len(weights))
        if len(sizes) > len(weights):
            raise ConfigError(f"--dataset_weights: {len(weights)} weights for {len(sizes)} lists; give one for each")
        self._counts = np.where(sizes > 0, np.maximum(np.rint(sizes * np.asarray(weights)), 1), 0).astype(np.int64)
        self.per_pass = int(self._counts.sum())
        slots = np.repeat(np.arange(len(sizes)), self._counts)
        self._slots = numpy_rng(seed, "slots").permutation(slots).astype(np.min_scalar_type(len(sizes)))
        self._circles = [
            numpy_rng(seed, "turns", dataset).permutation(np.flatnonzero(datasets == dataset)).astype(np.int32)
            for dataset in range(len(sizes))
        ]

    def between(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Pass and number of the sub-batches in slots [first, stop) of the endless turns, dataset by dataset, int32."""
        passes, sub_batches = [], []
        for circle, begin, end in zip(self._circles, self._taken(first), self._taken(stop), strict=True):
            places = np.arange(begin, end)
            if len(places):
                passes.append((1 + places // len(circle)).astype(np.int32))
                sub_batches.append(circle[places % len(circle)])
        return np.concatenate(passes), np.concatenate(sub_batches)

    def _taken(self, slots: int) -> list[int]:
        """How many sub-batches of every dataset the first so many slots have taken."""
        whole, rest = divmod(slots, self.per_pass)
        return (whole * self._counts + np.bincount(self._slots[:rest], minlength=len(self._counts))).tolist()


def updates_per_epoch(sub_batches: int, per_update: int) -> int:
    """Whole updates of an epoch of so many sub-batches."""
    return _passes(sub_batches, per_update) * sub_batches // per_update


def sub_batches_alike(per_update: int) -> int:
    """How many sub-batches of like length an update has of each of its lengths; it has at least ALIKE lengths.

    It follows from the size of an update alone, so no split of it into processes and joined batches changes the plan.
    """
    return max(
        size for size in range(1, ALIKE + 1) if per_update % size == 0 and size * ALIKE <= max(per_update, ALIKE)
    )


def _passes(sub_batches: int, per_update: int) -> int:
    """Passes over the data in an epoch: as many as one update needs."""
    return -(-per_update // sub_batches)


def plan_validation(sub_batches: int, *, rank: int, world: int) -> list[PlannedSubBatch]:
    """This rank's share of a validation, in order; every sub-batch once over all ranks."""
    return [PlannedSubBatch(VALIDATION, number, number) for number in range(rank, sub_batches, world)]


def temperature_weights(amounts: Sequence[float], temperature: float) -> list[float]:
    """Weights of datasets of these amounts (hours): the share of each is proportional to amount ** (1 / temperature).

    1 changes nothing, large temperatures make all equal; weights times amounts are what the amounts were together.
    """
    if temperature <= 0:
        raise ConfigError(f"--dataset_temperature {temperature:g}: give a number above 0")
    given = np.asarray(amounts, np.float64)
    shares = (given / given.max()) ** (1 / temperature)
    wanted = shares / shares.sum() * given.sum()
    return np.divide(wanted, given, out=np.ones_like(given), where=given > 0).tolist()
