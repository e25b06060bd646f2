"""Utterance and pass -> sample: read, check, normalise and crop one utterance and encode its labels."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from common.data.audio import normalize, read_audio
from common.data.manifest import Manifest
from common.errors import DataError
from common.rng import numpy_rng

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """One utterance ready for a batch: samples (S,) float32, and its labels where they are asked for."""

    id: str
    audio_S: np.ndarray
    text: str | None
    labels: list[int] | None


class SpeechDataset:
    """The samples of a manifest; the only caller of audio.py."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        sample_rate: int,
        normalize: bool,
        seed: int,
        encode: Callable[[str, str], list[int]] | None = None,
    ) -> None:
        """`encode(line, where)` turns a label line into symbol numbers, or raises DataError; None: no labels."""
        if encode is not None and not manifest.has_text:
            raise DataError(f"{manifest.name}: labels are needed and none were given; make the .ltr file")
        self.manifest = manifest
        self._sample_rate, self._normalize, self._seed, self._encode = sample_rate, normalize, seed, encode

    def sample(self, index: int, *, longest: int, epoch_pass: int) -> Sample:
        """Utterance `index`, a random piece of `longest` samples where it is longer than that.

        The piece is keyed by (seed, pass, utterance). With `normalize` the whole utterance is read and
        normalised before it is cut, as in the original; otherwise only the piece is read.
        """
        utterance = self.manifest[index]
        start, frames = 0, min(utterance.num_samples, longest)
        if utterance.num_samples > longest:
            rng = numpy_rng(self._seed, "crop", epoch_pass, index)
            start = int(rng.integers(utterance.num_samples - longest + 1))
        whole = self._normalize
        wave = read_audio(
            utterance.source,
            sample_rate=self._sample_rate,
            num_samples=utterance.num_samples,
            start=0 if whole else start,
            frames=-1 if whole else frames,
            where=utterance.where,
        )
        if whole:
            wave = normalize(wave)[start : start + frames]
        return Sample(utterance.id, wave, utterance.text, self.labels(index))

    def labels(self, index: int) -> list[int] | None:
        """Symbol numbers of utterance `index`; DataError with the file and line of the labels."""
        text = self.manifest.text(index)
        if self._encode is None or text is None:
            return None
        return self._encode(text, self.manifest.text_where(index))

    def check_labels(self, frames: np.ndarray) -> None:
        """Encode all labels once, so that a run does not end at an unknown symbol after hours.

        CTC needs a frame for every symbol and one more between equal neighbours; utterances whose `frames` are
        fewer teach nothing. They are reported, and DataError is raised when all of them are such.
        """
        if self._encode is None:
            return
        impossible = [
            index for index in range(len(self.manifest)) if _frames_needed(self.labels(index) or []) > frames[index]
        ]
        if impossible:
            message = (
                f"{self.manifest.text_where(impossible[0])}: the transcript has more letters than its audio has "
                f"frames; so it is in {len(impossible)} of {len(self.manifest)} utterances"
            )
            if len(impossible) == len(self.manifest):
                raise DataError(f"{message}; check that labels and list are in the same order")
            log.warning("%s, which CTC cannot align and which count as loss 0; remove or correct them", message)


def _frames_needed(labels: list[int]) -> int:
    return len(labels) + sum(first == second for first, second in pairwise(labels))
