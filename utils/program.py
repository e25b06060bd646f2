"""What the data tools share as programs: arguments, one-line errors, progress bars, writing text files."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common import entry
from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tqdm import tqdm


class _Formatter(argparse.HelpFormatter):
    """Help that ends with the default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        tell = action.option_strings and action.default not in (None, False, "", argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if tell else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser that takes --a_b and --a-b alike and reports mistakes as ConfigError."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse `argv` (default: the command line); for an unknown flag the nearest known one is offered."""
        tokens = list(sys.argv[1:] if argv is None else argv)
        end = tokens.index("--") if "--" in tokens else len(tokens)
        for position, token in enumerate(tokens[:end]):
            if token.startswith("--"):
                tokens[position] = self._known(token)
        return self.parse_args(tokens)

    def _known(self, token: str) -> str:
        """`--output-dir=x` -> `--output_dir=x`; ConfigError for a flag that does not exist."""
        flag, equals, value = token.partition("=")
        name = "--" + flag[2:].replace("-", "_")
        if name not in self._option_string_actions:
            near = difflib.get_close_matches(name, list(self._option_string_actions), n=1)
            self.error(f"{flag}: no such flag" + (f", did you mean {near[0]}?" if near else ""))
        return name + equals + value

    def error(self, message: str) -> NoReturn:
        """Report a usage error: one line and exit status 2."""
        raise ConfigError(f"{message}; --help lists all flags")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a tool as a program; a file or folder that the system refuses is an error of one line too."""

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(list(argv))
        except BrokenPipeError:
            raise
        except OSError as error:
            place = error.filename or "input or output"
            raise DataError(f"{place}: {error.strerror or error}; {_remedy(error)}") from error

    entry.run_program(guarded, sys.argv[1:])


def _remedy(error: OSError) -> str:
    return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path and its permissions"


def bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:  # noqa: ANN401 - handed on to tqdm as it is
    """A progress bar on stderr, off when stderr is no terminal."""
    from tqdm import tqdm  # only here: a tool that says what is missing must start without it

    return tqdm(items, disable=not sys.stderr.isatty(), **options)


def cpu_count() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, which need not be there yet."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Let errors of the system while `path` is written name it: ConfigError, or DataError when the disk is full.

    `partial` is the temporary file or folder that becomes `path`. Errors about other files pass as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{path}: cannot be written ({error.strerror}); {_remedy(error)}") from error
        if not isinstance(error.filename, str):
            raise
        place = Path(error.filename)
        if not any(place == own or place in own.parents or own in place.parents for own in (path, partial or path)):
            raise
        where = f": {place}" if place in path.parents else ""
        raise ConfigError(f"{path}: cannot be written ({error.strerror}{where}); {_remedy(error)}") from error


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 text file, whole or not at all; makes the folder."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(line + "\n" for line in lines)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
