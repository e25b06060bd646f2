"""benchmarks/padding.py: the two forms that it compares, and its file."""

from __future__ import annotations

import json

import pytest

from benchmarks import padding
from common.errors import ConfigError
from wav2vec2 import attention


@pytest.mark.parametrize(("rows", "groups", "expected"), [(4, 2, [80, 80, 20, 20]), (3, 3, [80, 50, 20])])
def test_lengths_fall_to_a_quarter_in_equal_steps(rows, groups, expected):
    assert padding.group_lengths(rows, groups, 80) == expected


def test_the_forms_are_what_they_are_called(monkeypatch, tmp_path):
    seen = []
    original = attention.keys_of

    def recorded(valid_BT, lengths):
        keys = original(valid_BT, lengths)
        seen.append((type(keys).__name__, len(keys)))
        return keys

    monkeypatch.setattr("wav2vec2.model.keys_of", recorded)
    out = tmp_path / "out.json"
    argv = ["--size", "tiny", "--batch", "4", "--groups", "2", "4", "--seconds", "1", "--rounds", "2"]
    padding.main([*argv, "--json", str(out)])
    assert set(seen) == {("tuple", 2), ("tuple", 4), ("Tensor", 4)}
    result = json.loads(out.read_text())
    assert [group["rows_of_a_run"] for group in result["groups"]] == [2, 1]
    for group in result["groups"]:
        low, high = group["throughput_ratio_quartiles"]
        assert 0 < low <= group["throughput_ratio"] <= high
    assert result["setting"]["batch"] == 4


def test_more_groups_than_rows_are_refused():
    with pytest.raises(ConfigError, match="--groups 8: more than --batch 4"):
        padding.parse(["--batch", "4", "--groups", "2", "8", "--json", "-"])
