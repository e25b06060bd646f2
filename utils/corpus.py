"""Writes small corpora in LibriSpeech's layout: SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac and .trans.txt."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from common.errors import ConfigError
from utils import program

SAMPLE_RATE = 16000
CHAPTER_SIZE = 50  # clips


@dataclass(frozen=True)
class Clip:
    """One utterance; `source` says what it was made of."""

    wave: np.ndarray  # float32 (S,), within -1..1
    text: str
    source: str = ""


@dataclass(frozen=True)
class Speaker:
    """What is known of a speaker's share of a subset."""

    id: int
    sex: str
    subset: str
    name: str
    clips: tuple[tuple[str, int, str], ...]  # utterance, samples, source


def write_speaker(
    out: Path, *, speaker_id: int, sex: str, subset: str, name: str, clips: Iterable[Clip], first_chapter: int = 1
) -> Speaker:
    """Write all clips of one speaker, fifty to a chapter; chapters of one speaker must differ between subsets."""
    written: list[tuple[str, int, str]] = []
    lines: dict[str, list[str]] = {}
    for number, clip in enumerate(clips):
        chapter = f"{speaker_id}{first_chapter + number // CHAPTER_SIZE:03d}"
        utterance = f"{speaker_id}-{chapter}-{number % CHAPTER_SIZE:04d}"
        folder = out / subset / str(speaker_id) / chapter
        folder.mkdir(parents=True, exist_ok=True)
        samples = np.round(np.clip(clip.wave, -1.0, 1.0) * 32767).astype(np.int16)
        soundfile.write(folder / f"{utterance}.flac", samples, SAMPLE_RATE, subtype="PCM_16")
        lines.setdefault(chapter, []).append(f"{utterance} {clip.text.upper()}")
        written.append((utterance, len(samples), clip.source))
    for chapter, own in lines.items():
        program.write_lines(out / subset / str(speaker_id) / chapter / f"{speaker_id}-{chapter}.trans.txt", own)
    return Speaker(speaker_id, sex, subset, name, tuple(written))


def write_tables(out: Path, speakers: Iterable[Speaker]) -> None:
    """Write SPEAKERS.TXT (as LibriSpeech has it) and sources.tsv, and say how long each subset is."""
    ordered = sorted(speakers, key=lambda speaker: (speaker.id, speaker.subset))
    rows = [";ID    |SEX| SUBSET           |MINUTES| NAME"]
    table = ["utterance\tsubset\tsamples\tsource"]
    totals: dict[str, list[float]] = {}
    for speaker in ordered:
        minutes = sum(samples for _, samples, _ in speaker.clips) / SAMPLE_RATE / 60
        rows.append(f"{speaker.id:<6} | {speaker.sex} | {speaker.subset:<16} | {minutes:5.2f} | {speaker.name}")
        table += [f"{utterance}\t{speaker.subset}\t{samples}\t{source}" for utterance, samples, source in speaker.clips]
        total = totals.setdefault(speaker.subset, [0, 0, 0.0])
        total[:] = total[0] + 1, total[1] + len(speaker.clips), total[2] + minutes
    program.write_lines(out / "SPEAKERS.TXT", rows)
    program.write_lines(out / "sources.tsv", table)
    for subset, (number, clips, minutes) in totals.items():
        print(f"{subset}: {clips:.0f} clips of {number:.0f} speakers, {minutes:.1f} min")


def make(out: Path, settings: dict[str, Any], write: Callable[[Path], list[Speaker]]) -> None:
    """Make a corpus that appears at `out` only when it is whole; nothing to do when it is there with these settings."""
    record = out / "corpus.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == settings:
        print(f"{out} is there already, made with these settings")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and was made otherwise; choose another folder, or delete it")
    partial = out.with_name(f".{out.name}.partial")
    with program.writing(out, partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tables(partial, write(partial))
        program.write_lines(partial / "corpus.json", [json.dumps(settings)])
        if out.exists():
            out.rmdir()
        partial.replace(out)
    print(f"{out}: done")
