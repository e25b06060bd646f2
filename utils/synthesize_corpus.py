"""Synthesises a speech corpus in LibriSpeech's layout with eSpeak NG: train, dev and test by different speakers."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np
import soxr

from common.errors import ConfigError
from utils import corpus, espeak, librispeech_lengths, program, sentences

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland")  # eSpeak NG's name for British English is plain "en"
VARIANTS = tuple(f"m{number}" for number in range(1, 9)) + tuple(f"f{number}" for number in range(1, 6))
PITCHES = (50, 38, 62)  # of 100
HELD_OUT = 8  # voices each for dev and test; no other pitch of them is in train
FIRST_ID = 50001
STEP = 80  # samples: LibriSpeech's lengths are multiples of 5 ms


@dataclass(frozen=True)
class Task:
    """One speaker's share of a subset, made in a process of its own."""

    out: Path
    subset: str
    speaker_id: int
    voice: str
    pitch: int
    seconds: float
    lengths: str
    seed: int


def plan_speakers(out: Path, hours: dict[str, float], lengths: str, seed: int) -> list[Task]:
    """Share voices out to the subsets; a voice (accent and variant) of dev or test is in no other subset."""
    rng = random.Random(f"speakers {seed}")
    voices = [f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS]
    rng.shuffle(voices)
    shares = {"dev": voices[:HELD_OUT], "test": voices[HELD_OUT : 2 * HELD_OUT], "train": voices[2 * HELD_OUT :]}
    mean = 11.0 if lengths == "librispeech" else 1.5
    tasks: list[Task] = []
    for subset in ("train", "dev", "test"):
        own = shares[subset]
        speakers = [
            (own[i], PITCHES[(i + turn) % len(PITCHES)]) for turn in range(len(PITCHES)) for i in range(len(own))
        ]
        limit = len(speakers) if subset == "train" else HELD_OUT
        # About a minute each while there are speakers enough, at least four of them, never one without a clip.
        wanted = min(max(4, round(hours[subset] * 60)), math.ceil(hours[subset] * 3600 / mean), limit)
        for voice, pitch in speakers[:wanted]:
            seconds = hours[subset] * 3600 / wanted
            tasks.append(Task(out, subset, FIRST_ID + len(tasks), voice, pitch, seconds, lengths, seed))
    return tasks


def trim(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Cut silence (40 dB below the loudest 10 ms) from both ends."""
    size = sample_rate // 100
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    energy = np.square(frames).mean(axis=1)
    loud = np.flatnonzero(energy > 1e-4 * energy.max())
    return wave[loud[0] * size : (loud[-1] + 1) * size]


class Narrator:
    """Draws what one speaker says and how it is recorded; everything follows from the task."""

    def __init__(self, task: Task) -> None:
        key = f"{task.seed} {task.subset} {task.speaker_id}"
        self.rng = random.Random(key)
        self.noise = np.random.default_rng(random.Random(f"noise {key}").getrandbits(63))
        self.voice = espeak.Synthesizer(task.voice, seed=self.rng.getrandbits(30))
        self.rate, self.pitch = self.rng.randint(140, 195), task.pitch + self.rng.randint(-4, 4)
        self.lengths = task.lengths

    def sentence(self) -> tuple[np.ndarray, str]:
        """One command at 16 kHz, without silence at its ends."""
        text = sentences.draw(self.rng)
        rate, pitch = self.rate + self.rng.randint(-12, 12), self.pitch + self.rng.randint(-3, 3)
        wave = self.voice.say(text, rate=rate, pitch=pitch, pitch_range=self.rng.randint(40, 65))
        wave = trim(wave, self.voice.sample_rate)
        return soxr.resample(wave, self.voice.sample_rate, corpus.SAMPLE_RATE), text

    def utterance(self) -> corpus.Clip:
        """One command, or several up to a length drawn as in LibriSpeech, with noise, gain and a little silence."""
        pieces, texts = [self.silence(0.05, 0.2)], []
        target = self.librispeech_length() if self.lengths == "librispeech" else 0.0
        while True:
            wave, text = self.sentence()
            pieces += [wave, self.silence(0.1, 0.4)]
            texts.append(text)
            if sum(map(len, pieces)) / corpus.SAMPLE_RATE > target - 0.9:  # another would rather overshoot
                break
        if len(texts) > 1 and sum(map(len, pieces)) > librispeech_lengths.LONGEST * corpus.SAMPLE_RATE:
            del pieces[-2:], texts[-1]
        pieces[-1] = self.silence(0.05, 0.2)
        speech = np.concatenate(pieces)
        speech = np.pad(speech, (0, -len(speech) % STEP))
        return corpus.Clip(self.record(speech), " ".join(texts))

    def librispeech_length(self) -> float:
        """Seconds, drawn from LibriSpeech's distribution."""
        return float(librispeech_lengths.seconds_at(self.rng.random()))

    def silence(self, least: float, most: float) -> np.ndarray:
        """Zeros of a random length in seconds."""
        return np.zeros(int(self.rng.uniform(least, most) * corpus.SAMPLE_RATE), np.float32)

    def record(self, speech: np.ndarray) -> np.ndarray:
        """Add noise (white to dull, 15 to 35 dB below the speech) and set the peak to -14 to -1 dB of full scale."""
        level = np.sqrt(np.square(speech[speech != 0]).mean())
        noise = self.noise.standard_normal(len(speech) + 1, dtype=np.float32)
        noise = noise[1:] + self.rng.uniform(0, 0.95) * noise[:-1]
        noise *= level / np.sqrt(np.square(noise).mean()) * 10 ** (-self.rng.uniform(15, 35) / 20)
        mixed = speech + noise
        return mixed / np.abs(mixed).max() * 10 ** (-self.rng.uniform(1, 14) / 20)

    def clips(self, seconds: float) -> Iterator[corpus.Clip]:
        """Utterances until another one would rather overshoot `seconds`."""
        total = last = 0
        while total + last // 2 < seconds * corpus.SAMPLE_RATE:
            clip = self.utterance()
            last = len(clip.wave)
            total += last
            yield clip


def make_speaker(task: Task) -> corpus.Speaker:
    """Synthesise and write one speaker."""
    return corpus.write_speaker(
        task.out,
        speaker_id=task.speaker_id,
        sex=task.voice.partition("+")[2][0].upper(),
        subset=task.subset,
        name=f"eSpeak NG {task.voice}, pitch {task.pitch}",
        clips=Narrator(task).clips(task.seconds),
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("out", type=Path, help="folder to make; it gets the subsets train, dev and test")
    parser.add_argument("--hours", type=float, required=True, help="hours of speech in train")
    parser.add_argument("--dev_hours", type=float, default=0.1, help="hours of speech in dev")
    parser.add_argument("--test_hours", type=float, default=0.1, help="hours of speech in test")
    parser.add_argument(
        "--lengths",
        choices=["short", "librispeech"],
        default="short",
        help="short: commands of 2 to 6 words; librispeech: commands joined to 1.3 to 17 s, 12 s on average",
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same corpus")
    parser.add_argument("--workers", type=int, default=program.cpu_count(), help="processes at a time")
    args = parser.parse(argv)
    for flag in ("hours", "dev_hours", "test_hours"):
        if not 0 < getattr(args, flag) < 1e5:
            raise ConfigError(f"--{flag} {getattr(args, flag):g}: not above 0; give hours of speech, such as 0.5")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one is needed")
    return args


def main(argv: list[str] | None = None) -> None:
    """Make the corpus, one process per speaker (see espeak.py)."""
    args = parse_args(argv)
    espeak.check_installed()
    hours = {"train": args.hours, "dev": args.dev_hours, "test": args.test_hours}

    def write(folder: Path) -> list[corpus.Speaker]:
        tasks = plan_speakers(folder, hours, args.lengths, args.seed)
        context = multiprocessing.get_context("forkserver")  # cheap new processes, and safe beside threads
        context.set_forkserver_preload(["numpy.random", "soundfile", "soxr", "tqdm", "espeakng_loader"])
        with context.Pool(args.workers, maxtasksperchild=1) as pool:
            done = pool.imap_unordered(make_speaker, tasks, chunksize=1)
            return list(program.bar(done, total=len(tasks), unit="speaker", desc="synthesis"))

    settings = {"hours": hours, "lengths": args.lengths, "seed": args.seed}
    corpus.make(args.out.absolute(), settings, write)


if __name__ == "__main__":
    program.run(main)
