"""Draw span masks over frames or channels: pure functions of a generator, vectorised over the batch.

The statistics are those of the original wav2vec 2.0: the number of spans of a row is its length times `prob` /
`length`, rounded up or down at random; starts are drawn without replacement such that a span of full length ends
before the last frame; overlapping spans merge; with `require_same_masks` the rows are then thinned at random to
the smallest count among them.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SELECTIONS = ("static", "uniform", "normal", "poisson")


@dataclass(frozen=True)
class SpanMasking:
    """How spans are drawn.

    prob: share of frames that spans would cover without overlap; length: (mean) length of a span;
    selection: distribution of the lengths, with its second parameter `other` (lowest length of "uniform",
    standard deviation of "normal"); min_masks: least number of spans over frames; no_overlap: spans keep
    `min_space` frames between them; one_count_per_batch: one rounding for all rows of an unpadded batch.
    """

    prob: float
    length: int
    selection: str = "static"
    other: float = 0.0
    min_masks: int = 2
    no_overlap: bool = False
    min_space: int = 1
    require_same_masks: bool = True
    one_count_per_batch: bool = False

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection {self.selection}: unknown; use {', '.join(SELECTIONS)}")
        if self.selection == "uniform" and not 0 <= self.other <= 2 * self.length:
            raise ValueError(f"other {self.other}: the shortest span lies between 0 and twice length {self.length}")
        if self.length < 1:
            raise ValueError(f"length {self.length}: a span has at least 1 frame")


def span_mask(
    lengths_B: Sequence[int] | np.ndarray, frames: int, masking: SpanMasking, rng: np.random.Generator
) -> np.ndarray:
    """Mask (B, frames) bool, True is masked, of rows with `lengths_B` valid frames; never on padding."""
    valid_B = np.asarray(lengths_B, np.int64)
    spans_B = _span_counts(valid_B, frames, masking, rng)
    lengths_BK = _span_lengths(valid_B, spans_B, masking, rng)
    if masking.no_overlap:
        mask_BT = _place_apart(valid_B, frames, lengths_BK, masking.min_space, rng)
    else:
        mask_BT = _place_freely(valid_B, frames, lengths_BK, spans_B, rng)
    return _thin_to_smallest(mask_BT, rng) if masking.require_same_masks else mask_BT


def channel_mask(rows: int, channels: int, masking: SpanMasking, rng: np.random.Generator) -> np.ndarray:
    """Mask (B, D) bool of spans over the channels, as few as the rounding gives; padding has no part in it."""
    return span_mask(np.full(rows, channels), channels, replace(masking, min_masks=0), rng)


def _span_counts(valid_B: np.ndarray, frames: int, masking: SpanMasking, rng: np.random.Generator) -> np.ndarray:
    """Number of spans of every row: rounded at random, at least min_masks, and no more than frames."""
    together = masking.one_count_per_batch and bool((valid_B == frames).all())
    draw = rng.random(1 if together else len(valid_B))
    spans_B = (masking.prob * valid_B / masking.length + draw).astype(np.int64)
    return np.minimum(np.maximum(spans_B, masking.min_masks), valid_B)


def _span_lengths(
    valid_B: np.ndarray, spans_B: np.ndarray, masking: SpanMasking, rng: np.random.Generator
) -> np.ndarray:
    """Lengths (B, K) of the spans of every row; 0 behind its last span."""
    size = (len(spans_B), int(spans_B.max(initial=0)))
    if masking.selection == "static":
        lengths_BK = np.full(size, masking.length)
    elif masking.selection == "uniform":
        lengths_BK = rng.integers(int(masking.other), 2 * masking.length + 1, size)
    elif masking.selection == "normal":
        lengths_BK = np.maximum(np.rint(rng.normal(masking.length, masking.other, size)).astype(np.int64), 1)
    else:
        lengths_BK = rng.poisson(masking.length, size)
    lengths_BK = np.where(np.arange(size[1]) < spans_B[:, None], lengths_BK, 0)
    nothing = (lengths_BK.sum(1) == 0) & (spans_B > 0)  # possible with "uniform" and "poisson"
    if nothing.any():
        lengths_BK[nothing, 0] = np.minimum(masking.length, valid_B - 1)[nothing]
    return lengths_BK


def _place_freely(
    valid_B: np.ndarray, frames: int, lengths_BK: np.ndarray, spans_B: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Mask of spans that may overlap, with different starts."""
    rows, most = lengths_BK.shape
    if most == 0:
        return np.zeros((rows, frames), bool)
    shortest_B = np.where(np.arange(most) < spans_B[:, None], lengths_BK, frames + 1).min(1)
    # Rows too short for that many starts give up the distance to the end before they give up spans.
    starts_B = np.minimum(np.maximum(valid_B - shortest_B, spans_B + 1), valid_B)
    keys = rng.random((rows, frames), np.float32)
    keys[np.arange(frames) >= starts_B[:, None]] = 2.0
    starts_BK = np.argpartition(keys, most - 1, axis=1)[:, :most]
    # The K smallest keys come in no order: sorted, so that the first of a row with fewer spans are its own.
    smallest = np.take_along_axis(keys, starts_BK, 1)
    starts_BK = np.take_along_axis(starts_BK, np.argsort(smallest, axis=1), 1)
    stops_BK = np.minimum(starts_BK + lengths_BK, np.maximum(valid_B[:, None], starts_BK))
    # Every span adds 1 at its start and takes 1 away behind its end; the running sum counts the spans there.
    offset = np.arange(rows)[:, None] * (frames + 1)
    size = rows * (frames + 1)
    change = np.bincount((starts_BK + offset).ravel(), minlength=size)
    change -= np.bincount((stops_BK + offset).ravel(), minlength=size)
    return change.reshape(rows, frames + 1).cumsum(1)[:, :frames] > 0


def _place_apart(
    valid_B: np.ndarray, frames: int, lengths_BK: np.ndarray, min_space: int, rng: np.random.Generator
) -> np.ndarray:
    """Mask of spans with at least min_space frames between them; those that find no room are left out.

    Longest first, a span goes into one of the gaps that can hold it, chosen by their sizes, and anywhere in it.
    """
    mask_BT = np.zeros((len(valid_B), frames), bool)
    for row, lengths_K in enumerate(lengths_BK):
        lengths = np.sort(lengths_K[lengths_K > 0])[::-1]
        gaps = [(0, int(valid_B[row]) - 1)]  # [start, stop): the last frame stays free
        for length in lengths.tolist():
            sizes = np.array([stop - start for start, stop in gaps])
            weights = np.where(sizes >= length + max(min_space - 1, 0), sizes + 1, 0)
            if not weights.any():
                break
            start, stop = gaps.pop(int(rng.choice(len(gaps), p=weights / weights.sum())))
            first = int(rng.integers(start, stop - length + 1))
            mask_BT[row, first : first + length] = True
            sides = ((start, first - min_space), (first + length + min_space, stop))
            gaps += [side for side in sides if side[1] - side[0] >= lengths[-1]]
            if not gaps:
                break
    return mask_BT


def _thin_to_smallest(mask_BT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep, in every row, a random choice of its masked frames, as many as the row with the fewest has."""
    counts = mask_BT.sum(1)
    fewest = int(counts.min(initial=mask_BT.shape[1]))
    if fewest == 0:
        return np.zeros_like(mask_BT)
    if (counts == fewest).all():
        return mask_BT
    keys = np.where(mask_BT, rng.random(mask_BT.shape, np.float32), np.float32(2))
    kept = np.argpartition(keys, fewest - 1, axis=1)[:, :fewest]
    thinned = np.zeros_like(mask_BT)
    np.put_along_axis(thinned, kept, True, 1)
    return thinned
