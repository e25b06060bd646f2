"""Utterance and pass -> sample: read, trim, cut, normalise and encode the labels; the only caller of audio.py."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.data.audio import AudioInfo, normalize, read_audio
from common.data.manifest import Manifest, Utterance
from common.data.segment import RandomSegment
from common.errors import DataError
from common.rng import numpy_rng

log = logging.getLogger(__name__)
SILENCE_DB = 60.0  # below the peak of the utterance, in windows of TRIM_WINDOW samples (NeMo's values)
TRIM_WINDOW, TRIM_HOP = 2048, 512


@dataclass(frozen=True, eq=False)
class Sample:
    """One utterance ready for a batch: samples (S,) float32, and its labels where they are asked for.

    place: its position in the dataset (in a stream 0); converted: kinds of recordings that were resampled or mixed
    down for it.
    """

    id: str
    audio_S: np.ndarray
    text: str | None
    labels: list[int] | None
    place: int = 0
    converted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Waveforms:
    """What is done to every waveform between file and batch.

    sample_rate: the model's, in Hz; normalize: zero mean and unit variance; trim: silence at both ends is cut off;
    segment: train on random segments.
    """

    sample_rate: int
    normalize: bool
    trim: bool = False
    segment: RandomSegment | None = None

    def planned(self, num_samples: np.ndarray) -> np.ndarray:
        """The most samples that utterances of so many can give."""
        return num_samples if self.segment is None else self.segment.planned(num_samples, self.sample_rate)

    @property
    def exact(self) -> bool:
        """Whether `planned` is what every utterance gives."""
        return not self.trim and (self.segment is None or self.segment.prob == 1)

    def make(
        self, read: Callable[[int, int], np.ndarray], total: int, longest: int, key: tuple[int | str, ...]
    ) -> np.ndarray:
        """At most `longest` samples of a recording of `total`, of which `read(start, frames)` gives a piece.

        Trimmed, then a segment, then normalised, then cut at random: the order of the originals. Only what is needed is
        read. The draws belong to `key`: (seed, pass, utterance).
        """
        if self.trim:
            whole = trim_silence(read(0, total))
            read, total = (lambda start, frames: whole[start : start + frames]), len(whole)
        start, frames, zeros = 0, total, 0
        if self.segment is not None:
            start, frames, zeros = self.segment.draw(total, self.sample_rate, numpy_rng("segment", *key), read)
        kept, first = min(frames, longest), 0
        if frames > longest:
            first = int(numpy_rng(key[0], "crop", *key[1:]).integers(frames - longest + 1))
        if self.normalize:
            piece = normalize(read(start, frames))[first : first + kept]
        else:
            piece = read(start + first, kept)
        return np.pad(piece, (0, min(zeros, longest - kept))) if zeros else piece


def trim_silence(wave: np.ndarray) -> np.ndarray:
    """Without what is SILENCE_DB below the peak at both ends; as it is where nothing would be left."""
    import librosa  # only here: it takes seconds

    trimmed, _ = librosa.effects.trim(wave, top_db=SILENCE_DB, frame_length=TRIM_WINDOW, hop_length=TRIM_HOP)
    return trimmed if len(trimmed) >= TRIM_WINDOW else wave


class SpeechDataset:
    """The samples of a manifest; with `firsts` neighbours are joined to one sample (see selection.join_neighbours)."""

    def __init__(
        self,
        manifest: Manifest,
        waveforms: Waveforms,
        *,
        seed: int,
        encode: Callable[[str, str], list[int]] | None = None,
        firsts: np.ndarray | None = None,
    ) -> None:
        """`encode(line, where)` turns a label line into symbol numbers, or raises DataError; None: no labels."""
        if encode is not None and not manifest.has_text:
            raise DataError(f"{manifest.name}: labels are needed and none were given; make the .ltr file")
        self.manifest = manifest
        self._waveforms, self._seed, self._encode, self._firsts = waveforms, seed, encode, firsts
        joined = manifest.num_samples if firsts is None else np.add.reduceat(manifest.num_samples, firsts[:-1])
        self.num_samples = joined  # of every sample of the dataset, before anything is done to it
        self.planned = waveforms.planned(joined)

    def __len__(self) -> int:
        return len(self.num_samples)

    @property
    def datasets(self) -> np.ndarray | None:
        """The number of the list that every sample comes from; None where there is one."""
        numbers = self.manifest.datasets
        return numbers if numbers is None or self._firsts is None else numbers[self._firsts[:-1]]

    def utterances(self, place: int) -> list[Utterance]:
        """What the sample at a place is made of."""
        first, stop = (place, place + 1) if self._firsts is None else self._firsts[place : place + 2].tolist()
        return [self.manifest[index] for index in range(first, stop)]

    def sample(self, place: int, *, longest: int, epoch_pass: int) -> Sample:
        """The sample at a place, a random piece of `longest` samples where it is longer than that."""
        utterances = self.utterances(place)
        converted: list[AudioInfo] = []

        def read(start: int, frames: int) -> np.ndarray:
            return self._read(utterances, start, frames, converted.append)

        total = sum(utterance.num_samples for utterance in utterances)
        wave = self._waveforms.make(read, total, longest, (self._seed, epoch_pass, place))
        return Sample(
            id=utterances[0].id,
            audio_S=wave,
            text=utterances[0].text,
            labels=self.labels(place) if self._firsts is None else None,
            place=place,
            converted=tuple({info.kind: None for info in converted}),
        )

    def _read(
        self, utterances: list[Utterance], start: int, frames: int, on_convert: Callable[[AudioInfo], None]
    ) -> np.ndarray:
        """Samples [start, start + frames) of some utterances, one behind the other."""
        pieces, stop, first = [], start + frames, 0
        for utterance in utterances:
            last = first + utterance.num_samples
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                pieces.append(
                    read_audio(
                        utterance.clip,
                        sample_rate=self._waveforms.sample_rate,
                        num_samples=utterance.num_samples,
                        tolerance=utterance.tolerance,
                        start=begin - first,
                        frames=end - begin,
                        where=utterance.where,
                        on_convert=on_convert,
                    )
                )
            first = last
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def labels(self, index: int) -> list[int] | None:
        """Symbol numbers of an utterance of the manifest; DataError with the file and line of the labels."""
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
            index for index in range(len(self.manifest)) if frames_needed(self.labels(index) or []) > frames[index]
        ]
        if impossible:
            message = (
                f"{self.manifest.text_where(impossible[0])}: the transcript has more letters than its audio has "
                f"frames; so it is in {len(impossible)} of {len(self.manifest)} utterances"
            )
            if len(impossible) == len(self.manifest):
                raise DataError(f"{message}; check that labels and list are in the same order")
            log.warning("%s, which CTC cannot align and which count as loss 0; remove or correct them", message)


def check_frames(dataset: SpeechDataset, num_frames: Callable[[Any], Any]) -> None:
    """Refuse samples shorter than the receptive field of the model."""
    short = np.flatnonzero(num_frames(dataset.num_samples) < 1)
    if len(short):
        utterance = dataset.utterances(int(short[0]))[0]
        raise DataError(
            f"{utterance.where}: {utterance.clip.path} has {dataset.num_samples[short[0]]} samples, too short for one "
            f"frame ({len(short)} such utterances); remove them from the list or, for training, set --min_sample_size"
        )


def frames_needed(labels: list[int]) -> int:
    """Frames that CTC needs to align labels: one each, and one between equal neighbours."""
    return len(labels) + sum(first == second for first, second in pairwise(labels))
