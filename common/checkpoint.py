"""Checkpoint files: safe load, atomic save, the newest that is valid, which ones are kept.

A checkpoint holds plain containers, numbers, text and tensors, nothing else. A file is read in three steps, none
of which executes anything: the archive (sizes, checksums), the list of names that its pickle asks for, and
torch's weights-only reader.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

FORMAT = "wav2vec2"
FORMAT_VERSION = 1
BEST_NAME = "wav2vec2_best.pt"

_UPDATE_NAME = re.compile(r"wav2vec2_update(\d+)\.pt")
_TEMPORARY = ".{name}.tmp"
# A checkpoint's pickle describes its tensors and holds none: some 200 bytes for each of a few thousand.
_MAX_PICKLE_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20
_NEEDED_KEYS = ("mode", "config", "model")
_PLAIN_NAMES = re.compile(
    r"collections\.OrderedDict|torch\.Size|torch\.\w+Storage|torch\.storage\.UntypedStorage"
    r"|torch\._utils\._rebuild_(tensor_v[23]|parameter)"
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What torch's reader raises on damaged files, by experiment and from its source.
_READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)


class DamagedError(CheckpointError):
    """A file that is no (whole) checkpoint; the one before it may serve."""


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
        TypeError: the state holds something that weights-only loading would refuse (an internal error).
    """
    path = Path(path)
    content = _plain({**state, "format": FORMAT, "format_version": FORMAT_VERSION}, "state")
    temporary = path.with_name(_TEMPORARY.format(name=path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, content)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        _remove(temporary)
        if cause is None:
            raise
        if cause.errno in _DISK_FULL:
            raise CheckpointError(
                f"{path}: could not be written ({cause.strerror}); free some space and go on with --resume "
                "(older checkpoints are untouched)"
            ) from error
        raise ConfigError(
            f"--output_dir {path.parent}: cannot be written ({cause.strerror}); "
            "choose another folder, or change its permissions"
        ) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this toolkit, with all tensors on the CPU; nothing in the file is executed.

    Raises CheckpointError in one line: missing, empty, truncated, damaged or not a checkpoint, with pickled code
    in it, from another program, or from a newer version of this toolkit.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a file in it, such as {BEST_NAME}")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file; name a checkpoint file")
    try:
        with path.open("rb") as file:
            _check_archive(path, file)
            _check_names(path, _pickle_names(path, file))
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: there is no such file; check the path") from None
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None
    except _READ_ERRORS as error:
        raise _damaged(path, _first_line(error)) from error
    return _recognised(path, state)


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
            log.warning("%s. Trying the checkpoint before it.", error)
    if paths:
        raise CheckpointError(
            f"{folder}: none of the {len(paths)} checkpoints can be read; remove them to start from the beginning"
        )
    return None


def _plain(value: Any, where: str) -> Any:
    """A copy made of dict, list, tuple, str, numbers and detached tensors; names the culprit otherwise."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(f"{where}: a {type(value).__module__}.{type(value).__name__} cannot go into a checkpoint")


def _write(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


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


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind `error`: torch's writer hides it behind an error of its own."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _check_archive(path: Path, file: io.BufferedReader) -> None:
    """Refuse what is not a whole zip archive of stored records with the right checksums.

    torch's reader does not look at the checksums. Only stored (never compressed) records, together no larger
    than the file, keep a small file from becoming a large load.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DamagedError(f"{path}: is empty; use another checkpoint")
    magic = file.read(4)
    if magic != b"PK\x03\x04":
        if magic[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: is a pickle file of another program, not a checkpoint of this toolkit; convert it first"
            )
        raise _damaged(path, "it does not begin as one")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _damaged(path, "it holds compressed records")
        if sum(record.file_size for record in records) > size:
            raise _damaged(path, "its records overlap")
        for record in records:
            with archive.open(record) as stream:
                while stream.read(_CHUNK_BYTES):
                    pass


def _pickle_names(path: Path, file: io.BufferedReader) -> set[str]:
    """Every module.name that the archive's pickle refers to, found without unpickling."""
    with zipfile.ZipFile(file) as archive:
        pickles = [record for record in archive.infolist() if record.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise _damaged(path, "it has no table of contents of a sensible size")
        names = set()
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                names.add(opcode.name)
    return names


def _check_names(path: Path, names: set[str]) -> None:
    strange = sorted(name for name in names if not _is_plain(name))
    if not strange:
        return
    if any(name.startswith(("fairseq.", "omegaconf.", "argparse.Namespace")) for name in strange):
        raise _foreign(path, "fairseq")
    if all(name.startswith(("numpy.", "_codecs.encode")) for name in strange):
        raise CheckpointError(
            f"{path}: holds NumPy objects, as checkpoints of other programs (NVIDIA's) do; convert it first"
        )
    raise CheckpointError(
        f"{path}: holds pickled code ({', '.join(strange[:3])[:120]!r}), which is never executed; "
        "use a checkpoint of this toolkit"
    )


def _is_plain(name: str) -> bool:
    if _PLAIN_NAMES.fullmatch(name):
        return True
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _recognised(path: Path, state: object) -> dict[str, Any]:
    """Our own content, or an error that says whose it is."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a checkpoint; use another file")
    if state.get("format") != FORMAT:
        args = state.get("args")
        if isinstance(args, dict) and "mode" in args:
            raise _foreign(path, "NVIDIA")
        if "model" in state and ("cfg" in state or "args" in state):
            raise _foreign(path, "fairseq")
        if any(str(key).startswith(("wav2vec2.", "lm_head.")) for key in state):
            raise _foreign(path, "Hugging Face")
        raise CheckpointError(f"{path}: is a torch file, but not a checkpoint of this toolkit; use another file")
    version = state.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise DamagedError(f"{path}: has the format version {version!r}; use another checkpoint")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this toolkit reads up to {FORMAT_VERSION}; update the toolkit"
        )
    missing = [key for key in _NEEDED_KEYS if key not in state]
    if missing:
        raise DamagedError(f"{path}: lacks {', '.join(missing)}; use another checkpoint")
    return state


def _foreign(path: Path, program: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is a checkpoint of {program}, not of this toolkit; convert it to this toolkit's format first"
    )


def _damaged(path: Path, reason: str) -> DamagedError:
    return DamagedError(f"{path}: is truncated, damaged or not a checkpoint ({reason}); use another checkpoint")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__
