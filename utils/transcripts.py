"""Transcripts in LibriSpeech's layout (.trans.txt beside the audio) -> labels in the order of a file list."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.errors import DataError
from common.labels import spell
from utils import program


@dataclass(frozen=True)
class Line:
    """One line of a transcript file."""

    words: tuple[str, ...]
    where: str


@lru_cache(maxsize=4)  # lists go folder by folder
def _read_folder(folder: Path) -> dict[str, list[Line]]:
    """All different lines of the transcript files in a folder, by clip."""
    lines: dict[str, list[Line]] = {}
    for path in sorted(folder.glob("*.trans.txt")):
        try:
            with path.open(encoding="utf-8-sig") as file:
                rows = file.read().split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text; convert it") from error
        for number, row in enumerate(rows, start=1):
            clip, *words = row.split() or [""]
            same = lines.setdefault(clip, [])
            if clip and all(line.words != tuple(words) for line in same):
                same.append(Line(tuple(words), f"{path}:{number}"))
    return lines


def _find(audio: Path, where: str) -> Line:
    """The one transcript line of an audio file."""
    found = _read_folder(audio.parent).get(audio.stem, [])
    if not found:
        raise DataError(
            f"{where}: no transcript line for {audio.stem} in {audio.parent}/*.trans.txt; "
            "add it, or take the clip out of the list"
        )
    if len(found) > 1:
        raise DataError(f"{found[1].where}: other words for {audio.stem} than {found[0].where}; delete one line")
    if not found[0].words:
        raise DataError(f"{found[0].where}: no words for {audio.stem}; add them, or take the clip out of the list")
    if any("|" in word for word in found[0].words):
        raise DataError(f"{found[0].where}: '|' marks the end of a word in labels; remove it from the text")
    return found[0]


def words_of(root: Path, paths: Iterable[str], tsv: Path) -> Iterator[tuple[str, ...]]:
    """The words of each clip of a list; the first fault is raised at the end, with the number of others."""
    faults = []
    for number, path in enumerate(program.bar(list(paths), unit="clip", desc="labels"), start=2):
        try:
            yield _find(root / path, f"{tsv}:{number}").words
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(faults[0] + (f" (and {len(faults) - 1} more such faults)" if len(faults) > 1 else ""))


def write_labels(root: Path, paths: Iterable[str], tsv: Path, output: Path) -> int:
    """Write OUTPUT.ltr and OUTPUT.wrd in the order of the list; returns the number of words."""
    words = list(words_of(root, paths, tsv))
    program.write_lines(output.with_name(output.name + ".ltr"), (spell(" ".join(line)) for line in words))
    program.write_lines(output.with_name(output.name + ".wrd"), map(" ".join, words))
    return sum(map(len, words))
