"""Configuration -> loaders: which lists and shards, what is chosen of them, how it is masked and who reads it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import distributed
from common.data.batching import Bucketing
from common.data.loader import TrainLoader, UpdateLoader, ValidLoader
from common.data.manifest import JSON_SUFFIXES, Manifest, find_list, join_manifests, read_manifest
from common.data.masking import SpanMasking
from common.data.prepare import train_loader, valid_loader
from common.data.segment import RandomSegment
from common.data.selection import LengthLimits
from common.data.shards import expand_pattern
from common.data.streaming import StreamLoader, stream_loader
from common.errors import ConfigError, DataError
from common.labels import Dictionary
from wav2vec2.config import Config
from wav2vec2.data_config import DataConfig
from wav2vec2.model import num_frames


def build_loaders(
    config: Config, device: torch.device, dictionary: Dictionary | None
) -> tuple[UpdateLoader, ValidLoader]:
    """Training and validation data; fine-tuning has labels, pads, and does not mask in validation."""
    data, pretraining = config.data, config.mode == "pretrain"
    shared: dict[str, Any] = {
        "sample_rate": config.model.sample_rate,
        "normalize": config.model.normalize,
        "num_frames": partial(num_frames, conv_layers=config.model.conv_layers()),  # sent to the workers
        "seed": config.run.seed,
        "max_sentences": data.batch_size or None,
        "encode": dictionary.encode if dictionary else None,
        "rank": distributed.rank(),
        "world": distributed.world_size(),
        "num_workers": data.num_workers,
        "pin_memory": device.type == "cuda",
        "skip_bad": data.on_bad_file == "skip",
        "bad_files": _bad_files(config),
    }
    training: dict[str, Any] = shared | {
        "max_tokens": data.max_tokens,
        "crop": pretraining and not data.enable_padding and not data.num_batch_buckets,
        "required_batch_size_multiple": data.required_batch_size_multiple,
        "max_sample_size": data.max_sample_size or None,
        "limits": LengthLimits(data.min_sample_size, data.min_duration, data.max_duration),
        "trim_silence": data.trim_silence,
        "segment": _segment(config),
        "time_mask": _span_masking(config.mask.of_time()),
        "channel_mask": _span_masking(config.mask.of_channels()),
        "channels": config.model.encoder_embed_dim,
        "concat": data.num_concat_batches,
        "update_freq": data.update_freq,
        "max_bad_share": data.max_bad_share,
    }
    valid = valid_loader(
        _read_list(config, data.valid_subset),
        max_tokens=data.max_tokens_valid or data.max_tokens,
        time_mask=_span_masking(config.mask.of_time()) if pretraining else None,
        **shared,
    )
    return (_stream if config.shards.streaming else _indexed)(config, training), valid


def _indexed(config: Config, training: dict[str, Any]) -> TrainLoader:
    """Training on files, or on shards with an index, in one global order."""
    data = config.data
    if config.shards.is_tarred:
        manifest = _of_shards(config)
    else:
        manifest = join_manifests([_read_list(config, subset) for subset in data.train_subsets()])
    return train_loader(
        manifest,
        join_short=data.join_short,
        bucketing=_bucketing(data),
        bucketing_strategy=None if data.bucketing_strategy == "mixed" else data.bucketing_strategy,
        semi_sorted=data.semi_sorted,
        dataset_weights=data.weights(),
        dataset_temperature=data.dataset_temperature,
        world_batches=data.world_batches,
        **training,
    )


def _stream(config: Config, training: dict[str, Any]) -> StreamLoader:
    """Training on a stream of shards."""
    shards = config.shards
    names = expand_pattern(shards.shard_manifests) if shards.shard_manifests else []
    rate, text = config.model.sample_rate, config.mode == "finetune"
    chosen = [read_manifest(Path(name), sample_rate=rate, text=text) for name in names]
    return stream_loader(
        shards=expand_pattern(shards.tarred_filepaths),
        manifest=join_manifests(chosen, name="shards") if chosen else None,
        strategy=shards.tarred_shard_strategy,
        shuffle_n=shards.shuffle_n,
        epoch_size=shards.epoch_size,
        short=shards.stream_short,
        **training,
    )


def _read_list(config: Config, subset: str) -> Manifest:
    """A list of --data, with its labels in fine-tuning."""
    data = config.data
    folder, finetuning = Path(data.data), config.mode == "finetune"
    path = find_list(folder, subset, data.manifest_format)
    labels = folder / f"{subset}.{data.labels}"
    if not finetuning or (path.suffix in JSON_SUFFIXES and not labels.exists()):
        return read_manifest(path, sample_rate=config.model.sample_rate, text=finetuning)
    return read_manifest(path, labels, sample_rate=config.model.sample_rate)


def _of_shards(config: Config) -> Manifest:
    """The clips of --tarred_filepaths as their lists name them."""
    shards = [Path(name) for name in expand_pattern(config.shards.tarred_filepaths)]
    lists = [shard.with_suffix(".tsv") for shard in shards]
    if config.shards.shard_manifests:
        lists = [Path(name) for name in expand_pattern(config.shards.shard_manifests)]
        if len(lists) != len(shards):
            raise ConfigError(
                f"--shard_manifests {config.shards.shard_manifests}: {len(lists)} lists for {len(shards)} shards; "
                "name one for each, in the same order"
            )
    for shard in shards:
        if not shard.exists():
            raise DataError(f"--tarred_filepaths: {shard}: no such file; correct the pattern or the folder")
    for shard, path in zip(shards, lists, strict=True):
        if not path.exists():
            raise ConfigError(
                f"--tarred_filepaths {shard}: its list {path} is missing; make it with utils/make_shards.py --index, "
                "or read the shards with --streaming"
            )
    finetuning, rate = config.mode == "finetune", config.model.sample_rate
    labels = [path.with_suffix(f".{config.data.labels}") if finetuning else None for path in lists]
    parts = [read_manifest(*pair, sample_rate=rate) for pair in zip(lists, labels, strict=True)]
    for shard, part in zip(shards, parts, strict=True):
        clip = part[0].clip
        if clip.span is None or clip.path.name != shard.name:
            raise DataError(
                f"{part[0].where}: {clip.path} is no clip of the shard {shard}; make its list with "
                "utils/make_shards.py --index, or read the shards with --streaming"
            )
    return join_manifests(parts, name="shards")


def _segment(config: Config) -> RandomSegment | None:
    data = config.data
    if not data.random_segment_sec:
        return None
    segment = RandomSegment(
        data.random_segment_sec, data.random_segment_prob, data.random_segment_pad, data.random_segment_min_rms_db
    )
    if num_frames(segment.samples(config.model.sample_rate), config.model.conv_layers()) < 1:
        raise ConfigError(f"--random_segment_sec {data.random_segment_sec:g}: gives no frame; give more seconds")
    return segment


def _bucketing(data: DataConfig) -> Bucketing | None:
    if not data.num_batch_buckets:
        return None
    return Bucketing(
        data.num_batch_buckets, data.bucketing_type, data.bucketing_batch_size or (), data.bucketing_weights or ()
    )


def _span_masking(settings: dict[str, Any]) -> SpanMasking | None:
    return SpanMasking(**settings) if settings["prob"] else None


def _bad_files(config: Config) -> Path:
    """Where this process lists files that are left out."""
    rank = f".{distributed.rank()}" if distributed.world_size() > 1 else ""
    return Path(config.run.output_dir) / f"bad_files{rank}.txt"
