"""Random segments of utterances for pre-training: how long they are, and where they lie."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError

MOST_DRAWS = 10  # of a segment that shall not be quiet; NeMo's max_trials


@dataclass(frozen=True)
class RandomSegment:
    """With probability `prob` train on `seconds` of an utterance, at a place that is uniformly random.

    pad: a shorter utterance gets zeros at its end, else it stays as it is. min_rms_db: a segment of less is drawn
    again, up to 10 times, after which the last is taken. As in NeMo's RandomSegmentPerturbation; there the number of
    samples varies by one with the rounding of start and end, here it is always round(seconds * sample_rate).
    """

    seconds: float
    prob: float = 1.0
    pad: bool = False
    min_rms_db: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"--random_segment_sec {self.seconds:g}: give a number of seconds above 0")
        if not 0 < self.prob <= 1:
            raise ConfigError(
                f"--random_segment_prob {self.prob:g}: give a number above 0 and up to 1, or leave out "
                "--random_segment_sec"
            )

    def samples(self, sample_rate: int) -> int:
        """Samples of a segment."""
        return max(1, round(self.seconds * sample_rate))

    def planned(self, num_samples: np.ndarray, sample_rate: int) -> np.ndarray:
        """The most samples that utterances of so many (N,) can give, of the same type."""
        lengths, samples = np.asarray(num_samples), self.samples(sample_rate)
        longest = lengths if self.prob < 1 else np.minimum(lengths, samples)
        return (np.maximum(longest, samples) if self.pad else longest).astype(lengths.dtype, copy=False)

    def draw(
        self,
        num_samples: int,
        sample_rate: int,
        rng: np.random.Generator,
        read: Callable[[int, int], np.ndarray],
    ) -> tuple[int, int, int]:
        """First sample, number of samples, and number of zeros to put behind them.

        `read(start, frames)` gives a piece of the utterance; it is asked for only with min_rms_db.
        """
        samples = self.samples(sample_rate)
        if self.prob < 1 and rng.random() >= self.prob:
            return 0, num_samples, 0
        if num_samples <= samples:
            return 0, num_samples, samples - num_samples if self.pad else 0
        start = 0
        for _ in range(MOST_DRAWS):
            start = int(rng.integers(num_samples - samples + 1))
            if self.min_rms_db is None or rms_db(read(start, samples)) >= self.min_rms_db:
                break
        return start, samples, 0


def rms_db(wave: np.ndarray) -> float:
    """Root mean square of samples in dB of full scale; -inf for silence."""
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    return 10 * math.log10(power) if power > 0 else -math.inf
