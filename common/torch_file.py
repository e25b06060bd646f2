"""Read a torch file of any origin without executing anything in it.

A file is read in four steps: the container (sizes, checksums), what its pickles ask for, torch's weights-only reader,
and the sizes of what came out. Names that are neither plain data nor given a stand-in by the caller end the reading
before it begins.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, one_line
from common.pickle_check import CodeError, Machine, Storage

# A full name in a pickle ("package.module.Name") -> what is put in its place, None to refuse it.
StandIns = Callable[[str], Any | None]

# A pickle describes tensors and holds none: some 200 bytes for each of a few thousand. So does the directory of a zip.
_MAX_TABLE_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**20
# The end of a zip archive, and what stands before it in those that torch writes: an end and its place in 64 bits.
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_PLACE_64 = struct.Struct("<4sLQL")
_UTF_8 = 0x800  # flag of a record whose name is in UTF-8
# What is read is small when it is written out, too: a list that holds another one twice, that one ..., is not.
_MAX_ENTRIES = 2_000_000
_MAX_DEPTH = 100
_BYTES_PER_ENTRY = 8
# Before torch 1.6: a magic number, a version, facts about the machine, the content and the list of storages, each
# a pickle of its own, then the bytes of the storages.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PICKLES = 4  # behind the magic number
_ITEM_BYTES = {
    **{"torch.DoubleStorage": 8, "torch.FloatStorage": 4, "torch.HalfStorage": 2, "torch.BFloat16Storage": 2},
    **{"torch.LongStorage": 8, "torch.IntStorage": 4, "torch.ShortStorage": 2, "torch.CharStorage": 1},
    **{"torch.ByteStorage": 1, "torch.BoolStorage": 1},
}
_REBUILD = re.compile(r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor(_v2)?|parameter)")
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
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


class DamagedError(CheckpointError):
    """A file that is no (whole) checkpoint; the one before it may serve."""


class PickledCodeError(CheckpointError):
    """A file whose pickle asks for more than plain data."""

    def __init__(self, path: Path, names: list[str]) -> None:
        super().__init__(
            f"{path}: holds pickled code ({one_line(', '.join(names[:3]), 120)!r}), which is never executed; "
            "use a checkpoint that holds plain data"
        )


class _File(io.BufferedReader):
    """A file that keeps its descriptor to itself: with one, torch first tries whether a file is a tar archive."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def read(path: str | Path, stand_ins: StandIns | None = None) -> Any:
    """The content of a file that torch.save() wrote, with all tensors on the CPU.

    Raises:
        PickledCodeError: the file asks for a name that is neither plain data nor known to `stand_ins`.
        DamagedError: an empty, truncated or damaged file, or none of torch's.
        CheckpointError: a file that is not there or cannot be read.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no regular file; name a checkpoint file")
        with _File(io.FileIO(path)) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            known = _known_names(path, _names(path, file, size), stand_ins)
            file.seek(0)
            with torch.serialization.safe_globals(known):
                content = torch.load(file, map_location="cpu", weights_only=True)
        _check_content(path, content, size)
        return content
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: there is no such file; check the path") from None
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None
    except CodeError as error:
        raise PickledCodeError(path, [str(error)]) from None
    except _READ_ERRORS as error:
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # torch says much before it
        raise damaged(path, one_line(reason or type(error).__name__, 100)) from error


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is on the disk when this returns. Raises OSError, which torch hides behind its own."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def damaged(path: str | Path, reason: str) -> DamagedError:
    """The error for a file that is not what it should be."""
    return DamagedError(f"{path}: is truncated, damaged or not a checkpoint ({reason}); use another checkpoint")


def _names(path: Path, file: _File, size: int) -> set[str]:
    """The names that the pickles ask for, of a file whose container is sound."""
    if size == 0:
        raise DamagedError(f"{path}: is empty; use another checkpoint")
    head = file.read(len(_OLD_MAGIC))
    if head == _OLD_MAGIC:
        return _names_of_old(path, io.BytesIO(file.read(_MAX_TABLE_BYTES)), size)
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: is a pickle that torch.save() did not write; use a checkpoint")
    if not head.startswith(b"PK\x03\x04"):
        raise damaged(path, "it does not begin as one")
    _check_directory(path, file, size)
    with zipfile.ZipFile(file) as archive:
        records = _records(path, archive, size)
        top = next(iter(records)).partition(b"/")[0]
        table = records.get(top + b"/data.pkl")
        if table is None or table.file_size > _MAX_TABLE_BYTES:
            raise damaged(path, "it has no table of contents of a sensible length")
        machine = Machine().run(io.BytesIO(archive.read(table)))
        for storage in machine.storages:
            record = records.get(top + b"/data/" + storage.key.encode())
            if record is None or record.file_size != _num_bytes(storage):
                raise damaged(path, f"a tensor claims {storage.length} numbers, the file holds another number of them")
        return machine.names


def _names_of_old(path: Path, stream: io.BytesIO, size: int) -> set[str]:
    """The names in the pickles behind the magic number."""
    machines = [Machine().run(stream) for _ in range(_OLD_PICKLES)]
    *_, content, listed = machines
    if {storage.key for storage in content.storages} != listed.texts:  # memory that nothing is read into
        raise damaged(path, "its list of storages is not that of its tensors")
    if sum(map(_num_bytes, content.storages)) > size:
        raise damaged(path, "its tensors claim more numbers than the file holds")
    return {name for machine in machines for name in machine.names}


def _num_bytes(storage: Storage) -> int:
    return storage.length * _ITEM_BYTES.get(storage.kind, 1)


def _check_directory(path: Path, file: _File, size: int) -> None:
    """Refuse an archive whose directory is not the last thing in it.

    Python and torch look for the directory in different ways; so both find the same one.
    """
    ends = size - _END.size
    file.seek(max(0, ends - _END_64.size - _PLACE_64.size))
    tail = file.read()
    signature, *_, length, offset, comment = _END.unpack(tail[-_END.size :])
    if tail[-_END.size - _PLACE_64.size :].startswith(b"PK\x06\x07"):
        ends -= _END_64.size + _PLACE_64.size
        *_, length, offset = _END_64.unpack(tail[: _END_64.size])
        place = _PLACE_64.unpack(tail[_END_64.size : -_END.size])[2]
        if not tail.startswith(b"PK\x06\x06") or place != ends:
            raise damaged(path, "its directory is not at its end")
    if signature != b"PK\x05\x06" or comment or offset + length != ends:
        raise damaged(path, "its directory is not at its end")
    if length > _MAX_TABLE_BYTES:
        raise damaged(path, "its directory is too long")


def _records(path: Path, archive: zipfile.ZipFile, size: int) -> dict[bytes, zipfile.ZipInfo]:
    """The records of an archive that is whole, by name as torch's reader looks for it: bytes, and `A` is `a`.

    That reader does not look at the checksums. Only stored (never compressed) records, together no larger than the
    file, keep a small file from becoming a large load.
    """
    records = {}
    for record in archive.infolist():
        name = record.orig_filename.encode("utf-8" if record.flag_bits & _UTF_8 else "cp437").lower()
        if name in records:
            raise damaged(path, "two of its records have the same name")
        if name.endswith(b"/constants.pkl"):
            raise damaged(path, "it is a program for TorchScript")
        if record.compress_type != zipfile.ZIP_STORED:
            raise damaged(path, "it holds compressed records")
        records[name] = record
    if sum(record.file_size for record in records.values()) > size:
        raise damaged(path, "its records overlap")
    for record in records.values():
        with archive.open(record) as stream:
            while stream.read(_CHUNK_BYTES):
                pass
    return records


def _known_names(path: Path, names: set[str], stand_ins: StandIns | None) -> list[Any]:
    """What torch's reader may put in place of the names that are not plain data."""
    known, refused = [], []
    for name in sorted(names):
        if _is_plain(name):
            continue
        stand_in = stand_ins(name) if stand_ins else None
        if stand_in is None:
            refused.append(name)
        else:
            known.append((stand_in, name))
    if refused:
        raise PickledCodeError(path, refused)
    return known


def _is_plain(name: str) -> bool:
    if name in _ITEM_BYTES or _REBUILD.fullmatch(name):
        return True
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _check_content(path: Path, content: Any, size: int) -> None:
    """Refuse what is larger than it looks.

    Tensors can claim more elements than the file holds (as expanded views do), containers can hold each other many
    times or without end, and the attributes of an OrderedDict can hide its methods.
    """
    storages: dict[int, int] = {}
    for item in _objects(content):
        if isinstance(item, OrderedDict) and vars(item).keys() - {"_metadata"}:
            raise damaged(path, "a table has attributes")
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if item.numel() * item.element_size() > storage.nbytes():
                raise damaged(path, f"a tensor of shape {list(item.shape)} is larger than what the file holds of it")
    if sum(storages.values()) > size:
        raise damaged(path, "its tensors are larger than the file")
    if _entries(content, {}) > _MAX_ENTRIES:
        raise damaged(path, "its tables are repeated without end")


def _objects(content: Any) -> Iterator[Any]:
    """Everything in nested containers and stand-ins, once: what is shared is not walked again, however deep it lies."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, dict):
            waiting += dict.values(item)
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()


def _entries(item: Any, known: dict[int, int], depth: int = 0) -> int:
    """The number of entries of nested containers, what is shared counted every time; long text counts as several."""
    if isinstance(item, (str, bytes)):
        return 1 + len(item) // _BYTES_PER_ENTRY
    if not isinstance(item, (dict, list, tuple)):
        return 1
    if id(item) not in known:
        if depth == _MAX_DEPTH:
            raise ValueError("its tables are nested without end")
        inner = [*item, *dict.values(item)] if isinstance(item, dict) else item
        known[id(item)] = 1 + sum(_entries(entry, known, depth + 1) for entry in inner)
    return known[id(item)]
