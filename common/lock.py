"""One run per folder: a lock that ends with its process, however that ends."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from common.errors import ConfigError

log = logging.getLogger(__name__)

NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_BETWEEN_TRIES = 0.5


class FolderLock:
    """Holds a folder until release() or the end of this process.

    A lock by lockf() belongs to the process alone: data workers that outlive a killed parent do not keep it, and
    network file systems pass it on to other machines.
    """

    def __init__(self, folder: str | Path, *, patience: float = 0.0) -> None:
        """Take the lock. ConfigError where another process keeps it for longer than `patience` seconds."""
        self._path = Path(folder) / NAME
        deadline = time.monotonic() + patience
        try:
            self._file: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(
                f"--output_dir {folder}: {NAME} cannot be written ({error.strerror}); "
                "choose another folder, or change its permissions"
            ) from None
        while not self._taken(self._file):
            if time.monotonic() >= deadline:
                owner = os.read(self._file, 200).decode(errors="replace").strip()
                os.close(self._file)
                self._file = None
                raise ConfigError(
                    f"--output_dir {folder}: is in use by another run ({owner or 'which has just begun'}); "
                    "wait until it has ended, or choose another folder"
                )
            time.sleep(_BETWEEN_TRIES)
        os.ftruncate(self._file, 0)
        with suppress(OSError):  # a full disk; the lock holds
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have the folder."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def _taken(self, file: int) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                log.warning(
                    "%s: cannot be locked (%s); see to it that no two runs write here", self._path, error.strerror
                )
            return error.errno not in _HELD
        return True
