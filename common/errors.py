"""Errors that a user can mend: one line that names the flag or file:line and what to do."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 80, 80


def one_line(text: object, most: int = 200) -> str:
    """Text of unknown origin for a message: printable, in one line, cut off where it is long."""
    start = str(text)[: 4 * most]
    line = " ".join("".join(c if c.isprintable() else " " for c in start).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def shown(value: object) -> str:
    """A value of unknown origin for a message: its repr in one line, cut off where it is long."""
    return one_line(_BRIEF.repr(value), 80)


def size(num_bytes: float) -> str:
    """A number of bytes for a message: 512.0 MiB, 1.5 GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def tell(text: str) -> None:
    """Last words of a process, whose end must not depend on whether they can be written (closed pipe, full disk)."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class UserError(Exception):
    """Base of all errors that end a program with one line instead of a traceback."""

    exit_status = 1
    where = ""  # process, update and batch, where several processes make it worth telling
    by_all = False  # every process of the run finds it, so one of each machine tells it


@contextmanager
def found_by_all() -> Iterator[None]:
    """For work that every process does on the same files: its errors are told by one of each machine."""
    try:
        yield
    except UserError as error:
        error.by_all = True
        raise


class ConfigError(UserError):
    """A flag, or a combination of flags, that cannot work. Message: "--flag value: why; what to do"."""

    exit_status = 2
    by_all = True


class DataError(UserError):
    """A file of the user's data that cannot be used. Message: "file:line: why; what to do"."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit. Message: "file: why; what to do"."""


class TrainingError(UserError):
    """A run that cannot go on. Message: why, where the last good checkpoint is, what to do."""

    by_all = True  # figures are sums over all processes


class Stopped(UserError):
    """A run that was asked to stop, and has saved. Message: why, where it stands, how it goes on."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
