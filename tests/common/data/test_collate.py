"""Batches: padding, crops, masks and labels belong to the sub-batch and not to how it is joined."""

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from common.data.collate import Collator
from common.data.dataset import Sample
from common.data.masking import SpanMasking
from common.data.sampler import PlannedSubBatch

LAYERS = [(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]


def num_frames(samples):
    for kernel, stride in LAYERS:
        samples = (samples - kernel) // stride + 1
    return samples


def samples(*lengths, labels=False):
    rng = np.random.default_rng(sum(lengths))
    return [
        Sample(
            f"utterance{length}",
            rng.normal(size=length).astype(np.float32),
            f"text {length}" if labels else None,
            list(range(4, 4 + row)) if labels else None,
        )
        for row, length in enumerate(lengths)
    ]


def collator(**changes):
    settings = {"num_frames": num_frames, "seed": 3, "time_mask": SpanMasking(0.65, 4, min_masks=2)}
    return Collator(**settings | changes)


PARTS = [samples(9000, 9000, 9000), samples(7000, 5000), samples(4000)]
PLANS = [PlannedSubBatch(2, 5, 0), PlannedSubBatch(2, 1, 1), PlannedSubBatch(2, 3, 2)]


def test_rows_are_padded_with_zeros_and_ordered_by_sub_batch():
    batch = collator()(PLANS, PARTS)
    assert batch.ids == tuple(f"utterance{n}" for n in (9000, 9000, 9000, 7000, 5000, 4000))
    assert batch.audio_BS.shape == (6, 9000)
    assert batch.audio_BS.dtype == torch.float32
    assert batch.lengths_B.tolist() == [9000, 9000, 9000, 7000, 5000, 4000]
    for row, length, sample in zip(batch.audio_BS, batch.lengths_B, sum(PARTS, []), strict=True):
        np.testing.assert_array_equal(row[:length], sample.audio_S)
        assert not row[length:].any()
    assert batch.padded
    assert not collator()(PLANS[:1], PARTS[:1]).padded


def test_sub_batches_and_counts_are_known_on_the_host():
    batch = collator()(PLANS, PARTS)
    assert [part.rows for part in batch.sub_batches] == [3, 2, 1]
    assert [part.samples for part in batch.sub_batches] == [9000, 7000, 4000]
    assert [part.frames for part in batch.sub_batches] == [num_frames(n) for n in (9000, 7000, 4000)]
    assert [part.index for part in batch.sub_batches] == [0, 1, 2]
    assert batch.frame_lengths == tuple(num_frames(n) for n in (9000, 9000, 9000, 7000, 5000, 4000))
    assert (batch.num_rows, batch.num_samples, batch.num_frames) == (6, 43000, sum(batch.frame_lengths))
    assert batch.num_masked == int(batch.mask_BT.sum()) == len(batch.masked_R)
    assert batch.mask_BT.shape == (6, num_frames(9000))


def test_masked_positions_are_the_mask_as_an_index():
    batch = collator()(PLANS, PARTS)
    assert batch.masked_R.dtype == torch.int64
    assert torch.equal(batch.masked_R, batch.mask_BT.flatten().nonzero().squeeze(1))
    rows = batch.masked_R // batch.mask_BT.shape[1]
    expected = [row for row, part in enumerate([0, 0, 0, 1, 1, 2]) for _ in range(batch.sub_batches[part].masked)]
    assert rows.tolist() == expected


def test_masks_have_equal_counts_within_a_sub_batch_and_none_on_padding():
    batch = collator()(PLANS, PARTS)
    counts = batch.mask_BT.sum(1).tolist()
    assert counts == [part.masked for part in batch.sub_batches for _ in range(part.rows)]
    assert min(counts) > 0
    frames = torch.tensor(batch.frame_lengths)
    assert not (batch.mask_BT & (torch.arange(batch.mask_BT.shape[1]) >= frames[:, None])).any()


def test_masks_of_a_sub_batch_do_not_depend_on_what_it_is_joined_with():
    settings = {"channel_mask": SpanMasking(0.5, 8), "channels": 32}
    joined = collator(**settings)(PLANS, PARTS)
    row = 0
    for plan, part, place in zip(PLANS, PARTS, joined.sub_batches, strict=True):
        alone = collator(**settings)([plan], [part])
        rows = slice(row, row + place.rows)
        assert alone.sub_batches == (place,)
        assert torch.equal(alone.mask_BT, joined.mask_BT[rows, : place.frames])
        assert not joined.mask_BT[rows, place.frames :].any()
        assert torch.equal(alone.channel_mask_BD, joined.channel_mask_BD[rows])
        row += place.rows
    assert joined.channel_mask_BD.shape == (6, 32)


def test_masks_change_with_pass_seed_and_sub_batch_but_not_with_the_place_in_the_update():
    def mask(plan, **changes):
        return collator(**changes)([plan], [PARTS[0]]).mask_BT

    base = mask(PlannedSubBatch(2, 5, 0))
    assert torch.equal(base, mask(PlannedSubBatch(2, 5, 7)))
    for other in (
        mask(PlannedSubBatch(3, 5, 0)),
        mask(PlannedSubBatch(2, 6, 0)),
        mask(PlannedSubBatch(2, 5, 0), seed=4),
    ):
        assert not torch.equal(base, other)


def test_a_sub_batch_without_masked_frames_leaves_only_the_others():
    batch = collator(time_mask=SpanMasking(0.65, 10, no_overlap=True, min_masks=2))(
        PLANS[:2], [samples(9000, 9000), samples(500, 400)]
    )
    assert [part.masked > 0 for part in batch.sub_batches] == [True, False]
    assert len(batch.masked_R) == batch.num_masked == 2 * batch.sub_batches[0].masked


def test_without_masking_there_is_no_mask():
    batch = collator(time_mask=None)(PLANS, PARTS)
    assert batch.mask_BT is batch.masked_R is batch.channel_mask_BD is batch.labels_BL is batch.texts is None
    assert (batch.num_masked, batch.num_labels) == (0, 0)


def test_labels_are_padded_with_the_pad_symbol():
    batch = collator(time_mask=None)(PLANS[:1], [samples(5000, 4000, 3000, labels=True)])
    assert batch.labels_BL.tolist() == [[1, 1], [4, 1], [4, 5]]
    assert batch.label_lengths == (0, 1, 2)
    assert batch.num_labels == 3
    assert batch.texts == ("text 5000", "text 4000", "text 3000")


def test_moving_a_batch_moves_all_tensors_and_keeps_the_rest():
    batch = collator()(PLANS, PARTS)
    moved = batch.to("meta")
    assert moved.audio_BS.is_meta
    assert moved.lengths_B.is_meta
    assert moved.mask_BT.is_meta
    assert moved.masked_R.is_meta
    assert moved.sub_batches == batch.sub_batches
    assert moved.channel_mask_BD is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_can_be_pinned():
    pinned = collator()(PLANS, PARTS).pin_memory()
    assert pinned.audio_BS.is_pinned()
    assert pinned.masked_R.is_pinned()
