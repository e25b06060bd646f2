"""What can be wrong with the utterances of a list: every check of one utterance, and all of a list in processes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice, pairwise

import numpy as np

from common.data.audio import AudioInfo, Clip, read_audio, read_info
from common.data.manifest import Manifest, Utterance
from common.errors import DataError, UserError
from utils import program

SHOWN = 10  # offenders of a kind that are named
SILENCE = 10 ** (-80 / 20)  # half the distance of the extremes: covers silence and constants
FULL_SCALE = 0.98  # what mu-law, the coarsest of the usual codes, reaches
FLAT_RUN = 3  # equal samples in a row at full scale; fewer can be the tip of a wave
BLOCK = 1 << 24  # samples decoded at a time: a recording of hours must not fill the memory
TASK = 64  # utterances per task of a process
AHEAD = 4  # tasks waiting per process
MOST_SYMBOLS = 1000  # unknown symbols counted apart: words taken for letters would be millions


@dataclass(frozen=True)
class Kind:
    """A kind of finding: an error would stop or spoil a run, a remark may be intended."""

    name: str
    is_error: bool
    meaning: str


KINDS = (
    Kind("missing", True, "no such file"),
    Kind("unreadable", True, "no audio that can be read"),
    Kind("damaged", True, "truncated, or damaged inside"),
    Kind("nan", True, "NaN or infinite samples"),
    Kind("length", True, "has another length than the list says"),
    Kind("short", True, "too short for one frame of the model"),
    Kind("silent", True, "silent or constant, and not labelled as silence"),
    Kind("unknown", True, "symbols that are not in the dictionary"),
    Kind("infeasible", True, "more labels than frames: CTC cannot align them"),
    Kind("shared", True, "the same audio in an earlier list"),
    Kind("repeated", False, "the same audio earlier in the list"),
    Kind("clipped", False, "samples at full scale in runs"),
    Kind("empty", False, "no transcript"),
)
NUMBERS = {kind.name: number for number, kind in enumerate(KINDS)}
# What the reader says of files that it refuses, where the stage alone does not tell the kind.
TOLD_BY = {
    "not audio": "",
    "NaN": "nan",
    "truncated": "damaged",
    "zero samples": "short",
    "of a recording of": "length",
    "the part has no sample": "length",
}
REMARKS = tuple(kind.name for kind in KINDS if not kind.is_error)


@dataclass(frozen=True)
class Settings:
    """What the checks need to know about the run that is planned."""

    sample_rate: int = 16000
    receptive_field: int = 400  # samples of the first frame
    frame_stride: int = 320  # samples from frame to frame
    decode: bool = True
    max_clipped: float = 0.001
    symbols: frozenset[str] | None = None  # those of the dictionary; None: not checked

    def num_frames(self, num_samples: int) -> int:
        """Frames of a waveform: convolutions without padding act like one with this kernel and stride."""
        return (num_samples - self.receptive_field) // self.frame_stride + 1


@dataclass(frozen=True)
class Source:
    """A kind of file: rate and channels in words, the container, and whether reading converts it."""

    kind: str
    container: str
    is_converted: bool


@dataclass(frozen=True)
class Offender:
    """An utterance with a fault, for people: file and line, path, and what is wrong."""

    where: str
    path: str
    detail: str


@dataclass(eq=False)
class Checked:
    """What was found in N utterances: in arrays what is needed of all of them, in words the first of every kind.

    faults (N,): a bit per kind; files, audio, folders (N,): what identifies the piece of a file, its samples, and its
    folder (0: not known); sources: utterances and listed samples of every kind of file.
    """

    faults: np.ndarray
    files: np.ndarray
    audio: np.ndarray
    folders: np.ndarray
    sources: dict[Source, tuple[int, int]] = field(default_factory=dict)
    first: dict[str, list[Offender]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)

    @classmethod
    def nothing(cls, number: int) -> Checked:
        """So many utterances, nothing found yet."""
        files, audio, folders = np.zeros((3, number), np.uint64)
        return cls(np.zeros(number, np.uint32), files, audio, folders)

    def add(self, index: int, kind: str, offender: Offender) -> None:
        """Note a fault; only the first of a kind are kept in words."""
        self.faults[index] |= np.uint32(1 << NUMBERS[kind])
        first = self.first.setdefault(kind, [])
        if len(first) < SHOWN:
            first.append(offender)

    def put(self, start: int, part: Checked) -> None:
        """Take in what was found in the utterances from `start` on; parts come in order."""
        stop = start + len(part.faults)
        for name in ("faults", "files", "audio", "folders"):
            getattr(self, name)[start:stop] = getattr(part, name)
        for source, (number, samples) in part.sources.items():
            before = self.sources.get(source, (0, 0))
            self.sources[source] = (before[0] + number, before[1] + samples)
        for kind, offenders in part.first.items():
            first = self.first.setdefault(kind, [])
            first += offenders[: SHOWN - len(first)]
        self.unknown += part.unknown
        if len(self.unknown) > 2 * MOST_SYMBOLS:
            self.unknown = Counter(dict(self.unknown.most_common(MOST_SYMBOLS)))

    def has(self, kind: str) -> np.ndarray:
        """Which utterances have this fault (N,) bool."""
        return (self.faults >> np.uint32(NUMBERS[kind])) & np.uint32(1) == 1

    @property
    def has_error(self) -> np.ndarray:
        """Which utterances would stop or spoil a run (N,) bool."""
        return self.faults & np.uint32(sum(1 << n for n, kind in enumerate(KINDS) if kind.is_error)) != 0


# ---- One utterance --------------------------------------------------------------------------------------------------


class Checker:
    """The checks of single utterances of a list."""

    def __init__(self, manifest: Manifest, settings: Settings) -> None:
        self.manifest, self.settings = manifest, settings

    def check(self, start: int, stop: int) -> Checked:
        """Check the utterances from `start` to before `stop`."""
        found = Checked.nothing(stop - start)
        for index in range(stop - start):
            utterance = self.manifest[start + index]
            for kind, detail in self._faults(utterance, index, found):
                where = self.manifest.text_where(start + index) if kind in ("unknown", "empty") else utterance.where
                found.add(index, kind, Offender(where, _name(utterance.clip), detail))
        return found

    def _faults(self, utterance: Utterance, index: int, found: Checked) -> Iterator[tuple[str, str]]:
        """Kind and details of every fault; what identifies the utterance goes into `found`."""
        yield from self._faults_of_audio(utterance, index, found)
        if utterance.text is not None:
            yield from self._faults_of_labels(utterance.text.split(), utterance.num_samples, found.unknown)

    def _faults_of_audio(self, utterance: Utterance, index: int, found: Checked) -> Iterator[tuple[str, str]]:
        clip = utterance.clip
        try:
            state = clip.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            yield "missing", "no such file"
            return
        except (OSError, ValueError) as error:
            yield "unreadable", str(error)
            return
        found.files[index] = _digest(f"{state.st_dev} {state.st_ino} {clip.span} {clip.start} {clip.seconds}".encode())
        found.folders[index] = _digest(os.fsencode(clip.path.parent)) if clip.span is None else 0
        try:
            info = read_info(clip)
        except DataError as error:
            yield _told(error, clip, otherwise="unreadable")
            return
        self._count_source(info, utterance.num_samples, found.sources)
        length_faults = dict(self._faults_of_length(info, utterance))
        yield from length_faults.items()
        if self.settings.decode and "short" not in length_faults:  # nobody can hear what is in a few samples
            yield from self._faults_of_samples(info, utterance, index, found)

    def _count_source(self, info: AudioInfo, num_samples: int, sources: dict[Source, tuple[int, int]]) -> None:
        converted = info.channels != 1 or info.sample_rate != self.settings.sample_rate
        source = Source(info.kind, f"{info.container} {info.subtype}", converted)
        number, samples = sources.get(source, (0, 0))
        sources[source] = (number + 1, samples + num_samples)

    def _faults_of_length(self, info: AudioInfo, utterance: Utterance) -> Iterator[tuple[str, str]]:
        """Length by the header against that of the list, as training sees it."""
        listed, true = utterance.num_samples, info.num_samples(self.settings.sample_rate)
        if abs(true - listed) > utterance.tolerance:
            yield "length", f"{true} samples, listed {listed}"
        if min(true, listed) < self.settings.receptive_field:
            yield "short", f"{min(true, listed)} samples, one frame needs {self.settings.receptive_field}"

    def _faults_of_samples(
        self, info: AudioInfo, utterance: Utterance, index: int, found: Checked
    ) -> Iterator[tuple[str, str]]:
        try:
            level = measure(_blocks(info, utterance.clip))
        except DataError as error:
            yield _told(error, utterance.clip, otherwise="damaged")
            return
        if level.half_range < SILENCE:
            if utterance.text is None or utterance.text.strip():  # an empty line says: this is silence
                yield "silent", f"constant at {level.high:.4f}" if abs(level.high) > SILENCE else "silence"
            return
        found.audio[index] = level.digest
        if level.clipped > self.settings.max_clipped:
            yield "clipped", f"{100 * level.clipped:.2f} % of the samples"

    def _faults_of_labels(
        self, labels: list[str], num_samples: int, unknown: Counter[str]
    ) -> Iterator[tuple[str, str]]:
        if not labels:
            yield "empty", "empty line"
        known = self.settings.symbols
        strange = [] if known is None else [symbol for symbol in labels if symbol not in known]
        if strange:
            unknown.update(strange)
            yield "unknown", ", ".join(shown_symbol(symbol) for symbol in islice(dict.fromkeys(strange), 3))
        frames = max(self.settings.num_frames(num_samples), 0)
        needed = len(labels) + sum(first == second for first, second in pairwise(labels))
        if needed > frames > 0:  # no frame at all is a fault of the audio
            yield "infeasible", f"{frames} frames, {len(labels)} labels, {needed - len(labels)} repeats"


@dataclass(frozen=True)
class Level:
    """Extremes of a waveform, the share of samples that are clipped, and what identifies its samples."""

    low: float
    high: float
    clipped: float
    digest: int

    @property
    def half_range(self) -> float:
        """Half the distance of the extremes."""
        return (self.high - self.low) / 2


def measure(blocks: Iterable[np.ndarray]) -> Level:
    """The level of a waveform that comes in blocks (S,) float32."""
    low, high, clipped, number = np.inf, -np.inf, 0, 0
    content = blake2b(digest_size=8)
    for block in blocks:
        low, high, number = min(low, float(block.min())), max(high, float(block.max())), number + len(block)
        if max(high, -low) >= FULL_SCALE:
            clipped += clipped_samples(block)
        content.update(np.ascontiguousarray(block).data)
    return Level(low, high, clipped / number, int.from_bytes(content.digest(), "little"))


def clipped_samples(wave: np.ndarray) -> int:
    """Samples of (S,) in runs of at least FLAT_RUN equal ones at full scale: floats above 1 that move are no runs."""
    flat = (wave[1:] == wave[:-1]) & (np.abs(wave[1:]) >= FULL_SCALE)
    change = np.diff(flat.astype(np.int8), prepend=0, append=0)
    lengths = np.flatnonzero(change < 0) - np.flatnonzero(change > 0) + 1
    return int(lengths[lengths >= FLAT_RUN].sum())


def shown_symbol(symbol: str) -> str:
    """A symbol with its code points: look-alikes and invisible characters must be told apart."""
    return f"{symbol[:8]!r} ({' '.join(f'U+{ord(character):04X}' for character in symbol[:8])})"


def _blocks(info: AudioInfo, clip: Clip) -> Iterator[np.ndarray]:
    """The clip, mixed down, at the rate of the file: resampling would hide what is clipped, and take its time."""
    rate, number = info.sample_rate, info.num_frames
    if number <= BLOCK:
        yield read_audio(clip, sample_rate=rate)
        return
    for start in range(0, number, BLOCK):
        yield read_audio(clip, sample_rate=rate, start=start, frames=min(BLOCK, number - start))


def _told(error: UserError, clip: Clip, *, otherwise: str) -> tuple[str, str]:
    """Kind and details of an error of the reader; the path before it and the advice behind it are left out."""
    reason = str(error).removeprefix(str(clip.path)).partition(": ")[2].partition(";")[0]
    kinds = (kind for phrase, kind in TOLD_BY.items() if phrase in reason)
    return next(kinds, "") or otherwise, reason


def _name(clip: Clip) -> str:
    """Where the audio is, for people."""
    piece = "" if clip.start is None else f" from {clip.start:g} s"
    return f"{clip.path}" + (f" byte {clip.span[0]}" if clip.span else "") + piece


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


# ---- All utterances of a list ---------------------------------------------------------------------------------------

_checker: Checker | None = None  # the one of a worker process


def check_list(manifest: Manifest, settings: Settings, workers: int) -> Checked:
    """Check every utterance of a list with so many processes; the result does not depend on their number."""
    found = Checked.nothing(len(manifest))
    size = min(TASK, max(1, len(manifest) // (16 * workers)))  # small enough that all have work until the end
    tasks = [(start, min(start + size, len(manifest))) for start in range(0, len(manifest), size)]
    checker, workers = Checker(manifest, settings), min(workers, len(tasks))
    parts = _in_processes(checker, tasks, workers) if workers > 1 else (checker.check(*task) for task in tasks)
    with (
        closing(parts),  # whatever ends the loop ends the processes
        program.bar(total=len(manifest), unit="file", desc=manifest.name) as bar,
    ):
        for (start, stop), part in zip(tasks, parts, strict=True):
            found.put(start, part)
            bar.update(stop - start)
    return found


def _in_processes(checker: Checker, tasks: list[tuple[int, int]], workers: int) -> Generator[Checked]:
    """The results of the tasks in order, a few tasks ahead; an interruption ends the processes at once."""
    # Forked processes share the arrays of the list; elsewhere than on Linux forking is unsafe, and they are sent.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(checker,)) as pool:
        done = False
        try:
            waiting: deque[Future[Checked]] = deque()
            for task in tasks:
                waiting.append(pool.submit(_check, task))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            done = True
        except BrokenProcessPool:
            raise DataError(
                f"--workers {workers}: a process was ended while it checked {checker.manifest.name}; if memory ran "
                "out, give fewer"
            ) from None
        finally:
            if not done:  # an error, Ctrl-C, or nobody wants the rest: the pool would wait for what it has begun
                for process in multiprocessing.active_children():
                    process.terminate()


def _start(checker: Checker) -> None:
    """Begin a worker process: it leaves Ctrl-C to the main process, which ends it, and does not outlive that."""
    global _checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _checker = checker


def _end_with_parent() -> None:
    """Wait for the end of the main process, which may have been killed, and end."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _check(task: tuple[int, int]) -> Checked:
    if _checker is None:
        raise RuntimeError("the worker process has not been started with _start")
    return _checker.check(*task)


# ---- Between utterances ---------------------------------------------------------------------------------------------


def find_duplicates(manifests: list[Manifest], found: list[Checked]) -> None:
    """Add the utterances whose file, or else whose samples, came before: in an earlier list, or in their own."""
    starts = np.cumsum([0, *(len(manifest) for manifest in manifests)])
    done = np.zeros(starts[-1], bool)
    for what, keys in (
        ("file", np.concatenate([part.files for part in found])),
        ("audio", np.concatenate([part.audio for part in found])),
    ):
        first = first_places(keys)
        later = np.flatnonzero((first < np.arange(len(keys))) & (keys != 0) & ~done)
        done[later] = True
        own = np.searchsorted(starts, later, "right") - 1
        others = np.searchsorted(starts, first[later], "right") - 1
        for place, number, other in zip(later.tolist(), own.tolist(), others.tolist(), strict=True):
            utterance = manifests[number][place - int(starts[number])]
            detail = f"the same {what} as {manifests[other].where(int(first[place] - starts[other]))}"
            offender = Offender(utterance.where, _name(utterance.clip), detail)
            kind = "repeated" if number == other else "shared"
            found[number].add(place - int(starts[number]), kind, offender)


def first_places(keys: np.ndarray) -> np.ndarray:
    """For every key of (N,) the first position where it stands."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def folders_in_both(one: Checked, other: Checked) -> int:
    """Folders with files in both lists; 0 where all files of a list lie in one folder, which tells nothing."""
    first, second = (np.unique(part.folders[part.folders != 0]) for part in (one, other))
    return len(np.intersect1d(first, second)) if min(len(first), len(second)) > 1 else 0
