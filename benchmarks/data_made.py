"""What benchmarks/data.py measures with: file lists of any size, a corpus of speech as files and as shards, clips."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.startup import ROOT, run
from common.errors import ConfigError, DataError
from utils import corpus, espeak, librispeech_lengths
from utils.program import write_lines

SAMPLE_RATE = 16000
STEP = 80  # samples: LibriSpeech's lengths are multiples of 5 ms
SUBSET = "train-other-500"
OF_A_CHAPTER, OF_A_SPEAKER = (
    51,
    120,
)  # utterances: LibriSpeech's 960 hours have 281 k in 5.5 k chapters of 2.3 k speakers
CLIP_SECONDS = 0.25, 0.5
DIFFERENT_CLIPS = 256
SHARDS = 4


def draw_lengths(utterances: int, seed: int = 0) -> np.ndarray:
    """Samples of so many utterances as long as LibriSpeech's."""
    seconds = librispeech_lengths.seconds_at(np.random.default_rng(seed).random(utterances))
    return (seconds * (SAMPLE_RATE / STEP)).astype(np.int64) * STEP


def librispeech_paths(utterances: int) -> Iterator[str]:
    """Paths as LibriSpeech has them: train-other-500/1234/123456/1234-123456-0012.flac."""
    for number in range(utterances):
        speaker, chapter = 1001 + number // OF_A_SPEAKER, 100001 + number // OF_A_CHAPTER
        yield f"{SUBSET}/{speaker}/{chapter}/{speaker}-{chapter}-{number % OF_A_CHAPTER:04d}.flac"


def write_list(path: Path, utterances: int) -> int:
    """A file list whose files do not exist; returns the bytes of its paths."""
    path_bytes = 0

    def lines() -> Iterator[str]:
        nonlocal path_bytes
        yield "."  # the root must exist
        for name, samples in zip(librispeech_paths(utterances), draw_lengths(utterances).tolist(), strict=True):
            path_bytes += len(name)
            yield f"{name}\t{samples}"

    write_lines(path, lines())
    return path_bytes


def make_speech(folder: Path, hours: float) -> tuple[Path, str]:
    """A corpus of FLAC files below `folder`, and what it is made of: its list and "eSpeak NG" or "noise"."""
    try:
        espeak.check_installed()
        kind = "eSpeak NG"
    except ConfigError:  # not installed, or not made for this machine
        kind = "noise"
    out = folder / f"{kind.split()[0].lower()}_{hours:g}h"
    if kind == "noise":
        corpus.make(out, {"hours": hours}, lambda partial: [_noise_speaker(partial, hours)])
    else:
        lengths = ["--lengths", "librispeech", "--hours", f"{hours:g}", "--dev_hours", "0.01", "--test_hours", "0.01"]
        tool("synthesize_corpus", str(out), *lengths)
    listed = folder / f"{out.name}.tsv"
    tool("generate_filelist", str(out / "train"), str(listed))
    return listed, kind


def make_shards(listed: Path) -> Path:
    """The files of a list as tar shards beside it; returns the list of their members."""
    out = listed.with_suffix(".shards")
    shutil.rmtree(out, ignore_errors=True)
    tool("make_shards", str(listed), str(out), "--num_shards", str(SHARDS))
    made = out / listed.name
    if not made.is_file():
        raise DataError(f"{made}: utils/make_shards.py did not write it; remove {out} and try again")
    return made


def tool(name: str, *words: str) -> None:
    """Run a tool of utils in a process of its own; TrainingError when it fails."""
    run([sys.executable, str(ROOT / "utils" / f"{name}.py"), *words])


def noise_like_speech(samples: int, draws: np.random.Generator) -> np.ndarray:
    """Noise (S,) that falls by 6 dB per octave above 500 Hz, in syllables, four per second, and pauses.

    So its FLAC files are about as large, and as much work, as those of speech.
    """
    spectrum = np.fft.rfft(draws.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    wave = np.fft.irfft(spectrum / np.maximum(frequencies, 500), samples)
    knots = np.arange(0, samples + SAMPLE_RATE // 8, SAMPLE_RATE // 8)
    loudness = np.interp(np.arange(samples), knots, draws.uniform(0, 1, len(knots)) ** 3)
    wave = wave * (loudness + 0.002)
    return wave / np.abs(wave).max() * 0.5


def _noise_speaker(folder: Path, hours: float) -> corpus.Speaker:
    """All of a corpus of noise, as one speaker."""
    draws = np.random.default_rng(0)
    mean = librispeech_lengths.seconds_at(np.linspace(0, 1, 1000)).mean()
    lengths = draw_lengths(max(1, round(hours * 3600 / mean)))
    clips = (corpus.Clip(noise_like_speech(int(samples), draws), "NOISE") for samples in lengths)
    return corpus.write_speaker(folder, speaker_id=1, sex="-", subset="train", name="noise", clips=clips)


def write_clips(folder: Path, clips: int) -> Path:
    """So many short FLAC files of few different contents (links where the disk has them), and their list."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    originals = []
    for number in range(min(clips, DIFFERENT_CLIPS)):
        samples, original = int(draws.uniform(*CLIP_SECONDS) * SAMPLE_RATE), folder / f"{number}.flac"
        soundfile.write(original, noise_like_speech(samples, draws), SAMPLE_RATE, subtype="PCM_16")
        originals.append((samples, original))
    lines = [folder.name]
    for number in range(clips):
        samples, original = originals[number % len(originals)]
        name = f"{number // 1000:03d}/{number}.flac"
        if number % 1000 == 0:
            (folder / name).parent.mkdir()
        try:
            (folder / name).hardlink_to(original)
        except OSError:
            shutil.copyfile(original, folder / name)
        lines.append(f"{name}\t{samples}")
    listed = folder.with_suffix(".tsv")
    write_lines(listed, lines)
    return listed
