"""Checkpoint files: safe load, atomic save, the newest that is valid, which ones are kept.

A checkpoint holds plain containers, numbers, text and tensors, nothing else.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common import torch_file
from common.errors import CheckpointError, ConfigError, shown, size
from common.torch_file import DamagedError

log = logging.getLogger(__name__)

FORMAT = "wav2vec2"
FORMAT_VERSION = 2
BEST_NAME = "wav2vec2_best.pt"

_UPDATE_NAME = re.compile(r"wav2vec2_update(\d+)\.pt")
_TEMPORARY = ".{name}.tmp"
_NEEDED = {"mode": str, "config": dict, "model": dict}
_SPARE_BYTES = 2**20  # for the table of contents, and what else is written meanwhile
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Retention:
    """Which of the regular checkpoints are kept."""

    keep_last: int = 2
    milestones: tuple[int, ...] = ()

    def prune(self, folder: str | Path, final: int) -> list[Path]:
        """Remove all but the last, the milestones and update `final`; give the removed ones back.

        `wav2vec2_best.pt` and files of other names are never touched, except temporary files that a killed run
        left behind.
        """
        paths = update_paths(folder)
        kept = {final, *self.milestones}
        old = [path for path in paths[self.keep_last :] if update_number(path) not in kept]
        for path in [*old, *Path(folder).glob(_TEMPORARY.format(name="wav2vec2_*.pt"))]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s: cannot be removed (%s); remove it by hand", path, error.strerror)
        return old


def default_milestones(max_update: int) -> tuple[int, ...]:
    """Every quarter of a run of `max_update` updates."""
    return tuple(sorted({max_update * quarter // 4 for quarter in range(1, 5)} - {0}))


def update_path(folder: str | Path, update: int) -> Path:
    """Where the checkpoint made after `update` updates belongs."""
    return Path(folder) / f"wav2vec2_update{update}.pt"


def best_path(folder: str | Path) -> Path:
    """Where the checkpoint with the best validation result belongs."""
    return Path(folder) / BEST_NAME


def update_number(path: str | Path) -> int | None:
    """The number in a name made by update_path(), else None."""
    match = _UPDATE_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def update_paths(folder: str | Path) -> list[Path]:
    """All regular checkpoints of a folder, newest (by update, not by date) first."""
    paths = [path for path in Path(folder).glob("wav2vec2_update*.pt") if update_number(path) is not None]
    return sorted(paths, key=lambda path: update_number(path) or 0, reverse=True)


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that at any moment the old or the new file is there, whole.

    `format` and `format_version` are added. Tensors may be on any device.

    Raises:
        ConfigError: the output folder cannot be written.
        CheckpointError: the disk is full or fails; the temporary file is gone, older files are untouched.
        TypeError: see file_content() (an internal error).
    """
    path = Path(path)
    content = file_content(state)
    temporary = path.with_name(_TEMPORARY.format(name=path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch_file.write(temporary, content)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        if error.errno in _DISK_FULL:
            raise CheckpointError(
                f"{path}: could not be written ({error.strerror}); free some space and go on with --resume "
                "(older checkpoints are untouched)"
            ) from error
        raise ConfigError(
            f"--output_dir {path.parent}: cannot be written ({error.strerror}); "
            "choose another folder, or change its permissions"
        ) from error


def num_bytes(state: object) -> int:
    """Bytes of all tensors in a state, to a file's length but for its table of contents."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(num_bytes(value) for value in state) if isinstance(state, (list, tuple)) else 0


def check_space(folder: str | Path, wanted: int) -> None:
    """Raise CheckpointError if a disk has less than `wanted` bytes (and a little) left."""
    free = shutil.disk_usage(folder).free
    if free < wanted + _SPARE_BYTES:
        raise CheckpointError(
            f"--output_dir {folder}: the disk has {size(free)} left, and saving takes {size(wanted)} and "
            f"{size(_SPARE_BYTES)} to spare; free some space and go on with --resume (older checkpoints are "
            "untouched)"
        )


def snapshot(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors are copies in host memory. Raises TypeError as file_content()."""
    return _plain(state, "state", copy=True)


def file_content(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of this toolkit holds. Raises TypeError for what weights-only loading would refuse."""
    return _plain({**state, "format": FORMAT, "format_version": FORMAT_VERSION}, "state")


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this toolkit, with all tensors on the CPU; nothing in the file is executed.

    Raises CheckpointError in one line: missing, empty, truncated, damaged or not a checkpoint, with pickled code
    in it, from another program, or from a newer version of this toolkit.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path}: is a folder; name a file in it, such as {BEST_NAME}")
    return recognised(path, torch_file.read(path))


def load_newest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of the highest update that loads, and its content, or None where there are none.

    A damaged one is reported and the one before is taken. Raises CheckpointError if all are damaged, or if the
    newest is whole but not for this version of the toolkit.
    """
    paths = update_paths(folder)
    for path in paths:
        try:
            return path, load(path)
        except DamagedError as error:
            log.warning("%s%s", error, "" if path == paths[-1] else ". Trying the checkpoint before it.")
    if paths:
        best = best_path(folder)
        instead = f"go on with --resume_from {best} and another --output_dir, or " if _is_whole(best) else ""
        raise CheckpointError(
            f"{folder}: none of the {len(paths)} checkpoints can be read; {instead}remove them to start from the "
            "beginning"
        )
    return None


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def _plain(value: Any, where: str, *, copy: bool = False) -> Any:
    """A copy made of dict, list, tuple, str, numbers and detached tensors; names the culprit otherwise.

    `copy`: tensors are copied too, to the host.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True) if copy else value.detach()
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}")
        return {key: _plain(item, f"{where}[{key!r}]", copy=copy) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]", copy=copy) for i, item in enumerate(value))
    raise TypeError(f"{where}: a {type(value).__module__}.{type(value).__name__} cannot go into a checkpoint")


def _sync_folder(folder: Path) -> None:
    """Make the new name durable: without it a power failure may undo the replacement."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", temporary, error.strerror)


def recognised(path: str | Path, state: object) -> dict[str, Any]:
    """What torch_file.read() gave, in the present version; CheckpointError if it is none of this toolkit's."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a checkpoint; use another file")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is no checkpoint of this toolkit; if another program wrote it, convert it first: "
            "python utils/convert_checkpoint.py IN OUT --to native"
        )
    version = state.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise DamagedError(f"{path}: has the format version {shown(version)}; use another checkpoint")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this toolkit reads up to {FORMAT_VERSION}; update the toolkit"
        )
    missing = [key for key, kind in _NEEDED.items() if not isinstance(state.get(key), kind)]
    if missing:
        raise DamagedError(f"{path}: lacks {', '.join(missing)}; use another checkpoint")
    for older in range(version, FORMAT_VERSION):
        state = _MIGRATIONS[older](state)
    return state


def _from_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """Version 2 tells what a file was converted from."""
    return {**state, "origin": None, "format_version": 2}


_MIGRATIONS = {1: _from_version_1}  # what makes the next version of a state
