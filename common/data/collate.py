"""Join the samples of one or more sub-batches into a Batch: padding, masks, labels."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from common.data.masking import SpanMasking, channel_mask, span_mask
from common.data.sampler import PlannedSubBatch
from common.rng import numpy_rng

if TYPE_CHECKING:  # so that a program on made batches needs no audio library
    from common.data.dataset import Sample

PAD = 1  # the dictionary's <pad>

Value = TypeVar("Value")


@dataclass(frozen=True)
class SubBatch:
    """The rows of one sub-batch within a Batch.

    samples: length of its rows before joining; frames: what that gives; masked: masked frames in each of its
    rows; index: its place in the update (training) or in the plan (validation).
    """

    rows: int
    samples: int
    masked: int
    index: int
    frames: int


@dataclass(frozen=True)
class FileNews:
    """What a worker found while it made a batch.

    converted: kinds of recordings that were resampled or mixed down, one for every such row; bad: messages about files
    that were left out; seconds: of work, and of the processor for it: the difference is spent waiting for the storage.
    """

    converted: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass needs; rows are ordered by sub-batch, numbers of Python are known on the host.

    lengths_B: valid samples per row; padded: some row is shorter than S; masked_R: flat positions row * T + t
    of the masked frames, ordered by (sub-batch, row, t); frame_lengths, label_lengths: those of every row as
    numbers of Python; num_samples, num_frames: valid ones of all rows; places: positions of the rows in the dataset;
    idle: its loss does not count, another process has the same sub-batch.
    """

    ids: tuple[str, ...]
    audio_BS: Tensor
    lengths_B: Tensor
    padded: bool
    sub_batches: tuple[SubBatch, ...]
    num_samples: int
    frame_lengths: tuple[int, ...]
    mask_BT: Tensor | None = None
    masked_R: Tensor | None = None
    channel_mask_BD: Tensor | None = None
    labels_BL: Tensor | None = None
    label_lengths: tuple[int, ...] | None = None
    texts: tuple[str, ...] | None = None
    places: tuple[int, ...] = ()
    idle: bool = False
    news: FileNews = FileNews()

    @property
    def num_rows(self) -> int:
        """Number of utterances."""
        return len(self.ids)

    @property
    def num_frames(self) -> int:
        """Number of frames that are no padding."""
        return sum(self.frame_lengths)

    @property
    def num_labels(self) -> int:
        """Number of target symbols."""
        return sum(self.label_lengths or ())

    @property
    def num_masked(self) -> int:
        """Number of masked frames."""
        return sum(part.rows * part.masked for part in self.sub_batches)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on this device, copied without waiting where the memory is pinned."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def present(value: Value | None) -> Value:
    """A field that batches of this kind always have."""
    if value is None:
        raise ValueError("the batch lacks what this task needs: masks in pre-training, labels in fine-tuning")
    return value


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of planned sub-batches and their samples.

    num_frames: frames that so many samples give (int or array); channels: D of the channel mask.
    Masks are keyed by (seed, pass, sub-batch), so neither joining nor the number of workers changes them.
    """

    num_frames: Callable[[Any], Any]
    seed: int
    time_mask: SpanMasking | None = None
    channel_mask: SpanMasking | None = None
    channels: int = 0

    def __call__(
        self, planned: Sequence[PlannedSubBatch], samples: Sequence[Sequence[Sample]], *, width: int = 0
    ) -> Batch:
        """Join sub-batches, each given as its place in the plan and its samples; rows have `width` samples at least."""
        rows = list(chain.from_iterable(samples))
        lengths = np.array([len(sample.audio_S) for sample in rows], np.int64)
        longest = max(int(lengths.max()), width)
        audio = _empty(len(rows), longest)
        for row_S, sample in zip(audio.numpy(), rows, strict=True):
            row_S[: len(sample.audio_S)] = sample.audio_S
            row_S[len(sample.audio_S) :] = 0
        masks = [self._time_mask(plan, part) for plan, part in zip(planned, samples, strict=True)]
        mask_BT = _joined(masks, int(self.num_frames(longest)))
        labels = [sample.labels for sample in rows if sample.labels is not None]
        label_lengths = tuple(len(row) for row in labels)
        return Batch(
            ids=tuple(sample.id for sample in rows),
            audio_BS=audio,
            lengths_B=torch.from_numpy(lengths),
            padded=bool((lengths < longest).any()),
            sub_batches=tuple(map(self._sub_batch, planned, samples, masks)),
            num_samples=int(lengths.sum()),
            frame_lengths=tuple(self.num_frames(lengths).tolist()),
            mask_BT=None if mask_BT is None else torch.from_numpy(mask_BT),
            masked_R=None if mask_BT is None else torch.from_numpy(np.flatnonzero(mask_BT)),
            channel_mask_BD=self._channel_masks(planned, samples),
            labels_BL=_padded_labels(labels) if labels else None,
            label_lengths=label_lengths if labels else None,
            texts=_texts(rows),
            places=tuple(sample.place for sample in rows),
            idle=planned[0].idle,
            news=FileNews(converted=tuple(chain.from_iterable(sample.converted for sample in rows))),
        )

    def _time_mask(self, plan: PlannedSubBatch, samples: Sequence[Sample]) -> np.ndarray | None:
        """Mask (rows, frames of the sub-batch) bool."""
        if self.time_mask is None:
            return None
        frames_B = self.num_frames(np.array([len(sample.audio_S) for sample in samples], np.int64))
        rng = numpy_rng(self.seed, "mask", plan.epoch_pass, plan.sub_batch)
        return span_mask(frames_B, int(frames_B.max()), self.time_mask, rng)

    def _channel_masks(self, planned: Sequence[PlannedSubBatch], samples: Sequence[Sequence[Sample]]) -> Tensor | None:
        """Channel masks (B, D) bool of all rows."""
        if self.channel_mask is None:
            return None
        masks = []
        for plan, part in zip(planned, samples, strict=True):
            rng = numpy_rng(self.seed, "channel_mask", plan.epoch_pass, plan.sub_batch)
            masks.append(channel_mask(len(part), self.channels, self.channel_mask, rng))
        return torch.from_numpy(np.concatenate(masks))

    def _sub_batch(self, plan: PlannedSubBatch, samples: Sequence[Sample], mask: np.ndarray | None) -> SubBatch:
        longest = max(len(sample.audio_S) for sample in samples)
        return SubBatch(
            rows=len(samples),
            samples=longest,
            masked=0 if mask is None else int(mask[0].sum()),
            index=plan.index,
            frames=int(self.num_frames(longest)),
        )


def _empty(rows: int, samples: int) -> Tensor:
    """Audio (B, S) float32 to fill. In a worker it lies in shared memory, where it would else be copied to.

    That also keeps large blocks off the worker's heap, which they would fragment, so that it grew for days.
    """
    if get_worker_info() is None:
        return torch.empty(rows, samples)
    storage = torch.UntypedStorage._new_shared(4 * rows * samples)  # as torch's own collation does
    return torch.empty(0).set_(storage, 0, torch.Size((rows, samples)), (samples, 1))


def _joined(masks: Sequence[np.ndarray | None], frames: int) -> np.ndarray | None:
    """Masks of the sub-batches over the frames of the joined batch: (B, T) bool."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    return np.concatenate([np.pad(mask, ((0, 0), (0, frames - mask.shape[1]))) for mask in given])


def _texts(rows: Sequence[Sample]) -> tuple[str, ...] | None:
    """Label lines as they stand in the file, where the manifest has them."""
    texts = tuple(sample.text for sample in rows if sample.text is not None)
    return texts if len(texts) == len(rows) else None


def _padded_labels(labels: Sequence[Sequence[int]]) -> Tensor:
    """Labels (B, L) padded with <pad>."""
    labels_BL = torch.full((len(labels), max(map(len, labels))), PAD)
    for row_L, row in zip(labels_BL, labels, strict=True):
        row_L[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return labels_BL
