"""Cut utterances, sorted by length, into sub-batches under a budget of samples: pure functions of the lengths."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError


@dataclass(frozen=True, eq=False)
class SubBatches:
    """The sub-batches of a run, in arrays: sub-batch i has the utterances order[offsets[i]:offsets[i + 1]].

    samples: the length of its rows, to which all of them are cropped or none is padded beyond.
    """

    order: np.ndarray
    offsets: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def utterances(self, sub_batch: int) -> np.ndarray:
        """Positions of its utterances in the manifest."""
        return self.order[self.offsets[sub_batch] : self.offsets[sub_batch + 1]]

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
) -> SubBatches:
    """Order utterances of these sizes (samples) by length and cut them into sub-batches.

    ConfigError naming --max_tokens when an utterance (clipped at max_sample_size) is longer than the budget.
    """
    order = length_order(sizes, max_sample_size, rng)
    lengths = clipped(sizes, max_sample_size)[order]
    offsets = token_batches(lengths, max_tokens, max_sentences, multiple)
    # Longest first, so the shortest of a sub-batch is its last.
    samples = lengths[offsets[1:] - 1] if crop else lengths[offsets[:-1]]
    return SubBatches(order, offsets, samples)


def clipped(sizes: np.ndarray, max_sample_size: int | None) -> np.ndarray:
    """Sizes, none above max_sample_size."""
    sizes = np.asarray(sizes, np.int64)
    return sizes if max_sample_size is None else np.minimum(sizes, max_sample_size)


def length_order(sizes: np.ndarray, max_sample_size: int | None, rng: np.random.Generator) -> np.ndarray:
    """Positions by descending clipped size, equal ones in random order."""
    lengths = clipped(sizes, max_sample_size)
    return np.lexsort((rng.permutation(len(lengths)), -lengths))


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
