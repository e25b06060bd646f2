"""Limits of length, joined neighbours, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from common.data.manifest import read_manifest
from common.data.selection import LengthLimits, check_crop, join_neighbours, select
from common.errors import ConfigError, DataError

RATE = 16000


def num_frames(samples):
    return (samples - 400) // 320 + 1


@pytest.fixture
def make(tmp_path):
    """A list of utterances, given as (path, samples)."""

    def made(*utterances):
        lines = [str(tmp_path), *(f"{path}\t{samples}" for path, samples in utterances)]
        (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
        return read_manifest(tmp_path / "train.tsv")

    return made


@pytest.mark.parametrize(
    ("seconds", "kept"), [(7.999, False), (8.0, True), (12.0, True), (16.7, True), (16.7001, False), (16.8, False)]
)
def test_durations_are_kept_up_to_both_limits(make, seconds, kept):
    limits = LengthLimits(min_duration=8.0, max_duration=16.7)
    manifest = make(("a.flac", 9 * RATE), ("b.flac", round(seconds * RATE)))
    assert len(select(manifest, limits, RATE)) == 1 + kept


def test_what_every_limit_leaves_out_is_told_in_hours(make, caplog):
    manifest = make(*((f"{hours}.flac", hours * 3600 * RATE) for hours in (1, 2, 4, 8)), ("short.flac", 15_999))
    with caplog.at_level(logging.INFO):
        kept = select(manifest, LengthLimits(16_000, min_duration=3600.5, max_duration=4.5 * 3600), RATE)
    assert [kept[index].id for index in range(len(kept))] == ["2", "4"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "train: --min_sample_size 16000 leaves out 1 utterances, 0.00 hours",
        "train: --min_duration 3600.5 leaves out 1 utterances, 1.00 hours",
        "train: --max_duration 16200 leaves out 1 utterances, 8.00 hours",
        "train: 2 utterances, 6.00 hours",
    ]


def test_without_limits_the_list_stays_as_it_is(make):
    manifest = make(("a.flac", 1), ("b.flac", 10**9))
    assert select(manifest, LengthLimits(), RATE) is manifest


def test_a_limit_that_leaves_nothing_is_named(make):
    manifest = make(("a.flac", RATE), ("b.flac", 3 * RATE))
    with pytest.raises(DataError, match=r"train.tsv:2: all 2 utterances of train are left out by --max_duration 0.5"):
        select(manifest, LengthLimits(max_duration=0.5), RATE)


def test_neighbours_of_one_folder_are_joined_while_they_fit(make):
    lengths = [("s1/a", 4), ("s1/b", 5), ("s1/c", 2), ("s2/d", 1), ("s2/e", 1), ("s1/f", 1), ("s1/g", 30), ("s1/h", 1)]
    firsts = join_neighbours(make(*((f"{path}.flac", samples) for path, samples in lengths)), longest=9)
    joined = [[lengths[place][0] for place in range(*pair)] for pair in zip(firsts, firsts[1:], strict=False)]
    assert joined == [["s1/a", "s1/b"], ["s1/c"], ["s2/d", "s2/e"], ["s1/f"], ["s1/g"], ["s1/h"]]


def test_joined_neighbours_are_all_utterances_and_no_more_could_join(make):
    rng = np.random.default_rng(0)
    utterances = [(f"s{rng.integers(3)}/{n}.flac", int(rng.integers(1, 50))) for n in range(200)]
    firsts = join_neighbours(make(*utterances), longest=60)
    assert firsts[0] == 0
    assert firsts[-1] == 200
    speakers = [path.split("/")[0] for path, _ in utterances]
    for begin, end in zip(firsts, firsts[1:], strict=False):
        assert len(set(speakers[begin:end])) == 1
        total = sum(samples for _, samples in utterances[begin:end])
        assert total <= 60
        if end < 200 and speakers[end] == speakers[begin]:
            assert total + utterances[end][1] > 60


def test_a_crop_that_gives_no_frame_or_cuts_labels_is_refused():
    lengths = np.array([500, 900])
    check_crop(lengths, 900, num_frames, labels=True)
    check_crop(lengths, 400, num_frames, labels=False)
    with pytest.raises(ConfigError, match="--max_sample_size 399: gives no frame"):
        check_crop(lengths, 399, num_frames, labels=False)
    with pytest.raises(ConfigError, match="--max_sample_size 899: would cut audio but not its labels"):
        check_crop(lengths, 899, num_frames, labels=True)
