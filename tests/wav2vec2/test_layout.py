"""--world_batches: the same updates for any number of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError
from wav2vec2.arg_parser import parse_train
from wav2vec2.config import Config, PrecisionConfig
from wav2vec2.data_config import DataConfig, ShardConfig
from wav2vec2.layout import scale_window, solved, sub_batches_per_update, with_fewer_joined


def config(world_batches: int, concat: int, **shards: bool) -> Config:
    data = DataConfig(world_batches=world_batches, num_concat_batches=concat)
    return Config("pretrain", data=data, shards=ShardConfig(**shards))


@pytest.mark.parametrize("concat", [1, 3, 8])
def test_passes_are_as_few_as_have_place_for_all(concat):
    for world in range(1, 65):
        data = solved(config(64, concat), world).data
        assert world * concat * data.update_freq >= 64 > world * concat * (data.update_freq - 1)
        assert sub_batches_per_update(data, world) == 64


def test_without_world_batches_nothing_is_solved():
    given = replace(config(0, 8), data=DataConfig(num_concat_batches=8, update_freq=3))
    assert solved(given, 5) is given
    assert sub_batches_per_update(given.data, 5) == 120


def test_more_processes_than_sub_batches_are_refused():
    with pytest.raises(ConfigError, match=r"--world_batches 8: .* 9 processes.*NUM_GPUS"):
        solved(config(8, 1), 9)


def test_streams_need_a_layout_that_divides():
    assert solved(config(64, 8, streaming=True), 4).data.update_freq == 2
    with pytest.raises(ConfigError, match=r"--world_batches 64: with --streaming .*set --num_concat_batches 4"):
        solved(config(64, 7, streaming=True), 4)
    with pytest.raises(ConfigError, match=r"--world_batches 64: with --streaming .*a divisor of 64"):
        solved(config(64, 8, streaming=True), 24)
    given = config(64, 8)
    given = replace(given, data=replace(given.data, bucketing_strategy="fully_randomized"))
    with pytest.raises(ConfigError, match="--bucketing_strategy fully_randomized"):
        solved(given, 24)


def test_layouts_of_fewer_joined_keep_the_product():
    data = DataConfig(num_concat_batches=8, update_freq=3)
    found = [(smaller.num_concat_batches, smaller.update_freq) for smaller in with_fewer_joined(data, 5)]
    assert found == [(6, 4), (4, 6), (3, 8), (2, 12), (1, 24)]
    data = DataConfig(num_concat_batches=4, update_freq=1, world_batches=64)
    found = [(smaller.num_concat_batches, smaller.update_freq) for smaller in with_fewer_joined(data, 24)]
    assert found == [(3, 1), (2, 2), (1, 3)]


def test_the_window_of_the_loss_scale_follows_the_solved_passes():
    given = replace(config(64, 8), precision=PrecisionConfig(fp16=True))
    assert scale_window(solved(given, 4), 4) == 2**14 // 4 // 2
    given = replace(given, precision=PrecisionConfig(fp16=True, fp16_scale_window=7))
    assert scale_window(solved(given, 4), 4) == 7


def test_an_update_freq_of_another_product_is_refused_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = ["pretrain", "--data", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--num_concat_batches", "8"]
    command += ["--world_batches", "64", "--update_freq"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_train([*command, "2"]).data.update_freq == 2
    with pytest.raises(ConfigError, match=r"--update_freq 1: --world_batches 64 makes it 2 .*drop one"):
        parse_train([*command, "1"])


@pytest.mark.parametrize(
    "more",
    [("--no_probe_memory",), ("--parallel", "fsdp"), ("--streaming", "--tarred_filepaths", "a", "--epoch_size", "9")],
)
def test_auto_batch_without_a_batch_that_is_tried_is_refused(tmp_path, more):
    command = ["pretrain", "--data", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--auto_batch"]
    with pytest.raises(ConfigError, match="--auto_batch: has an effect only without"):
        parse_train([*command, *more])
