"""What is told of the files: bad ones and their share, conversions, why training waits."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from common.data.collate import FileNews
from common.data.watch import BadFiles, Conversions, Work
from common.errors import DataError


def test_bad_files_are_counted_once_and_listed(tmp_path, caplog):
    path = tmp_path / "bad_files.txt"
    path.write_text("train.tsv:9: b\n")  # from before the run was resumed
    bad = BadFiles(path, utterances=100, max_share=0.5)
    bad.add([])
    bad.add(["train.tsv:3: a", "train.tsv:9: b", "train.tsv:3: a"])
    bad.add(["train.tsv:9: b", "train.tsv:4: c"])
    assert len(bad) == 3
    assert path.read_text().splitlines() == ["train.tsv:9: b", "train.tsv:3: a", "train.tsv:4: c"]
    assert [record.getMessage() for record in caplog.records] == [
        "left out: train.tsv:3: a",
        "left out: train.tsv:4: c",
    ]


def test_every_pass_is_counted_by_itself(tmp_path):
    bad = BadFiles(tmp_path / "bad.txt", utterances=10, max_share=0.2)
    for _ in range(3):
        bad.add(["train.tsv:3: a", "train.tsv:4: b"])
        bad.begin_pass()
    bad.add(["train.tsv:5: c", "train.tsv:6: d"])
    with pytest.raises(DataError, match="3 of 10 files cannot be used"):
        bad.add(["train.tsv:3: a"])


@pytest.mark.parametrize(("share", "most"), [(0.02, 2), (0.019, 1), (0.0, 0), (1.0, 100)])
def test_a_share_above_the_limit_ends_the_run(share, most, tmp_path):
    bad = BadFiles(tmp_path / "bad.txt", utterances=100, max_share=share)
    for number in range(most):
        bad.add([f"list:{number}: damaged"])
    if most < 100:
        with pytest.raises(
            DataError, match=rf"list:x: damaged; {most + 1} of 100 files .* --max_bad_share {share:g} allows"
        ):
            bad.add(["list:x: damaged"])
        assert "list:x: damaged" in (tmp_path / "bad.txt").read_text()


def test_conversions_are_told_once_per_kind_and_counted(caplog):
    conversions = Conversions(16000)
    with caplog.at_level(logging.INFO):
        conversions.add(["44.1 kHz stereo", "8 kHz mono"])
        conversions.add(["44.1 kHz stereo"] * 1203)
        first = [record.getMessage() for record in caplog.records]
        caplog.clear()
        conversions.tell()
        conversions.tell()
    assert len(first) == 2
    assert all(line.endswith("-> 16 kHz mono") for line in first)
    assert [record.getMessage() for record in caplog.records] == [
        "converted in the first epoch: 1,204 files 44.1 kHz stereo -> 16 kHz mono",
        "converted in the first epoch: 1 files 8 kHz mono -> 16 kHz mono",
    ]


def work(num_workers: int, waited: float, seconds: float, cpu: float, converted: bool = False) -> Work:
    found = Work(num_workers)
    news = FileNews(converted=("8 kHz mono",) * converted, seconds=seconds / 2, cpu_seconds=cpu / 2)
    found.add([SimpleNamespace(news=news)] * 2, waited)
    return found


@pytest.mark.parametrize(
    ("given", "cpus", "expected"),
    [
        (work(2, 0.9, 20, 20), 8, ""),
        (work(0, 5, 5, 5), 8, "set --num_workers"),
        (work(2, 5, 3, 3), 8, "idle"),
        (work(2, 5, 19, 4), 8, "storage"),
        (work(2, 5, 19, 18), 8, r"too few workers decode; raise --num_workers \(now 2; there are 8"),
        (work(2, 5, 19, 18), 3, "decoding takes all processors"),
        (work(2, 5, 19, 18, converted=True), 3, "decoding and resampling take all processors; convert"),
        (work(2, 5, 19, 18, converted=True), 8, "raise --num_workers"),
    ],
)
def test_the_cause_of_waiting_for_ten_seconds(given, cpus, expected):
    import re

    assert re.search(expected, given.cause_of_waiting(10, cpus)) if expected else not given.cause_of_waiting(10, cpus)
