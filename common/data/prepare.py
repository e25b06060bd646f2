"""From a manifest to a loader: what is trained on, how it is cut into sub-batches, and who reads it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.data.batching import Bucketing, SubBatches, plan_sub_batches
from common.data.collate import Collator
from common.data.dataset import SpeechDataset, Waveforms, check_frames
from common.data.loader import BatchMaker, TrainLoader, ValidLoader
from common.data.manifest import Manifest
from common.data.masking import SpanMasking
from common.data.sampler import UpdateSampler, plan_validation, temperature_weights
from common.data.segment import RandomSegment
from common.data.selection import LengthLimits, check_crop, join_neighbours, select
from common.data.watch import BadFiles
from common.rng import numpy_rng

log = logging.getLogger(__name__)
MOST_OF_VALIDATION = 0.5  # that may be bad


def train_loader(
    manifest: Manifest,
    *,
    sample_rate: int,
    normalize: bool,
    num_frames: Callable[[Any], Any],
    seed: int,
    max_tokens: int | None,
    crop: bool,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    max_sample_size: int | None = None,
    limits: LengthLimits | None = None,
    trim_silence: bool = False,
    segment: RandomSegment | None = None,
    join_short: float = 0.0,
    bucketing: Bucketing | None = None,
    bucketing_strategy: str | None = None,
    semi_sorted: float = 0.0,
    dataset_weights: Sequence[float] | None = None,
    dataset_temperature: float = 0.0,
    time_mask: SpanMasking | None = None,
    channel_mask: SpanMasking | None = None,
    channels: int = 0,
    encode: Callable[[str, str], list[int]] | None = None,
    rank: int = 0,
    world: int = 1,
    concat: int = 1,
    update_freq: int = 1,
    world_batches: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    skip_bad: bool = False,
    max_bad_share: float = 0.0,
    bad_files: Path | None = None,
) -> TrainLoader:
    """Training batches of a manifest; `crop`: rows to the shortest of their sub-batch (else they are padded).

    Utterances outside the limits are left out, those above max_sample_size cropped; both are reported. `join_short` is
    in seconds; `world_batches`: sub-batches per update, 0 for as many as world x concat x update_freq; `bad_files`:
    where files are listed that `skip_bad` leaves out. DataError where nothing is left, an utterance gives no frame, or
    a label is unknown.
    """
    kept = select(manifest, limits or LengthLimits(), sample_rate)
    firsts = join_neighbours(kept, round(join_short * sample_rate)) if join_short else None
    waveforms = Waveforms(sample_rate, normalize, trim_silence, segment)
    dataset = SpeechDataset(kept, waveforms, seed=seed, encode=encode, firsts=firsts)
    check_frames(dataset, num_frames)
    if max_sample_size is not None:
        check_crop(dataset.planned, max_sample_size, num_frames, labels=encode is not None)
    dataset.check_labels(num_frames(kept.num_samples))
    plan = plan_sub_batches(
        dataset.planned,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        multiple=required_batch_size_multiple,
        crop=crop,
        max_sample_size=max_sample_size,
        rng=numpy_rng(seed, "length_order"),
        bucketing=bucketing,
        semi_sorted=semi_sorted,
        datasets=dataset.datasets,
    )
    if dataset_temperature:
        dataset_weights = temperature_weights(_hours(dataset, sample_rate), dataset_temperature)
    if dataset_weights is not None:
        names = zip(manifest.name.split("+"), dataset_weights, strict=False)
        log.info("weights of the lists: %s", ", ".join(f"{name} {weight:.3g}" for name, weight in names))
    sampler = UpdateSampler(
        lengths=plan.samples,
        sub_batches_per_update=world_batches or world * concat * update_freq,
        seed=seed,
        buckets=plan.buckets,
        datasets=plan.datasets,
        dataset_weights=dataset_weights,
        strategy=bucketing_strategy,
        world=world,
    )
    collate = Collator(num_frames, seed, time_mask, channel_mask, channels)
    _report(dataset, plan, sampler)
    return TrainLoader(
        BatchMaker(dataset, plan, collate, skip_bad=skip_bad, fill=bucketing is not None),
        sampler,
        rank=rank,
        world=world,
        concat=concat,
        update_freq=update_freq,
        num_workers=num_workers,
        pin_memory=pin_memory,
        sample_rate=sample_rate,
        bad_files=BadFiles(bad_files, utterances=len(kept) / world, max_share=max_bad_share),
    )


def valid_loader(
    manifest: Manifest,
    *,
    sample_rate: int,
    normalize: bool,
    num_frames: Callable[[Any], Any],
    seed: int,
    max_tokens: int | None,
    max_sentences: int | None = None,
    time_mask: SpanMasking | None = None,
    encode: Callable[[str, str], list[int]] | None = None,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    skip_bad: bool = False,
    bad_files: Path | None = None,
) -> ValidLoader:
    """Validation batches of a manifest, padded; an utterance above max_tokens is a batch of its own.

    With `skip_bad` a validation goes on without its bad files, as long as they are not the most.
    """
    dataset = SpeechDataset(manifest, Waveforms(sample_rate, normalize), seed=seed, encode=encode)
    check_frames(dataset, num_frames)
    dataset.check_labels(num_frames(manifest.num_samples))
    plan = plan_sub_batches(
        manifest.num_samples,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        multiple=1,
        crop=False,
        max_sample_size=max_tokens,  # for the plan only: of two utterances above the budget each is alone
        rng=numpy_rng(seed, "length_order"),
    )
    plan = replace(plan, samples=np.maximum.reduceat(manifest.num_samples[plan.order], plan.offsets[:-1]))
    maker = BatchMaker(dataset, plan, Collator(num_frames, seed, time_mask), skip_bad=skip_bad)
    return ValidLoader(
        maker,
        plan_validation(len(plan), rank=rank, world=world),
        num_workers=num_workers,
        pin_memory=pin_memory,
        bad_files=BadFiles(bad_files, utterances=len(manifest) / world, max_share=MOST_OF_VALIDATION),
    )


def _hours(dataset: SpeechDataset, sample_rate: int) -> list[float]:
    """Hours of every list."""
    assert dataset.datasets is not None, "--dataset_temperature is refused with one list"  # noqa: S101
    return (np.bincount(dataset.datasets, dataset.num_samples) / sample_rate / 3600).tolist()


def _report(dataset: SpeechDataset, plan: SubBatches, sampler: UpdateSampler) -> None:
    """Log the plan: sub-batches, updates, and what of the data an epoch does not use."""
    lengths = dataset.planned[plan.order]
    total, used = int(lengths.sum()), int(np.minimum(lengths, np.repeat(plan.samples, plan.rows)).sum())
    padded = int((plan.samples * plan.rows).sum()) - used
    log.info(
        "%s: %d sub-batches, %d updates of %d per epoch; %.1f %% of the samples are cut off by cropping, "
        "%.1f %% are padding within sub-batches, %.1f %% of the sub-batches sit out in each epoch",
        dataset.manifest.name,
        len(plan),
        sampler.updates_per_epoch,
        sampler.sub_batches_per_update,
        100 * (1 - used / total),
        100 * padded / (used + padded),
        100 * sampler.left_over_share,
    )
