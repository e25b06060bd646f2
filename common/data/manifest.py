"""Read and check file lists and labels, and hold millions of utterances in a few arrays.

A list is a `.tsv` file: the root folder in the first line, then one `path<TAB>samples` per utterance. Labels are a
`.ltr` file with one line per utterance in the same order. The lines stay where they were read, in one block of
bytes; an `Utterance` is made only when it is asked for.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError

TAB, LINE_FEED, CARRIAGE_RETURN, ZERO = b"\t\n\r0"
MAX_DIGITS = 15
MAKE_LIST = "make it with utils/generate_filelist.py"
MAKE_LABELS = "list and labels must be made together (utils/generate_filelist.py, then the labels)"


@dataclass(frozen=True)
class Utterance:
    """One line of a list; `where` names it for messages ("train.tsv:17")."""

    id: str
    source: Path
    num_samples: int
    text: str | None
    where: str


@dataclass(frozen=True)
class _Lines:
    """A text file as one block of bytes, with the offsets of its lines (no byte-order mark, no line ends)."""

    path: Path
    block: bytes
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> str:
        return self.block[self.starts[row] : self.stops[row]].decode()


class Manifest:
    """The utterances of a list, by position; cheap to select from and to share with forked workers."""

    def __init__(
        self,
        *,
        root: Path,
        paths: _Lines,
        num_samples: np.ndarray,
        texts: _Lines | None,
        rows: np.ndarray | None = None,
    ) -> None:
        """`paths` and `num_samples` have one entry per line of the file; `rows` are those in use."""
        self.name = paths.path.stem
        self.root = root
        self.has_text = texts is not None
        self._paths, self._texts, self._all_samples = paths, texts, num_samples
        self._rows = np.arange(len(paths)) if rows is None else rows
        self.num_samples = num_samples if rows is None else num_samples[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Utterance:
        row = int(self._rows[index])
        path = self._paths[row]
        return Utterance(
            id=os.path.splitext(path)[0],  # noqa: PTH122 - pathlib fails on names such as ".."
            source=self.root / path,
            num_samples=int(self._all_samples[row]),
            text=self.text(index),
            where=self.where(index),
        )

    def where(self, index: int) -> str:
        """File and line of an utterance, for messages."""
        return f"{self._paths.path}:{int(self._rows[index]) + 2}"

    def text_where(self, index: int) -> str:
        """File and line of its labels, for messages."""
        return f"{self._texts.path}:{int(self._rows[index]) + 1}" if self._texts else self.where(index)

    def text(self, index: int) -> str | None:
        """The label line of an utterance as it stands in the file; None without labels."""
        return self._texts[int(self._rows[index])] if self._texts else None

    def hours(self, sample_rate: int) -> float:
        """Hours of audio."""
        return float(self.num_samples.sum()) / sample_rate / 3600

    def select(self, indices: Sequence[int] | np.ndarray) -> Manifest:
        """The utterances at these positions (or of a boolean mask), in this order, sharing the text."""
        return Manifest(
            root=self.root,
            paths=self._paths,
            num_samples=self._all_samples,
            texts=self._texts,
            rows=self._rows[np.asarray(indices)],
        )


def read_manifest(tsv: Path, labels: Path | None = None) -> Manifest:
    """Read a list and, when given, its labels; DataError with file:line for anything malformed.

    A relative root is relative to the folder of the list.
    """
    tsv = Path(tsv)
    lines = _read_lines(tsv, MAKE_LIST)
    if not len(lines):
        raise DataError(f"{tsv}: the file list is empty; {MAKE_LIST}")
    root = tsv.parent / lines[0].strip()
    if "\t" in lines[0]:
        raise DataError(f"{tsv}:1: the first line must be the root folder, not {_shown(lines[0])}; {MAKE_LIST}")
    if not root.is_dir():
        raise DataError(f"{tsv}:1: the root folder {root} does not exist; correct this line or {MAKE_LIST}")
    if len(lines) == 1:
        raise DataError(
            f"{tsv}:2: the list has a root folder and no utterances; check the folder and the extension "
            f"that were searched, and {MAKE_LIST}"
        )
    paths, num_samples = _split(lines)
    return Manifest(
        root=root,
        paths=paths,
        num_samples=num_samples,
        texts=None if labels is None else _read_labels(Path(labels), tsv, len(paths)),
    )


def _read_lines(path: Path, remedy: str) -> _Lines:
    """The lines of a UTF-8 file without byte-order mark, line ends and empty lines at the end."""
    try:
        block = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    _check_text(path, block)
    codes = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero(codes == LINE_FEED)
    first = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
    starts = np.concatenate(([first], breaks + 1))
    stops = np.concatenate((breaks, [len(block)]))
    if len(block):
        stops = stops - ((stops > starts) & (codes[stops - 1] == CARRIAGE_RETURN))
    filled = np.flatnonzero(stops > starts)
    number = int(filled[-1]) + 1 if len(filled) else 0
    return _Lines(path, block, starts[:number], stops[:number])


def _check_text(path: Path, block: bytes) -> None:
    """Refuse bytes that are no text, so that every later decoding succeeds."""
    try:
        block.decode("utf-8")
        bad = block.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = block.count(b"\n", 0, bad) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8 text and rename such files")


def _split(lines: _Lines) -> tuple[_Lines, np.ndarray]:
    """Paths and numbers of samples of the lines below the root; DataError for the first malformed one."""
    starts, stops = lines.starts[1:], lines.stops[1:]
    codes = np.frombuffer(lines.block, np.uint8)
    tabs = np.flatnonzero(codes == TAB)
    first = np.searchsorted(tabs, starts)
    one_tab = np.searchsorted(tabs, stops) - first == 1
    tab = np.append(tabs, 0)[np.minimum(first, len(tabs))]
    num_samples, numeric = _parse_numbers(codes, np.where(one_tab, tab + 1, stops), stops)
    wrong = np.flatnonzero(~(one_tab & (tab > starts) & numeric & (num_samples > 0)))
    if len(wrong):
        row = int(wrong[0]) + 1
        raise DataError(
            f"{lines.path}:{row + 1}: expected PATH<TAB>SAMPLES with at least 1 sample, found "
            f"{_shown(lines[row])}; correct or remove the line, or {MAKE_LIST}"
        )
    return _Lines(lines.path, lines.block, starts, tab), num_samples


def _parse_numbers(codes: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decimal numbers at these places, digit by digit for all lines at once, and whether each is one."""
    width = stops - starts
    good = (width >= 1) & (width <= MAX_DIGITS)
    numbers = np.zeros(len(starts), np.int64)
    for place in range(int(width[good].max(initial=0))):
        inside = good & (place < width)
        digit = codes[np.where(inside, starts + place, 0)] - np.uint8(ZERO)  # below "0" wraps to above 9
        good &= ~inside | (digit <= 9)
        numbers = np.where(inside, numbers * 10 + digit, numbers)
    return numbers, good


def _read_labels(path: Path, tsv: Path, number: int) -> _Lines:
    """One label line per utterance; lines may be empty (silence), also at the end."""
    lines = _read_lines(path, MAKE_LABELS)
    found = len(lines)
    if found < number:  # empty lines at the end were taken off
        found = min(number, lines.block.count(b"\n") + (not lines.block.endswith(b"\n") and bool(lines.block)))
    if found != number:
        raise DataError(
            f"{path}: {found} lines of labels for {number} utterances in {tsv}; {MAKE_LABELS}: make both anew"
        )
    missing = np.full(number - len(lines), len(lines.block))
    return _Lines(path, lines.block, np.concatenate((lines.starts, missing)), np.concatenate((lines.stops, missing)))


def _shown(line: str) -> str:
    """A line for a message: quoted, not too long."""
    return repr(line if len(line) <= 80 else f"{line[:77]}...")
