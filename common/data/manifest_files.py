"""Reads the files of lists (.tsv, JSON lines) and of labels into a few arrays, checking every line.

Stages: text_chunks() -> parse a chunk of lines -> columns. A file is read in chunks of a few MiB, so that the
transient arrays of parsing (about 20 times a chunk) stay small beside what is kept, whatever the size of the list.
Of every line only what is needed later is kept: the path end to end with all other paths, and numbers.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, shown
from common.labels import spell

CHUNK = 1 << 22  # bytes
TAB, LINE_FEED, ZERO = b"\t\n0"
MAX_DIGITS = 15
SMALL_BLOCK = 1 << 32  # bytes, which offsets of 4 bytes can address
LONGEST = 1e9  # seconds, of one recording
NUMBERS = (int, float)  # and not bool
MAKE_LIST = "make it with utils/generate_filelist.py"
MAKE_LABELS = "list and labels must be made together (utils/generate_filelist.py, then the labels)"
MAKE_JSON = "a manifest has one JSON object per line with audio_filepath and duration; make it again"
SHARD_PATH = re.compile(r"^(.+\.tar):([0-9]+):([0-9]+):(.+)$", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings in UTF-8, end to end in one block: string i is bytes offsets[i] to offsets[i + 1] of it."""

    block: bytearray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self.block[int(self.offsets[row]) : int(self.offsets[row + 1])].decode()

    @property
    def nbytes(self) -> int:
        """Bytes that the strings and their offsets take."""
        return len(self.block) + self.offsets.nbytes


@dataclass(frozen=True, eq=False)
class Columns:
    """What the lines of one list say, by row, but for the lengths; a column that no line has is None.

    `starts` are seconds into the recording (NaN: the whole recording), `copies` count the earlier entries of the same
    file, `speakers` are numbers (-1: not given). `textless` is the first entry without a text, of those that were asked
    for one.
    """

    path: Path
    first_line: int
    root: Path
    paths: Strings
    sample_rate: int = 0
    tolerance: int = 0
    starts: np.ndarray | None = None
    copies: np.ndarray | None = None
    speakers: np.ndarray | None = None
    texts: Strings | None = None
    text_path: Path | None = None  # the file of labels; None: the texts are words and stand in the list itself
    textless: int | None = None

    def where(self, row: int) -> str:
        """File and line of an entry, for messages."""
        return f"{self.path}:{row + self.first_line}"

    def text_where(self, row: int) -> str:
        """File and line of its labels, for messages."""
        return f"{self.text_path}:{row + 1}" if self.text_path else self.where(row)

    def text(self, row: int) -> str | None:
        """The labels of an entry, characters with `|` after each word; None without labels."""
        if self.texts is None:
            return None
        return self.texts[row] if self.text_path else spell(self.texts[row])

    def same_speaker(self) -> np.ndarray:
        """Whether every entry but the last has the speaker of the next one: bool [rows - 1].

        Where neither entry names its speaker, one folder (of the file, or of the key in a shard) is one speaker.
        """
        same = np.fromiter((one == other for one, other in pairwise(self._folders())), bool, len(self.paths) - 1)
        if self.speakers is None:
            return same
        first, second = self.speakers[:-1], self.speakers[1:]
        return (first == second) & ((first >= 0) | same)

    def _folders(self) -> Iterator[str]:
        rows = 1 << 16  # at a time, so that few offsets are Python numbers at once
        for first in range(0, len(self.paths), rows):
            for start, stop in pairwise(self.paths.offsets[first : first + rows + 1].tolist()):
                path = self.paths.block[start:stop].decode()
                shard = SHARD_PATH.match(path) if ".tar:" in path else None
                yield (shard[4] if shard else path).rpartition("/")[0]

    @property
    def nbytes(self) -> int:
        """Bytes that all columns take."""
        columns = (getattr(self, field.name) for field in fields(self))
        return sum(column.nbytes for column in columns if isinstance(column, np.ndarray | Strings))


class _StringsBuilder:
    """Grows a block in place; a list of pieces that are joined in the end would be held twice."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._widths: list[np.ndarray] = []

    def add(self, text: bytes, widths: np.ndarray) -> None:
        """Append strings that lie end to end in `text`."""
        self._block += text
        self._widths.append(widths.astype(np.int32 if len(text) < 2**31 else np.int64))

    def add_strings(self, strings: Sequence[str]) -> None:
        """Append strings; UnicodeEncodeError for what is no text (half of a surrogate pair)."""
        encoded = [string.encode() for string in strings]
        self.add(b"".join(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded)))

    def finish(self, number: int | None = None) -> Strings:
        """All strings, or the first `number` of them when the others are empty."""
        widths = np.concatenate(self._widths or [np.zeros(0, np.int32)])[:number]
        self._widths.clear()
        offsets = np.zeros(len(widths) + 1, np.uint32 if len(self._block) < SMALL_BLOCK else np.uint64)
        np.cumsum(widths, out=offsets[1:], dtype=offsets.dtype)
        return Strings(self._block, offsets)

    def counts(self) -> tuple[int, int]:
        """The number of strings without the empty ones at the end, and the number of all."""
        filled = total = 0
        for widths in self._widths:
            last = np.flatnonzero(widths)
            filled = total + int(last[-1]) + 1 if len(last) else filled
            total += len(widths)
        return filled, total


def text_chunks(path: Path, remedy: str) -> Iterator[bytes]:
    """The lines of a UTF-8 file, many at a time: each ends with a line feed; no byte-order mark, no carriage returns.

    Raises DataError when the file cannot be read, or naming the line for bytes that are no text.
    """
    lines = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                if not chunk.endswith(b"\n"):
                    chunk += file.readline()
                if not chunk.endswith(b"\n"):
                    chunk += b"\n"
                _check_text(path, chunk, lines)
                if lines == 0:
                    chunk = chunk.removeprefix(codecs.BOM_UTF8)
                lines += chunk.count(b"\n")
                yield chunk.replace(b"\r\n", b"\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None


def _check_text(path: Path, chunk: bytes, lines: int) -> None:
    """Refuse bytes that are no text, so that every later decoding succeeds; `lines` stand before the chunk."""
    try:
        chunk.decode("utf-8")
        bad = chunk.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = lines + chunk.count(b"\n", 0, bad) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8 text and rename such files")


def _without_blank_end(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same lines without the empty ones at the end of the file."""
    blank = b""
    for chunk in chunks:
        text = chunk.rstrip(b"\n")
        if text:
            yield blank + text + b"\n"
            blank = b""
        blank += chunk[len(text) + bool(text) :]


def read_tsv(tsv: Path) -> tuple[Columns, np.ndarray]:
    """A file list and its numbers of samples: the root folder in line 1, then `path<TAB>samples`."""
    chunks = _without_blank_end(text_chunks(tsv, MAKE_LIST))
    first, _, rest = next(chunks, b"").partition(b"\n")
    if not (first or rest):
        raise DataError(f"{tsv}: the file list is empty; {MAKE_LIST}")
    line = first.decode()
    root = tsv.parent / line.strip()
    if "\t" in line:
        raise DataError(f"{tsv}:1: the first line must be the root folder, not {_shown(line)}; {MAKE_LIST}")
    if not root.is_dir():
        raise DataError(f"{tsv}:1: the root folder {root} does not exist; correct this line or {MAKE_LIST}")
    paths = _StringsBuilder()
    lengths: list[np.ndarray] = []
    row = 0
    for chunk in chain([rest] if rest else [], chunks):
        text, widths, num_samples = _parse_tsv(tsv, chunk, row)
        paths.add(text, widths)
        lengths.append(_narrow(num_samples))
        row += len(widths)
    if not row:
        raise DataError(
            f"{tsv}:2: the list has a root folder and no utterances; check the folder and the extension "
            f"that were searched, and {MAKE_LIST}"
        )
    return Columns(tsv, 2, root, paths.finish()), np.concatenate(lengths)


def _parse_tsv(tsv: Path, chunk: bytes, row: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Paths end to end, their widths, and numbers of samples; DataError for the first malformed line."""
    codes = np.frombuffer(chunk, np.uint8)
    stops = np.flatnonzero(codes == LINE_FEED)
    starts = np.concatenate(([0], stops[:-1] + 1))
    tabs = np.flatnonzero(codes == TAB)
    first = np.searchsorted(tabs, starts)
    one_tab = np.searchsorted(tabs, stops) - first == 1
    tab = np.append(tabs, 0)[np.minimum(first, len(tabs))]
    num_samples, numeric = _parse_numbers(codes, np.where(one_tab, tab + 1, stops), stops)
    wrong = np.flatnonzero(~(one_tab & (tab > starts) & numeric & (num_samples > 0)))
    if len(wrong):
        place = int(wrong[0])
        raise DataError(
            f"{tsv}:{row + place + 2}: expected PATH<TAB>SAMPLES with at least 1 sample, found "
            f"{_shown(chunk[starts[place] : stops[place]].decode())}; correct or remove the line, or {MAKE_LIST}"
        )
    edges = np.zeros(len(codes), np.int8)
    edges[starts], edges[tab] = 1, -1
    in_path = np.add.accumulate(edges, dtype=np.int8).view(bool)
    return codes[in_path].tobytes(), tab - starts, num_samples


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


def read_labels(path: Path, list_path: Path, number: int) -> Strings:
    """One label line per utterance; lines may be empty (silence), also at the end."""
    lines = _StringsBuilder()
    for chunk in text_chunks(path, MAKE_LABELS):
        stops = np.flatnonzero(np.frombuffer(chunk, np.uint8) == LINE_FEED)
        lines.add(chunk.replace(b"\n", b""), np.diff(stops, prepend=-1) - 1)
    filled, total = lines.counts()
    found = max(filled, min(number, total))  # empty lines at the end count where they are needed
    if found != number:
        raise DataError(
            f"{path}: {found} lines of labels for {number} utterances in {list_path}; {MAKE_LABELS}: make both anew"
        )
    return lines.finish(number)


def read_json(path: Path, *, sample_rate: int, text: bool) -> tuple[Columns, np.ndarray]:
    """A JSON-lines manifest and its numbers of samples at `sample_rate`; `text`: keep the texts, where there are any.

    Fields: audio_filepath (a relative one is relative to the manifest's folder), duration in seconds, and where given
    offset in seconds, text and speaker; others are ignored.
    """
    reader = _JsonReader(path, sample_rate, text)
    for chunk in _without_blank_end(text_chunks(path, MAKE_JSON)):
        reader.read(chunk.decode().removesuffix("\n").split("\n"))
    return reader.finish()


class _JsonReader:
    """Gathers the columns of a JSON manifest, chunk by chunk."""

    def __init__(self, path: Path, sample_rate: int, text: bool) -> None:
        self._path, self._sample_rate, self._keep_text = path, sample_rate, text
        self._row = 0
        self._paths, self._texts = _StringsBuilder(), _StringsBuilder()
        self._hashes: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._speakers: list[np.ndarray] = []
        self._speaker_numbers: dict[str, int] = {}
        self._textless: int | None = None
        self._any_text = False

    def read(self, lines: list[str]) -> None:
        """Take the next lines of the file; DataError for the first that is no entry."""
        entries = [_parse_entry(line, self._path, number) for number, line in enumerate(lines, self._row + 1)]
        paths, durations, starts, texts, speakers = zip(*entries, strict=True)
        self._paths.add_strings(paths)
        self._hashes.append(np.fromiter(map(hash, paths), np.int64, len(paths)))
        num_samples = np.rint(np.array(durations, np.float64) * self._sample_rate).astype(np.int64)
        if not num_samples.all():
            row = int(np.argmin(num_samples))
            self._fail(row, f"duration {durations[row]} is less than one sample at {self._sample_rate} Hz")
        self._lengths.append(_narrow(num_samples))
        self._starts.append(np.array(starts, np.float64))  # None becomes NaN
        numbers = self._speaker_numbers
        self._speakers.append(
            np.array([-1 if name is None else numbers.setdefault(name, len(numbers)) for name in speakers], np.int32)
        )
        if self._keep_text:
            self._read_texts(texts)
        self._row += len(lines)

    def _read_texts(self, texts: tuple[str | None, ...]) -> None:
        for row, text in enumerate(texts):
            if text is None:
                self._textless = self._row + row if self._textless is None else self._textless
            elif "|" in text:
                self._fail(row, f"text {shown(text)} has a '|', which marks the end of a word in labels")
        self._any_text = self._any_text or any(text is not None for text in texts)
        self._texts.add_strings([text or "" for text in texts])

    def _fail(self, row: int, why: str) -> None:
        raise DataError(f"{self._path}:{self._row + row + 1}: {why}; correct or remove the line")

    def finish(self) -> tuple[Columns, np.ndarray]:
        """The columns, and the numbers of samples."""
        if not self._row:
            raise DataError(f"{self._path}: the manifest is empty; {MAKE_JSON}")
        paths = self._paths.finish()
        starts, speakers = np.concatenate(self._starts), np.concatenate(self._speakers)
        columns = Columns(
            path=self._path,
            first_line=1,
            root=self._path.parent,
            paths=paths,
            sample_rate=self._sample_rate,
            tolerance=self._sample_rate // 20,
            starts=None if np.isnan(starts).all() else starts,
            copies=_count_copies(paths, np.concatenate(self._hashes)),
            speakers=speakers if self._speaker_numbers else None,
            texts=self._texts.finish() if self._any_text else None,
            textless=self._textless,
        )
        return columns, np.concatenate(self._lengths)


_Entry = tuple[str, float, float | None, str | None, str | None]


def _parse_entry(line: str, path: Path, number: int) -> _Entry:
    """Path, duration, offset, text and speaker of a line; DataError for what is no entry."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{path}:{number}: not JSON, {_shown(line)}; {MAKE_JSON}") from None
    fault = _fault(entry)
    if fault:
        raise DataError(f"{path}:{number}: {fault}; correct or remove the line")
    speaker = entry.get("speaker")
    return (
        entry["audio_filepath"],
        entry["duration"],
        entry.get("offset"),
        entry.get("text"),
        None if speaker is None else str(speaker),
    )


def _fault(entry: Any) -> str:  # noqa: ANN401 - whatever stands in the file
    """What is wrong with an entry; "" when nothing is."""
    if type(entry) is not dict:
        return f"{shown(entry)} is not a JSON object with audio_filepath and duration"
    path: Any = entry.get("audio_filepath")
    duration: Any = entry.get("duration")
    offset: Any = entry.get("offset")
    text: Any = entry.get("text")
    if not (type(path) is str and path):
        return "audio_filepath is missing" if path is None else f"audio_filepath {shown(path)} is not a path"
    if not (type(duration) in NUMBERS and 0 < duration <= LONGEST):
        why = f"{shown(duration)} is not a number of seconds above 0"
        return "duration is missing" if duration is None else f"duration {why}"
    if not (offset is None or (type(offset) in NUMBERS and 0 <= offset <= LONGEST)):
        return f"offset {shown(offset)} is not a number of seconds, 0 or more"
    if not (text is None or type(text) is str):
        return f"text {shown(text)} is not a string"
    if not isinstance(entry.get("speaker"), str | int | None):
        return f"speaker {shown(entry['speaker'])} is neither a string nor a whole number"
    if "\0" in path or not (_is_text(path) and (text is None or _is_text(text))):
        return "audio_filepath or text has a character that no file name or text can have"
    return ""


def _is_text(string: str) -> bool:
    """Whether a string can be written as UTF-8; half of a surrogate pair cannot."""
    if string.isascii():
        return True
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count_copies(paths: Strings, hashes: np.ndarray) -> np.ndarray | None:
    """How many earlier entries have the same path, for every entry; None when all paths differ.

    Only paths whose hash comes more than once are compared: a table of all paths would be larger than the list.
    """
    order = np.argsort(hashes, kind="stable")
    again = np.diff(hashes[order]) == 0
    if not again.any():
        return None
    candidates = np.sort(order[np.append(again, False) | np.insert(again, 0, False)])
    copies = np.zeros(len(paths), np.int32)
    seen: dict[str, int] = {}
    for row in map(int, candidates):
        path = paths[row]
        copies[row] = seen[path] = seen.get(path, -1) + 1
    return copies if copies.any() else None


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """As int32 where all fit."""
    return numbers.astype(np.int32) if numbers.max(initial=0) < 2**31 else numbers


def _shown(line: str) -> str:
    """A line for a message: quoted, not too long."""
    return repr(line if len(line) <= 80 else f"{line[:77]}...")
