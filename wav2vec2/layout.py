"""How the sub-batches of an update are shared: processes x joined sub-batches x accumulated micro-batches."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

from common.errors import ConfigError
from common.precision import LossScaler
from wav2vec2.config import Config
from wav2vec2.data_config import DataConfig


def needed_passes(sub_batches: int, world: int, concat: int) -> int:
    """The least --update_freq with which so many processes, each joining so many, have place for an update."""
    return -(-sub_batches // (world * concat))


def solved(config: Config, world: int) -> Config:
    """The configuration with the --update_freq that follows from --world_batches. Raises ConfigError."""
    data = config.data
    wanted = data.world_batches
    if not wanted:
        return config
    if wanted < world:
        raise ConfigError(
            f"--world_batches {wanted}: fewer sub-batches than the {world} processes, each of which needs one; start "
            f"at most {wanted} processes (NUM_GPUS), or raise it and judge the learning rate anew"
        )
    exact = "--streaming" if config.shards.streaming else f"--bucketing_strategy {data.bucketing_strategy}"
    if (config.shards.streaming or data.bucketing_strategy == "fully_randomized") and wanted % (
        world * data.num_concat_batches
    ):
        fitting = [concat for concat in range(data.num_concat_batches, 0, -1) if wanted % (world * concat) == 0]
        remedy = f"set --num_concat_batches {fitting[0]}" if fitting else f"use a divisor of {wanted} as their number"
        raise ConfigError(
            f"--world_batches {wanted}: with {exact} all passes join equally many, and {world} processes x "
            f"{data.num_concat_batches} concatenated batches do not divide it; {remedy}"
        )
    passes = needed_passes(wanted, world, data.num_concat_batches)
    return replace(config, data=replace(data, update_freq=passes))


def sub_batches_per_update(data: DataConfig, world: int) -> int:
    """Over all processes."""
    return data.world_batches or world * data.num_concat_batches * data.update_freq


def with_fewer_joined(data: DataConfig, world: int) -> list[DataConfig]:
    """The same updates in more passes of fewer sub-batches, most joined first."""
    found = []
    for concat in range(data.num_concat_batches - 1, 0, -1):
        if data.world_batches and data.bucketing_strategy != "fully_randomized":
            found.append(
                replace(data, num_concat_batches=concat, update_freq=needed_passes(data.world_batches, world, concat))
            )
        elif data.num_concat_batches * data.update_freq % concat == 0:
            passes = data.num_concat_batches * data.update_freq // concat
            found.append(replace(data, num_concat_batches=concat, update_freq=passes))
    return found


def scale_window(config: Config, world: int) -> int:
    """Updates without overflow before the loss scale of fp16 doubles."""
    return config.precision.fp16_scale_window or LossScaler.default_window(world, config.data.update_freq)
