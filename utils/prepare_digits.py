"""Makes a corpus of connected digits, real speech in LibriSpeech's layout, from the Free Spoken Digit Dataset."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np
import soundfile
import soxr

from common.errors import ConfigError, DataError
from utils import corpus, program

SOURCE_RATE = 8000
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MAX_SECONDS = 1.5  # longer recordings hold more than one digit
FIRST_ID = 10001
UNSEEN = "test-unseen-speaker"
# Recordings 0 to 4 of each digit are the test recordings that the data set itself names; 10 to 14 are not used.
INDICES = {"train": range(15, 50), "dev": range(5, 10), "test": range(5), UNSEEN: range(50)}
FIRST_CHAPTER = {"train": 1, "dev": 501, "test": 601, UNSEEN: 301}


@dataclass(frozen=True)
class Recording:
    """One spoken digit, float32 (S,) at 8 kHz, centred on zero."""

    digit: int
    name: str
    wave: np.ndarray


def find_recordings(folder: Path) -> dict[str, dict[int, list[Path]]]:
    """Speaker -> index -> recordings, from names such as 7_jackson_15.wav."""
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    found: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.glob("*.wav")):
        match = re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem)
        if match:
            found.setdefault(match[2], {}).setdefault(int(match[3]), []).append(path)
    if not found:
        raise DataError(
            f"{folder}: no recordings such as 7_jackson_15.wav; give a checkout of "
            "https://github.com/Jakobovski/free-spoken-digit-dataset"
        )
    return found


def read_recordings(paths: Sequence[Path]) -> list[Recording]:
    """Read recordings; longer ones than a digit takes are left out."""
    recordings = []
    for path in paths:
        try:
            wave, rate = soundfile.read(path, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise DataError(f"{path}: {error.error_string}; check out the data set again") from error
        if rate != SOURCE_RATE or wave.ndim != 1 or not len(wave):
            raise DataError(f"{path}: not {SOURCE_RATE} Hz mono speech; check out the data set again")
        if len(wave) <= MAX_SECONDS * SOURCE_RATE:
            recordings.append(Recording(int(path.stem[0]), path.stem, wave - wave.mean()))
    return recordings


def level(wave: np.ndarray, decibel: float) -> np.ndarray:
    """Scale to this root mean square (dB of full scale), peaks below full scale, and fade 5 ms at both ends."""
    wave = wave * (10 ** (decibel / 20) / max(float(np.sqrt(np.square(wave).mean())), 1e-6))
    wave = wave / max(1.0, float(np.abs(wave).max()) / 0.97)
    fade = min(SOURCE_RATE // 200, len(wave) // 2)
    ramp = (np.arange(fade, dtype=np.float32) + 0.5) / max(fade, 1)
    wave[:fade] *= ramp
    wave[len(wave) - fade :] *= ramp[::-1]
    return wave


def join(recordings: Sequence[Recording], rng: random.Random, noise: np.random.Generator) -> corpus.Clip:
    """A string of digits with 50 to 250 ms before, between and after them, resampled to 16 kHz.

    The gaps hold white noise as loud as the quietest part of the digits, so that they are no digital silence; a
    tenth of it lies under the digits.
    """
    loudness = rng.uniform(-28, -20)
    digits = [level(recording.wave, loudness + rng.uniform(-2, 2)) for recording in recordings]
    frames = [wave[: len(wave) // 80 * 80].reshape(-1, 80) for wave in digits]
    floor = min(float(np.quantile(np.sqrt(np.square(frame).mean(axis=1)), 0.1)) for frame in frames if len(frame))
    gaps = [round(rng.uniform(0.05, 0.25) * SOURCE_RATE) for _ in range(len(digits) + 1)]
    wave = noise.standard_normal(sum(gaps) + sum(map(len, digits)), dtype=np.float32) * float(
        np.clip(floor, 1e-4, 1e-2)
    )
    start = 0
    for gap, digit in zip(gaps, digits, strict=False):
        start += gap
        wave[start : start + len(digit)] = digit + 0.1 * wave[start : start + len(digit)]
        start += len(digit)
    wave = soxr.resample(wave, SOURCE_RATE, corpus.SAMPLE_RATE)
    wave /= max(1.0, float(np.abs(wave).max()) / 0.99)  # resampling can overshoot
    text = " ".join(WORDS[recording.digit] for recording in recordings)
    return corpus.Clip(wave, text, " ".join(recording.name for recording in recordings))


def draw_clips(recordings: Sequence[Recording], minutes: float, key: str, *, once: bool) -> Iterator[corpus.Clip]:
    """Strings of two to six digits from a shuffled deck (each recording once before any comes again)."""
    rng = random.Random(key)
    noise = np.random.default_rng(random.Random(f"noise {key}").getrandbits(63))
    deck: list[Recording] = []
    left = minutes * 60 * corpus.SAMPLE_RATE
    decks = 0
    while left > 0:
        hand: list[Recording] = []
        for _ in range(rng.randint(2, 6)):
            if not deck:
                if once and decks:
                    return
                deck = rng.sample(list(recordings), len(recordings))
                decks += 1
            hand.append(deck.pop())
        clip = join(hand, rng, noise)
        left -= len(clip.wave)
        yield clip


def write_corpus(out: Path, found: dict[str, dict[int, list[Path]]], args: argparse.Namespace) -> list[corpus.Speaker]:
    """Write all subsets; speakers are numbered in the order of their names."""
    ids = {name: FIRST_ID + position for position, name in enumerate(sorted(found))}
    minutes = {
        "train": args.train_minutes,
        "dev": args.test_minutes,
        "test": args.test_minutes,
        UNSEEN: args.test_minutes,
    }
    shares = [(subset, name) for subset in ("train", "dev", "test") for name in args.speakers]
    speakers = []
    for subset, name in program.bar([*shares, (UNSEEN, args.unseen_speaker)], unit="speaker", desc="digits"):
        recordings = read_recordings([path for index in INDICES[subset] for path in found[name].get(index, [])])
        if len(recordings) < 6:
            raise DataError(
                f"{name}: {len(recordings)} recordings for {subset}, 6 are needed; check out the data set again"
            )
        share = minutes[subset] / (1 if subset == UNSEEN else len(args.speakers))
        clips = draw_clips(recordings, share, f"{args.seed} {subset} {name}", once=subset == UNSEEN)
        speakers.append(
            corpus.write_speaker(
                out,
                speaker_id=ids[name],
                sex="M",  # as all six speakers of the data set
                subset=subset,
                name=name,
                clips=clips,
                first_chapter=FIRST_CHAPTER[subset],
            )
        )
    return speakers


def main(argv: list[str] | None = None) -> None:
    """Make the corpus."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("fsdd_dir", type=Path, help="checkout of the Free Spoken Digit Dataset")
    parser.add_argument("out", type=Path, help=f"folder to make; it gets train, dev, test and {UNSEEN}")
    parser.add_argument("--speakers", nargs="+", default=["george", "jackson", "nicolas", "theo"], metavar="NAME")
    parser.add_argument("--unseen_speaker", default="lucas", metavar="NAME", help=f"the speaker of {UNSEEN}")
    parser.add_argument("--train_minutes", type=float, default=31.0, help="speech in train, over all speakers")
    parser.add_argument("--test_minutes", type=float, default=5.0, help="speech in each other subset")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same corpus")
    args = parser.parse(argv)
    found = find_recordings(args.fsdd_dir)
    for name in [*args.speakers, args.unseen_speaker]:
        if name not in found:
            raise ConfigError(f"--speakers/--unseen_speaker {name}: not there; choose from {', '.join(sorted(found))}")
    if args.unseen_speaker in args.speakers:
        raise ConfigError(f"--unseen_speaker {args.unseen_speaker}: is among --speakers too; take it out there")
    for flag in ("train_minutes", "test_minutes"):
        if not getattr(args, flag) > 0:
            raise ConfigError(f"--{flag} {getattr(args, flag):g}: not above 0; give minutes of speech, such as 5")
    names = ("speakers", "unseen_speaker", "train_minutes", "test_minutes", "seed")
    settings = {name: getattr(args, name) for name in names}
    corpus.make(args.out.absolute(), settings, lambda folder: write_corpus(folder, found, args))


if __name__ == "__main__":
    program.run(main)
