"""Cut utterances, sorted by length, into sub-batches under a budget of samples: pure functions of the lengths."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.data.buckets import Bucketing
from common.errors import ConfigError

__all__ = ["Bucketing", "SubBatches", "clipped", "length_order", "plan_sub_batches", "token_batches"]


@dataclass(frozen=True, eq=False)
class SubBatches:
    """The sub-batches of a run, in arrays: sub-batch i has the utterances order[offsets[i]:offsets[i + 1]].

    samples: the length of its rows, to which all of them are cropped or none is padded beyond; with buckets, to
    which all are padded. buckets: its bucket, where there are any; a bucket of weight w has w numbers, and its
    utterances come w times. datasets: the dataset of its utterances, where there are several.
    """

    order: np.ndarray
    offsets: np.ndarray
    samples: np.ndarray
    buckets: np.ndarray | None = None
    datasets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def utterances(self, sub_batch: int) -> np.ndarray:
        """Positions of its utterances in the manifest."""
        return self.order[self.offsets[sub_batch] : self.offsets[sub_batch + 1]]

    @property
    def checksum(self) -> int:
        """A number that is another one for another plan."""
        arrays = (self.order, self.offsets, self.samples, self.buckets, self.datasets)
        value = 0
        for array in arrays:
            value = zlib.crc32(b"" if array is None else np.ascontiguousarray(array).data, value)
        return value

    @property
    def rows(self) -> np.ndarray:
        """Number of utterances of every sub-batch."""
        return np.diff(self.offsets)


def plan_sub_batches(
    sizes: np.ndarray,
    *,
    max_tokens: int | None,
    max_sentences: int | None,
    multiple: int,
    crop: bool,
    max_sample_size: int | None,
    rng: np.random.Generator,
    bucketing: Bucketing | None = None,
    semi_sorted: float = 0.0,
    datasets: np.ndarray | None = None,
) -> SubBatches:
    """Order utterances of these sizes (samples) by length and cut them into sub-batches.

    `crop`: rows to the shortest of their sub-batch, else they are padded to its longest, and with buckets to the
    longest of the bucket; the budget counts what they are padded to. Batch sizes of the buckets replace max_tokens,
    max_sentences and multiple. Every sub-batch is of one bucket and of one of the `datasets` (a number for every
    utterance). ConfigError naming --max_tokens when an utterance (clipped at max_sample_size) is longer than
    the budget.
    """
    lengths = clipped(sizes, max_sample_size)
    order = length_order(lengths, None, rng, semi_sorted)
    buckets = None if bucketing is None else bucketing.of(lengths)
    if buckets is not None and not crop:
        lengths = _longest(lengths, buckets)[buckets]
    if len(lengths) and not (bucketing and bucketing.batch_sizes):
        _check_budget(lengths, max_tokens)
    edge = np.minimum if crop else np.maximum
    parts = []
    for dataset, bucket, members in _groups(order, datasets, buckets):
        rows = None if bucketing is None else bucketing.rows(bucket)
        limits = (max_tokens, max_sentences, multiple) if rows is None else (None, rows, 1)
        offsets = token_batches(lengths[members], *limits)
        samples = edge.reduceat(lengths[members], offsets[:-1])
        for copy in bucketing.copies(bucket) if bucketing else (0,):
            parts.append(_Part(dataset, copy, members, offsets, samples))
    return _joined(parts, bucketed=buckets is not None, several=datasets is not None)


def clipped(sizes: np.ndarray, max_sample_size: int | None) -> np.ndarray:
    """Sizes, none above max_sample_size."""
    sizes = np.asarray(sizes, np.int64)
    return sizes if max_sample_size is None else np.minimum(sizes, max_sample_size)


def length_order(
    sizes: np.ndarray, max_sample_size: int | None, rng: np.random.Generator, semi_sorted: float = 0.0
) -> np.ndarray:
    """Positions by descending clipped size, equal ones in random order; int32 where it fits.

    `semi_sorted` R: by size + U(-b, b) with b = (longest - shortest) * R / 2, as in NeMo.
    """
    lengths = clipped(sizes, max_sample_size)
    number = len(lengths)
    if not number:
        return np.zeros(0, np.int32)
    index = np.int32 if number < 1 << 31 else np.int64
    half = float(lengths.max() - lengths.min()) * semi_sorted / 2
    if half > 0:
        return np.argsort(rng.uniform(-half, half, number) - lengths).astype(index)
    # One sort of numbers that are all different, by length and then by tie: several times faster than lexsort.
    ties = rng.permutation(number)
    place_of = np.empty(number, index)
    place_of[ties] = np.arange(number, dtype=index)
    keys = (lengths.max() - lengths) * number + ties
    keys.sort()
    return place_of[keys % number]


def token_batches(
    lengths: np.ndarray, max_tokens: int | None, max_sentences: int | None = None, multiple: int = 1
) -> np.ndarray:
    """Cut lengths, in the order given, into consecutive batches: offsets (number of batches + 1,) int64.

    A batch of n costs n times its longest and may cost max_tokens at most; it has max_sentences at most, and
    less than `multiple` or a multiple of it. What follows the last such size waits as a tail: it joins the batch
    when the sum is allowed, starts the next batch when the sum is too large, and is a batch of its own when it
    cannot even take the sample that made it too large. ConfigError naming --max_tokens for a longer sample.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return np.zeros(1, np.int64)
    _check_budget(lengths, max_tokens)
    tokens = max_tokens or int(lengths.max()) * len(lengths)
    sentences = max_sentences or len(lengths)
    descending = lengths[-1] > 0 and bool((lengths[1:] <= lengths[:-1]).all())
    return (_descending_batches if descending else _batches_one_by_one)(lengths, tokens, sentences, multiple)


def _descending_batches(lengths: np.ndarray, tokens: int, sentences: int, multiple: int) -> np.ndarray:
    """The same as _batches_one_by_one for positive descending lengths, without a look at every one.

    The first of a batch is its longest, so it says how many fit; of these the batch keeps the largest allowed number,
    and the tail always starts the next one. That number only changes a few times on the way to the shortest.
    """
    number = len(lengths)
    most = np.minimum(tokens // lengths, sentences)  # rows that fit into a batch that starts here
    steps = np.where(most < multiple, most, most // multiple * multiple)
    parts, start = [], 0
    for stop in [*(np.flatnonzero(np.diff(steps)) + 1).tolist(), number]:
        if start < stop:  # all of them have the same step
            parts.append(np.arange(start, stop, steps[start]))
            start = int(parts[-1][-1] + steps[start])
    starts = np.concatenate(parts)
    last = int(np.searchsorted(starts + most[starts], number))  # from here on all that is left fits
    left = number - int(starts[last])
    whole = left if left < multiple else left // multiple * multiple
    ends = [number] if whole == left else [number - left + whole, number]
    return np.append(starts[: last + 1], ends)


def _batches_one_by_one(lengths: np.ndarray, tokens: int, sentences: int, multiple: int) -> np.ndarray:
    """token_batches for lengths in any order; the budget holds the longest."""
    offsets = [0]
    end = 0  # the batch is [offsets[-1], end), the tail [end, position)
    longest = tail_longest = 0
    for position, length in enumerate(lengths.tolist()):
        tail_longest = max(tail_longest, length)
        number = position + 1 - offsets[-1]
        both = max(longest, tail_longest)
        if number > sentences or number * both > tokens:
            if end > offsets[-1]:
                offsets.append(end)
            if (position + 1 - end) * tail_longest > tokens and position > end:
                offsets.append(position)
                tail_longest = length
            end, longest, tail_longest = position + 1, tail_longest, 0
        elif number < multiple or number % multiple == 0:
            end, longest, tail_longest = position + 1, both, 0
    if end > offsets[-1]:
        offsets.append(end)
    if offsets[-1] < len(lengths):
        offsets.append(len(lengths))
    return np.array(offsets, np.int64)


def _check_budget(lengths: np.ndarray, max_tokens: int | None) -> None:
    """Refuse a budget that cannot hold the longest sample alone."""
    longest = int(lengths.max())
    if max_tokens and longest > max_tokens:
        number = int((lengths > max_tokens).sum())
        raise ConfigError(
            f"--max_tokens {max_tokens}: {number} utterances are longer, the longest has {longest} samples; "
            f"give at least {longest}, set a lower --max_sample_size for pre-training, or shorten the list"
        )


@dataclass(frozen=True, eq=False)
class _Part:
    """The sub-batches of one dataset and one visit of a bucket; offsets count from the first of `order`."""

    dataset: int
    bucket: int
    order: np.ndarray
    offsets: np.ndarray
    samples: np.ndarray


def _longest(lengths: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The longest of every bucket (buckets,), 0 where it is empty."""
    longest = np.zeros(int(buckets.max(initial=0)) + 1, np.int64)
    np.maximum.at(longest, buckets, lengths)
    return longest


def _groups(
    order: np.ndarray, datasets: np.ndarray | None, buckets: np.ndarray | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Dataset, bucket and positions, in the order given, of the utterances that share both."""
    if not len(order):
        return
    if datasets is None and buckets is None:
        yield 0, 0, order
        return
    number = 1 if buckets is None else int(buckets.max()) + 1
    groups = np.zeros(len(order), np.int64)
    groups += 0 if buckets is None else buckets
    groups += 0 if datasets is None else np.asarray(datasets, np.int64) * number
    groups = groups.astype(np.min_scalar_type(int(groups.max())))[order]  # NumPy sorts small integers in linear time
    by_group = np.argsort(groups, kind="stable")
    borders = np.flatnonzero(np.diff(groups[by_group])) + 1
    for part in np.split(by_group, borders):
        dataset, bucket = divmod(int(groups[part[0]]), number)
        yield dataset, bucket, order[part]


def _joined(parts: list[_Part], *, bucketed: bool, several: bool) -> SubBatches:
    """One plan of all parts; `bucketed`, `several` (datasets): what it numbers."""
    counts = [len(part.samples) for part in parts]
    firsts = np.cumsum([0, *(len(part.order) for part in parts)])
    offsets = [part.offsets[:-1] + first for part, first in zip(parts, firsts.tolist(), strict=False)]
    small = np.min_scalar_type(max((max(part.dataset, part.bucket) for part in parts), default=0))
    return SubBatches(
        order=np.concatenate([np.zeros(0, np.int32), *(part.order for part in parts)]),
        offsets=np.concatenate([*offsets, firsts[-1:]]),
        samples=np.concatenate([np.zeros(0, np.int64), *(part.samples for part in parts)]),
        buckets=np.repeat(np.array([part.bucket for part in parts], small), counts) if bucketed else None,
        datasets=np.repeat(np.array([part.dataset for part in parts], small), counts) if several else None,
    )
