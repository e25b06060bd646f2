"""A training in processes of its own, and what happens to it as it happens: lines, files, its end. Linux only."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import os
import re
import selectors
import signal
import struct
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 60.0  # seconds in which a run must end after a fault
PATIENCE = 300.0  # seconds until a run must have come to where the fault is done to it, or to its own end
MARK = "WAV2VEC2_FAULT"  # in the environment of every process of a run
# What inotify tells, from <sys/inotify.h>
FILE_EVENTS = {0x100: "create", 0x8: "close", 0x80: "rename", 0x200: "delete"}
_INOTIFY = struct.Struct("iIII")
_BYTES = 2**16


class WrongError(Exception):
    """A fault that was not survived: what was expected, and what there was instead."""


class HungError(WrongError):
    """Nothing happened for as long as a run may take."""


class SkippedError(Exception):
    """A fault that cannot be tried here: why."""


@dataclass(frozen=True)
class Event:
    """A line of the output, a change of a file in the watched folder, or the end of the run.

    `kind`: line, create, close (after writing), rename (to this name), delete, end; `text`: the line, the name of the
    file, or nothing.
    """

    kind: str
    text: str = ""


class Training:
    """A command that runs in a session of its own until the `with` block ends; every process of it ends then."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """`folder`: the output folder, which is made and watched."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self._waiting: deque[Event] = deque()
        self._half = b""
        self._inotify = _watch(folder)
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self._mark}
        self.started = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603
            ["env", *(f"{name}={value}" for name, value in own.items()), *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._output = self.process.stdout.fileno() if self.process.stdout else -1
        self._end = os.pidfd_open(self.process.pid)
        self._selector = selectors.DefaultSelector()
        os.set_blocking(self._output, False)
        for descriptor in (self._output, self._inotify, self._end):
            self._selector.register(descriptor, selectors.EVENT_READ)

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End whatever still runs."""
        while alive := self.members():
            for pid in alive:
                self.signal(signal.SIGKILL, pid)
            self.process.poll()
        self.process.wait()
        self._selector.close()
        os.close(self._end)
        os.close(self._inotify)
        if self.process.stdout:
            self.process.stdout.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def said(self) -> str:
        """All that it said so far."""
        return "\n".join(self.lines)

    def until(self, kind: str, pattern: str = "", seconds: float = PATIENCE) -> re.Match[str]:
        """Wait for an event whose text the pattern is found in.

        Raises:
            WrongError: the run ended before.
            HungError: the event did not come in time.
        """
        for event in self.events(seconds):
            found = re.search(pattern, event.text)
            if event.kind == kind and found:
                return found
            if event.kind == "end":
                raise WrongError(f"ended with status {self.status} before {kind} {pattern}: {self.last_words}")
        raise HungError(f"no {kind} {pattern} in {seconds:.0f} s: {self.last_words}")

    def end(self, seconds: float = DEADLINE) -> int:
        """Wait for the end; the status, negative for a signal. HungError if it does not come in time."""
        if not any(event.kind == "end" for event in self.events(seconds)):
            raise HungError(f"did not end in {seconds:.0f} s: {self.last_words}")
        return self.status

    def events(self, seconds: float = PATIENCE) -> Iterator[Event]:
        """What happens from now on for so many seconds, or until the run has ended."""
        latest = time.monotonic() + seconds
        while self._waiting or (left := latest - time.monotonic()) > 0:
            if not self._waiting:
                self._collect(left)
                continue
            event = self._waiting.popleft()
            yield event
            if event.kind == "end":
                return

    @property
    def status(self) -> int:
        """The status of a run that has ended, negative for a signal. It stays a zombie until the block ends."""
        if self.process.returncode is not None:
            return self.process.returncode
        found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        if found is None:  # only with WNOHANG
            raise WrongError("has not ended")
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    @property
    def last_words(self) -> str:
        """The end of what it said, in one line."""
        return " / ".join(self.lines[-4:])[-600:] or "it said nothing"

    def signal(self, number: int, pid: int | None = None) -> None:
        """Send a signal to the process that was started, or to another one of its run; one that is gone is none."""
        with suppress(ProcessLookupError, OSError):
            descriptor = os.pidfd_open(pid or self.process.pid)
            try:
                if self._is_member(pid or self.process.pid):
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def members(self) -> list[int]:
        """The processes of the run that live."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_member(int(path.name))]

    def ranks(self) -> dict[int, int]:
        """The training process of every rank that lives, by rank; those that read audio for it are not meant."""
        of = {pid: int(rank) for pid in self.members() if (rank := _environment(pid).get("RANK", "")).isdecimal()}
        return {rank: pid for pid, rank in of.items() if of.get(_parent(pid)) != rank}

    def _is_member(self, pid: int) -> bool:
        return _environment(pid).get(MARK) == self._mark

    def _collect(self, seconds: float) -> None:
        """Wait for something and put it into the queue; the end comes last."""
        ready = {key.fd for key, _ in self._selector.select(max(0.0, seconds))}
        if self._inotify in ready or self._end in ready:
            self._waiting += _file_events(self._inotify)
        if self._output in ready or self._end in ready:
            self._read_lines()
        if self._end in ready:
            self._waiting.append(Event("end"))

    def _read_lines(self) -> None:
        with suppress(BlockingIOError):
            while True:
                found = os.read(self._output, _BYTES)
                if not found:
                    with suppress(KeyError):
                        self._selector.unregister(self._output)
                    break
                *whole, self._half = (self._half + found).split(b"\n")
                for line in whole:
                    self.lines.append(line.decode(errors="replace"))
                    self._waiting.append(Event("line", self.lines[-1]))


def _watch(folder: Path) -> int:
    """A descriptor that tells what happens to the files of a folder."""
    system = ctypes.CDLL(None, use_errno=True)
    descriptor = system.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0 or system.inotify_add_watch(descriptor, os.fsencode(folder), sum(FILE_EVENTS)) < 0:
        raise OSError(ctypes.get_errno(), "inotify", str(folder))
    return descriptor


def _file_events(descriptor: int) -> list[Event]:
    found: list[Event] = []
    with suppress(BlockingIOError):
        while content := os.read(descriptor, _BYTES):
            while content:
                _, mask, _, length = _INOTIFY.unpack_from(content)
                name = content[_INOTIFY.size : _INOTIFY.size + length].rstrip(b"\0")
                content = content[_INOTIFY.size + length :]
                kinds = [kind for bit, kind in FILE_EVENTS.items() if mask & bit]
                found += [Event(kind, os.fsdecode(name)) for kind in kinds]
    return found


def _environment(pid: int) -> dict[str, str]:
    """The environment that a process began with; empty for one that is gone, a zombie, or another user's."""
    with suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
