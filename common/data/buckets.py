"""Length buckets: where they end, how many rows their sub-batches have, and in which order an epoch visits them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError
from common.rng import numpy_rng

KINDS = ("percentile", "equal_width")
STRATEGIES = ("fixed_order", "synced_randomized", "fully_randomized")
BEHIND_THE_LAST = 1e-5  # the last range of equal width ends this much later, so that the longest is inside


@dataclass(frozen=True)
class Bucketing:
    """Buckets of similar length; a sub-batch has utterances of one bucket.

    number: of buckets, some of which may stay empty; kind: "percentile" (equally many utterances in each) or
    "equal_width" (ranges of length of equal width). batch_sizes: rows of the sub-batches; () leaves that to the
    budget of samples, one number b gives bucket i of n (n - i) * b rows, several give those of every bucket.
    weights: how often the utterances of every bucket come in an epoch, () once. A bucket of weight w counts as w
    buckets: in n above, and when buckets are visited one after another.
    """

    number: int
    kind: str = "percentile"
    batch_sizes: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ConfigError(f"--num_batch_buckets {self.number}: give at least 1, or leave it out")
        if self.kind not in KINDS:
            raise ConfigError(f"--bucketing_type {self.kind}: unknown; choose from {', '.join(KINDS)}")
        _check_list("--bucketing_batch_size", self.batch_sizes, (0, 1, self.number), self.number)
        _check_list("--bucketing_weights", self.weights, (0, self.number), self.number)

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """The bucket of every length (N,): the first that does not end below it, so each is in exactly one."""
        if not len(lengths):
            return np.zeros(0, np.uint8)
        if self.kind == "percentile":
            ends = percentile_ends(lengths, self.number)
        else:
            ends = equal_width_ranges(lengths.min(), lengths.max(), self.number)[:, 1]
        return np.searchsorted(ends, lengths, side="left").astype(np.min_scalar_type(self.number))

    def copies(self, bucket: int) -> range:
        """The numbers under which a bucket is visited: as many as its weight."""
        weights = self.weights or (1,) * self.number
        first = sum(weights[:bucket])
        return range(first, first + weights[bucket])

    def rows(self, bucket: int) -> int | None:
        """Rows of the sub-batches of a bucket; None where the budget of samples decides."""
        if not self.batch_sizes:
            return None
        size = self.batch_sizes[0] if len(self.batch_sizes) == 1 else self.batch_sizes
        sizes = adaptive_batch_sizes(size, sum(self.weights) or self.number, self.weights)
        return sizes[self.copies(bucket)[0]]


def percentile_ends(lengths: np.ndarray, number: int) -> np.ndarray:
    """Longest length of each of `number` buckets of about equally many: (number,), ascending; ends may coincide.

    Lower percentiles at i / number, as in fairseq's get_buckets.
    """
    return np.percentile(lengths, np.linspace(0, 100, number + 1)[1:], method="lower")


def equal_width_ranges(low: float, high: float, number: int) -> np.ndarray:
    """First and last length of each of `number` ranges of equal width over [low, high): (number, 2).

    As in NeMo's tool for tarred data sets: an inner edge ends one range and begins the next.
    """
    width = (high - low) / number
    lows = low + np.arange(number) * width
    highs = lows + width
    highs[-1] += BEHIND_THE_LAST
    return np.stack((lows, highs), axis=1)


def adaptive_batch_sizes(batch_size: int | Sequence[int], buckets: int, weights: Sequence[int] = ()) -> list[int]:
    """Rows of the sub-batches of every bucket, a bucket of weight w listed w times (and so counted in `buckets`).

    One number b gives the i-th different bucket (buckets - i) * b. As in NeMo's calc_bucketing_batch_sizes.
    ConfigError where the sizes are not those of so many buckets.
    """
    if isinstance(batch_size, int):
        sizes = [(buckets - place) * batch_size for place in range(len(weights) or buckets)]
    else:
        sizes = list(batch_size)
    copies = list(weights) or [1] * len(sizes)
    if len(copies) > len(sizes) or sum(copies) != buckets:
        raise ConfigError(
            f"--bucketing_batch_size: {len(sizes)} sizes and weights of {sum(copies)} together do not fit "
            f"{buckets} buckets; give one size, or one for every bucket"
        )
    return [size for size, number in zip(sizes, copies, strict=False) for _ in range(number)]


def bucket_order(strategy: str, buckets: int, epoch: int, *, seed: int = 0, rank: int = 0) -> np.ndarray:
    """The order in which epoch `epoch` (from 1) visits the buckets: a permutation (buckets,).

    fixed_order: as they are numbered. synced_randomized: the epoch-th successive permutation of RandomState(0),
    on every rank and for every seed, as in NeMo. fully_randomized: another one for every (seed, epoch, rank).
    """
    if strategy == "fixed_order":
        return np.arange(buckets)
    if strategy == "synced_randomized":
        draws = np.random.RandomState(0)
        return [draws.permutation(buckets) for _ in range(epoch)][-1]
    if strategy == "fully_randomized":
        return numpy_rng(seed, "buckets", epoch, rank).permutation(buckets)
    raise ConfigError(f"--bucketing_strategy {strategy}: unknown; choose from {', '.join(STRATEGIES)}")


def _check_list(flag: str, numbers: tuple[int, ...], allowed: tuple[int, ...], buckets: int) -> None:
    """Refuse a list of another length than allowed, and numbers below 1."""
    if len(numbers) not in allowed or any(number < 1 for number in numbers):
        shown = " ".join(map(str, numbers))
        one = "one number, or " if 1 in allowed else ""
        raise ConfigError(f"{flag} {shown}: give {one}a number of at least 1 for each of the {buckets} buckets")
