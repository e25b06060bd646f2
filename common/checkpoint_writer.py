"""Checkpoints are written beside the training, which waits for the copy to host memory only."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import checkpoint
from common.errors import UserError


class CheckpointWriter:
    """Writes one state at a time in a thread; what fails is raised by the next call of any method."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, paths: Sequence[Path], state: Mapping[str, Any], then: Callable[[], None]) -> None:
        """Write a state under each of the paths, of one folder, and call `then` in the thread.

        Waits for the write before, and copies: the state may change as soon as this returns. CheckpointError if the
        disk has no room.
        """
        self.wait()
        checkpoint.check_space(paths[0].parent, len(paths) * checkpoint.num_bytes(state))
        content = checkpoint.snapshot(state)
        # no daemon: the interpreter waits for it, so that an error elsewhere does not cost what is being saved
        self._thread = threading.Thread(target=self._write, args=(paths, content, then), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what failed since the last call."""
        error = self.take_error()
        if error is not None:
            raise error

    def take_error(self) -> BaseException | None:
        """What failed since the last call."""
        error, self._error = self._error, None
        return error

    def wait(self) -> None:
        """Until everything is on the disk; raises what failed."""
        self.join()
        self.check()

    def join(self, seconds: float | None = None) -> None:
        """Until everything is on the disk or has failed, at most so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, paths: Sequence[Path], content: Mapping[str, Any], then: Callable[[], None]) -> None:
        try:
            for path in paths:
                checkpoint.save(path, content)
            then()
        except (UserError, OSError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            self._error = error
