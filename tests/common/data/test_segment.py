"""Random segments: their length, uniform starts, quiet ones drawn again."""

# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest

from common.data.segment import MOST_DRAWS, RandomSegment, rms_db
from common.errors import ConfigError

RATE = 16_000


def refuse(start, frames):
    raise AssertionError("nothing has to be read")


def draws(segment, num_samples, number, read=refuse, rate=RATE):
    rng = np.random.default_rng(7)
    return [segment.draw(num_samples, rate, rng, read) for _ in range(number)]


def test_lengths_are_those_of_the_reference(shared):
    for case in json.loads(shared("golden_ssl/data_pipeline.json").read_text())["random_segment"]:
        segment = RandomSegment(case["duration_sec"], pad=case["pad_to_duration"])
        for start, frames, zeros in draws(segment, case["num_samples"], 5, rate=case["sample_rate"]):
            assert (frames + zeros, zeros) == (case["out_samples"], case["zero_tail"])
            assert 0 <= start <= case["num_samples"] - frames


def test_starts_are_uniform_and_reach_both_ends():
    segment, total = RandomSegment(0.5), RATE
    starts = np.array([start for start, _, _ in draws(segment, total, 2000)])
    assert set(np.bincount(starts * 20 // (total // 2 + 1), minlength=20) > 0) == {True}
    observed = np.bincount(starts * 20 // (total // 2 + 1), minlength=20)
    assert ((observed - 100) ** 2 / 100).sum() < 43.8  # chi-square with 19 degrees of freedom, p = 0.001
    distance = np.abs(np.sort(starts) / (total // 2) - np.linspace(0, 1, 2000)).max()
    assert distance < 1.95 / math.sqrt(2000)  # Kolmogorov-Smirnov, p = 0.001
    few = {start for start, _, _ in draws(RandomSegment(3 / RATE), 5, 200)}
    assert few == {0, 1, 2}


@pytest.mark.parametrize("seconds", [0.1, 0.33333, 1.00003125, 2.5])
def test_the_number_of_samples_does_not_vary(seconds):
    lengths = {frames for _, frames, _ in draws(RandomSegment(seconds), 4 * RATE, 100)}
    assert lengths == {round(seconds * RATE)}


def test_an_utterance_stays_whole_as_often_as_asked():
    whole = sum(frames == RATE for _, frames, _ in draws(RandomSegment(0.25, prob=0.3), RATE, 2000))
    assert abs(whole / 2000 - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 2000)


@pytest.mark.parametrize("prob", [0.5, 1.0])
@pytest.mark.parametrize("pad", [False, True])
def test_no_draw_is_longer_than_planned_and_some_are_as_long(prob, pad):
    segment, lengths = RandomSegment(0.01, prob, pad), np.array([5, 159, 160, 161, 4000], np.int32)
    planned = segment.planned(lengths, RATE)
    assert planned.dtype == np.int32
    for length, most in zip(lengths.tolist(), planned.tolist(), strict=True):
        drawn = [frames + zeros for _, frames, zeros in draws(segment, length, 50)]
        assert max(drawn) == most
        if prob == 1:
            assert min(drawn) == most


def test_a_quiet_segment_is_drawn_again_and_the_last_is_taken():
    wave = np.zeros(10_000, np.float32)
    wave[8000:] = 0.5  # -6 dB, in a fifth of the recording
    asked = []

    def read(start, frames):
        asked.append(start)
        return wave[start : start + frames]

    segment = RandomSegment(100 / RATE, min_rms_db=-20)
    plain = sum(start >= 7990 for start, _, _ in draws(RandomSegment(100 / RATE), 10_000, 300)) / 300
    loud = sum(start >= 7900 for start, _, _ in draws(segment, 10_000, 300, read)) / 300
    assert plain < 0.3
    assert loud > 0.8  # 1 - 0.8 ** 10 is 0.89
    asked.clear()
    (start, frames, zeros), *_ = draws(RandomSegment(100 / RATE, min_rms_db=0), 10_000, 1, read)
    assert len(asked) == MOST_DRAWS
    assert (start, frames, zeros) == (asked[-1], 100, 0)


def test_loudness_is_in_decibels_of_full_scale():
    tone = np.sin(2 * np.pi * np.arange(RATE) / 40).astype(np.float32)
    assert rms_db(tone) == pytest.approx(-3.0103, abs=1e-3)
    assert rms_db(np.ones(9, np.float32)) == 0
    assert rms_db(np.zeros(9, np.float32)) == -math.inf


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"seconds": 0.0}, "--random_segment_sec 0"),
        ({"seconds": math.nan}, "--random_segment_sec nan"),
        ({"seconds": 1.0, "prob": 0.0}, "--random_segment_prob 0"),
        ({"seconds": 1.0, "prob": 1.5}, "--random_segment_prob 1.5"),
    ],
)
def test_a_segment_that_cannot_be_is_refused(settings, flag):
    with pytest.raises(ConfigError, match=flag):
        RandomSegment(**settings)
