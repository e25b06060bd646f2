"""Which options of the data cannot work together, and which would have no effect."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Collection

from common import distributed
from common.errors import ConfigError
from wav2vec2.data_config import DataConfig, ShardConfig
from wav2vec2.layout import needed_passes

OF_BUCKETS = ("bucketing_type", "bucketing_strategy", "bucketing_batch_size", "bucketing_weights")
OF_SEGMENTS = ("random_segment_prob", "random_segment_pad", "random_segment_min_rms_db")
OF_STREAMS = ("epoch_size", "shuffle_n", "stream_short", "tarred_shard_strategy")
NOT_OF_STREAMS = (
    *("join_short", "num_batch_buckets", *OF_BUCKETS, "semi_sorted"),
    *("dataset_weights", "dataset_temperature", "train_subset"),
)


def check_data(data: DataConfig, shards: ShardConfig, mode: str, explicit: Collection[str]) -> None:
    """Refuse combinations that cannot work, and flags that would have no effect. Raises ConfigError."""
    several = len(data.train_subsets()) > 1
    tarred = shards.is_tarred or shards.streaming
    needs = [
        ("max_bad_share", data.on_bad_file == "skip", "with --on_bad_file skip"),
        *((name, data.random_segment_sec > 0, "with --random_segment_sec") for name in OF_SEGMENTS),
        *((name, data.num_batch_buckets > 0, "with --num_batch_buckets") for name in OF_BUCKETS),
        ("max_tokens", not data.bucketing_batch_size, "without --bucketing_batch_size, which says the rows"),
        ("batch_size", not data.bucketing_batch_size, "without --bucketing_batch_size, which says the rows"),
        ("dataset_weights", several and not tarred, "with several lists in --train_subset"),
        ("dataset_temperature", several and not tarred, "with several lists in --train_subset"),
        ("dataset_temperature", not data.dataset_weights, "without --dataset_weights"),
        ("tarred_filepaths", tarred, "with --is_tarred or --streaming"),
        ("shard_manifests", tarred, "with --is_tarred or --streaming"),
        ("train_subset", not tarred, "without --is_tarred and --streaming: the shards say what is trained on"),
        *((name, shards.streaming, "with --streaming") for name in OF_STREAMS),
        ("stream_short", data.max_sample_size > 0, "with --max_sample_size"),
        *((name, not shards.streaming, "without --streaming") for name in NOT_OF_STREAMS),
    ]
    for name, has_effect, condition in needs:
        if name in explicit and not has_effect:
            raise ConfigError(f"--{name}: has an effect only {condition}; drop it")
    if tarred and not shards.tarred_filepaths:
        flag = "streaming" if shards.streaming else "is_tarred"
        raise ConfigError(f"--{flag}: needs the shards; name them with --tarred_filepaths")
    if shards.streaming and not shards.epoch_size:
        raise ConfigError("--streaming: a stream has no end; say how many updates an epoch has with --epoch_size")
    if data.world_batches and "update_freq" in explicit:
        world = distributed.launched_processes()
        needed = needed_passes(data.world_batches, world, data.num_concat_batches)
        if data.update_freq != needed:
            raise ConfigError(
                f"--update_freq {data.update_freq}: --world_batches {data.world_batches} makes it {needed} for {world} "
                f"processes x {data.num_concat_batches} concatenated batches; drop one of them"
            )
    if 0 < data.max_duration < data.min_duration:
        raise ConfigError(
            f"--max_duration {data.max_duration:g}: is below --min_duration {data.min_duration:g}; nothing is left"
        )
    if data.num_batch_buckets and mode == "pretrain" and not data.enable_padding:
        raise ConfigError("--num_batch_buckets: pads to the end of the bucket; needs --enable_padding beside it")
    data.weights()
