"""Which utterances of a list are trained on: limits of length, neighbours that are joined, and what that costs."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data.manifest import Manifest
from common.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LengthLimits:
    """What stays in training: from `min_sample_size` samples on, and durations in seconds; 0 is no limit."""

    min_sample_size: int = 0
    min_duration: float = 0.0
    max_duration: float = 0.0

    def kept(self, num_samples: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
        """For every limit that is set, which utterances it keeps."""
        seconds = num_samples / sample_rate
        kept = {
            f"--min_sample_size {self.min_sample_size}": num_samples >= self.min_sample_size,
            f"--min_duration {self.min_duration:g}": seconds >= self.min_duration,
            f"--max_duration {self.max_duration:g}": seconds <= self.max_duration,
        }
        return {flag: of_limit for flag, of_limit in kept.items() if not flag.endswith(" 0")}


def select(manifest: Manifest, limits: LengthLimits, sample_rate: int) -> Manifest:
    """The utterances within the limits; hours kept and dropped are logged. DataError where none is left."""
    kept = np.ones(len(manifest), bool)
    for flag, of_limit in limits.kept(manifest.num_samples, sample_rate).items():
        dropped = kept & ~of_limit
        kept &= of_limit
        if dropped.any():
            log.info(
                "%s: %s leaves out %d utterances, %.2f hours",
                manifest.name,
                flag,
                dropped.sum(),
                manifest.num_samples[dropped].sum() / sample_rate / 3600,
            )
        if not kept.any():
            raise DataError(
                f"{manifest.where(0)}: all {len(manifest)} utterances of {manifest.name} are left out by {flag}; "
                "change it"
            )
    chosen = manifest if kept.all() else manifest.select(kept)
    log.info("%s: %d utterances, %.2f hours", manifest.name, len(chosen), chosen.hours(sample_rate))
    return chosen


def join_neighbours(manifest: Manifest, longest: int) -> np.ndarray:
    """Join neighbours of one speaker while they have at most `longest` samples together.

    Returns the first utterance of every joined one, and behind them the number of utterances.
    """
    firsts, total = [0], 0
    together = [False, *manifest.neighbours().tolist()]
    for place, (length, same) in enumerate(zip(manifest.num_samples.tolist(), together, strict=True)):
        if place and (not same or total + length > longest):
            firsts.append(place)
            total = 0
        total += length
    log.info("%s: %d utterances are joined to %d", manifest.name, len(manifest), len(firsts))
    return np.array([*firsts, len(manifest)])


def check_crop(
    num_samples: np.ndarray, max_sample_size: int, num_frames: Callable[[Any], Any], *, labels: bool
) -> None:
    """Refuse a --max_sample_size that gives no frame, or that would cut audio but not its labels."""
    if num_frames(max_sample_size) < 1:
        raise ConfigError(f"--max_sample_size {max_sample_size}: gives no frame; give more samples")
    if labels and num_samples.max() > max_sample_size:
        raise ConfigError(
            f"--max_sample_size {max_sample_size}: would cut audio but not its labels; leave it out when there "
            "are labels, or leave out long utterances with --max_duration"
        )
