"""Span masks: statistics of the original, never on padding, equal counts, any length."""

# SPDX-License-Identifier: Apache-2.0
import json
import time

import numpy as np
import pytest

from common.data.masking import SpanMasking, channel_mask, span_mask

DRAWS = 400


def draws(lengths, frames, masking, number=DRAWS):
    return np.stack([span_mask(lengths, frames, masking, np.random.default_rng(seed)) for seed in range(number)])


def runs(row):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(int), [0]))))
    return (edges[1::2] - edges[::2]).tolist()


def close(first, second, errors=5):
    """Two samples of draws have the same mean, within standard errors of the difference."""
    error = np.sqrt(first.var(0) / len(first) + second.var(0) / len(second))
    difference = np.abs(first.mean(0) - second.mean(0))
    assert (difference <= errors * error + 1e-3).all(), (difference / (error + 1e-12)).max()


def naive_row(valid, frames, masking, rng):
    """One row as the method is described, span by span (no trimming to equal counts)."""
    number = max(int(masking.prob * valid / masking.length + rng.random()), masking.min_masks)
    lengths = {
        "static": lambda: [masking.length] * number,
        "uniform": lambda: rng.integers(int(masking.other), 2 * masking.length + 1, number).tolist(),
        "normal": lambda: [max(1, round(x)) for x in rng.normal(masking.length, masking.other, number)],
        "poisson": lambda: rng.poisson(masking.length, number).tolist(),
    }[masking.selection]()
    places = valid - min(lengths)
    if places <= number:
        places = number + 1
    mask = np.zeros(frames, bool)
    for start, length in zip(rng.choice(places, number, replace=False).tolist(), lengths, strict=True):
        mask[start : min(start + length, valid)] = True
    return mask


def test_statistics_are_those_of_the_original(shared):
    golden = json.loads(shared("golden/masks.json").read_text())
    config = golden["config"]
    for name, case in golden["cases"].items():
        rows, frames = case["shape"]
        masking = SpanMasking(
            prob=config["mask_prob"],
            length=config["mask_length"],
            selection=config["mask_type"],
            min_masks=config["min_masks"],
            no_overlap=case["no_overlap"],
            min_space=case.get("min_space", 1),
            require_same_masks=case["require_same_masks"],
            one_count_per_batch=name.endswith("one_count_per_batch"),
        )
        masks = draws(case.get("valid_lengths", [frames] * rows), frames, masking)
        counts, stored = masks.sum(-1), case["many_draws"]
        spread = np.array(stored["std_masked_per_row"])
        error = spread * np.sqrt(1 / DRAWS + 1 / stored["n"])
        assert (np.abs(counts.mean(0) - stored["mean_masked_per_row"]) <= 5 * error + 1e-6).all(), name
        assert (np.abs(counts.std(0) - spread) <= 0.35 * spread).all(), name
        assert (counts >= np.array(stored["min_masked"]) - 2.5 * spread).all(), name
        assert (counts <= np.array(stored["max_masked"]) + 2.5 * spread).all(), name
        if "position_profile_row0" in stored:
            share = (np.array(stored["position_profile_row0"]) * stored["n"] + 1) / (stored["n"] + 2)
            error = np.sqrt(share * (1 - share) * (1 / DRAWS + 1 / stored["n"]))
            assert (np.abs(masks[:, 0].mean(0) - stored["position_profile_row0"]) <= 5 * error + 1e-6).all(), name


@pytest.mark.parametrize(
    ("selection", "other"), [("static", 0), ("uniform", 2), ("uniform", 0), ("normal", 3), ("poisson", 0)]
)
def test_spans_follow_a_naive_reference(selection, other):
    masking = SpanMasking(0.5, 6, selection, other, min_masks=2, require_same_masks=False)
    lengths, frames = [60, 41, 9], 60
    rng = np.random.default_rng(7)
    expected = np.stack([np.stack([naive_row(n, frames, masking, rng) for n in lengths]) for _ in range(3000)]).astype(
        float
    )
    found = draws(lengths, frames, masking, 3000).astype(float)
    close(found.sum(-1), expected.sum(-1))
    close(found.sum(-1) ** 2, expected.sum(-1) ** 2)
    close(found, expected)


@pytest.mark.parametrize("no_overlap", [True, False])
def test_spans_keep_their_length_and_the_last_frame_is_never_masked(no_overlap):
    masking = SpanMasking(0.6, 7, no_overlap=no_overlap, min_space=3, require_same_masks=False)
    masks = draws([80, 50], 80, masking, 200)
    assert not masks[:, 0, -1].any()
    assert not masks[:, 1, 49:].any()
    for row in masks.reshape(-1, 80):
        assert all((n == 7) if no_overlap else (n >= 7) for n in runs(row))
        if no_overlap:
            assert all(n >= 3 for n in runs(~row)[1:-1])  # the spaces between spans


@pytest.mark.parametrize("no_overlap", [True, False])
@pytest.mark.parametrize("selection", ["static", "uniform", "normal", "poisson"])
def test_any_length_works_and_padding_is_never_masked(no_overlap, selection):
    masking = SpanMasking(0.65, 10, selection, 2.0, min_masks=2, no_overlap=no_overlap, require_same_masks=False)
    rng = np.random.default_rng(0)
    for frames in [*range(1, 30), 100]:
        for _ in range(10):
            lengths = rng.integers(1, frames + 1, 4)
            lengths[0] = frames
            mask = span_mask(lengths, frames, masking, rng)
            assert mask.shape == (4, frames)
            assert mask.dtype == bool
            assert not (mask & (np.arange(frames) >= lengths[:, None])).any()
            if not no_overlap and selection == "static":
                assert mask.any(1).all()


def test_rows_of_a_batch_have_equal_counts_and_keep_a_random_choice_of_their_frames():
    free, same = (SpanMasking(0.65, 10, min_masks=2, require_same_masks=same) for same in (False, True))
    lengths = [90, 70, 40, 12]
    for seed in range(200):
        full = span_mask(lengths, 90, free, np.random.default_rng(seed))
        mask = span_mask(lengths, 90, same, np.random.default_rng(seed))
        assert (mask.sum(1) == full.sum(1).min()).all()
        assert not (mask & ~full).any()
    kept = draws([90, 90], 90, same, 2000).mean(0)
    close(kept[:, 15:75].T, kept[:, 15:75].T[::-1])  # no place of the row is preferred


def test_one_count_per_batch_is_used_only_where_nothing_is_padded():
    masking = SpanMasking(0.65, 10, no_overlap=True, require_same_masks=False, one_count_per_batch=True)
    for lengths, equal in (([1000] * 4, True), ([1000, 1000, 1000, 999], False)):
        masks = draws(lengths, 1000, SpanMasking(0.065, 10, **options(masking)), 100)
        spans = np.array([[len(runs(row)) for row in mask] for mask in masks])
        assert (spans == spans[:, :1]).all() == equal


def options(masking):
    names = ("no_overlap", "require_same_masks", "one_count_per_batch")
    return {name: getattr(masking, name) for name in names}


def test_the_generator_determines_the_mask():
    masking = SpanMasking(0.65, 10)
    first, again, other = (span_mask([100] * 3, 100, masking, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_nothing_is_masked_where_nothing_is_asked_for():
    assert not span_mask([50, 40], 50, SpanMasking(0.0, 10, min_masks=0), np.random.default_rng(0)).any()
    assert not channel_mask(3, 48, SpanMasking(0.0, 64), np.random.default_rng(0)).any()


def test_channel_spans_cover_the_expected_share():
    masking = SpanMasking(0.1, 64)
    masks = np.stack([channel_mask(4, 768, masking, np.random.default_rng(seed)) for seed in range(300)])
    assert masks.shape == (300, 4, 768)
    counts = masks.sum(-1)
    assert (counts == counts[:, :1]).all()
    # 1.2 spans on average, rounded at random; the smallest of four counts is nearly always one span.
    assert 63 < counts.mean() < 68
    wide = np.stack([channel_mask(2, 48, SpanMasking(0.5, 64), np.random.default_rng(s)) for s in range(100)])
    assert wide.any()  # spans longer than the model is wide are cut


def test_impossible_settings_are_refused_with_their_flag():
    with pytest.raises(ValueError, match="selection odd"):
        SpanMasking(0.5, 10, "odd")
    with pytest.raises(ValueError, match="length 0"):
        SpanMasking(0.5, 0)
    with pytest.raises(ValueError, match="other 30"):
        SpanMasking(0.5, 10, "uniform", 30)


def test_a_mask_costs_less_than_a_millisecond():
    masking = SpanMasking(0.65, 10, min_masks=2)
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        span_mask(np.full(8, 781), 781, masking, rng)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 1e-3
