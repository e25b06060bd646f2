"""Read a torch file of any origin without executing anything in it.

A file is read in four steps: the container (sizes, checksums), the list of names that its pickle asks for, torch's
weights-only reader, and the sizes of what came out. Names that are neither plain data nor given a stand-in by the
caller end the reading before it begins.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # how Python 3 reads the names of Python 2
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError

# A full name in a pickle ("package.module.Name") -> what is put in its place, None to refuse it.
StandIns = Callable[[str], Any | None]

# A pickle describes tensors and holds none: some 200 bytes for each of a few thousand.
_MAX_PICKLE_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**20
# Before torch 1.6: a magic number, a version, facts about the machine, the content and the list of storages, each
# a pickle of its own, then the bytes of the storages.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PICKLES = 5
_PLAIN_NAMES = re.compile(
    r"collections\.OrderedDict|torch\.Size|torch\.\w+Storage|torch\.storage\.UntypedStorage"
    r"|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)"
)
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
    """A file whose pickle asks for more than plain data; `names` are what it asks for."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.names = names
        super().__init__(
            f"{path}: holds pickled code ({', '.join(names[:3])[:120]!r}), which is never executed; "
            "use a checkpoint that holds plain data"
        )


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
        with path.open("rb") as file:
            pickles = _pickles(path, file)
            known = _known_names(path, pickles, stand_ins)
            file.seek(0)
            with torch.serialization.safe_globals(known):
                content = torch.load(file, map_location="cpu", weights_only=True)
            _check_sizes(path, content, os.fstat(file.fileno()).st_size)
            return content
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: there is no such file; check the path") from None
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None
    except _READ_ERRORS as error:
        raise damaged(path, _first_line(error)) from error


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def damaged(path: str | Path, reason: str) -> DamagedError:
    """The error for a file that is not what it should be."""
    return DamagedError(f"{path}: is truncated, damaged or not a checkpoint ({reason}); use another checkpoint")


def tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, once: what is shared is not walked again, however deep it lies."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()


def _pickles(path: Path, file: io.BufferedReader) -> list[bytes]:
    """The pickles of a file whose container is sound."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DamagedError(f"{path}: is empty; use another checkpoint")
    head = file.read(len(_OLD_MAGIC))
    file.seek(0)
    if head == _OLD_MAGIC:
        return [file.read(_MAX_PICKLE_BYTES)]
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: is a pickle that torch.save() did not write; use a checkpoint")
    if not head.startswith(b"PK\x03\x04"):
        raise damaged(path, "it does not begin as one")
    _check_archive(path, file, size)
    with zipfile.ZipFile(file) as archive:
        records = [record for record in archive.infolist() if record.filename.endswith("data.pkl")]
        if len(records) != 1 or records[0].file_size > _MAX_PICKLE_BYTES:
            raise damaged(path, "it has no table of contents of a sensible size")
        return [archive.read(records[0])]


def _check_archive(path: Path, file: io.BufferedReader, size: int) -> None:
    """Refuse what is not a whole zip archive of stored records with the right checksums.

    torch's reader does not look at the checksums. Only stored (never compressed) records, together no larger
    than the file, keep a small file from becoming a large load.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise damaged(path, "it holds compressed records")
        if sum(record.file_size for record in records) > size:
            raise damaged(path, "its records overlap")
        for record in records:
            with archive.open(record) as stream:
                while stream.read(_CHUNK_BYTES):
                    pass


def _known_names(
    path: Path, pickles: list[bytes], stand_ins: StandIns | None
) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What torch's reader may put in place of the names that are not plain data, found without unpickling."""
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    refused = []
    for name in sorted(_names(pickles)):
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


def _names(pickles: list[bytes]) -> set[str]:
    """Every module.name that the pickles refer to, as Python 3 spells it."""
    names = set()
    for content in pickles:
        stream = io.BytesIO(content)
        for _ in range(_OLD_PICKLES if content.startswith(_OLD_MAGIC) else 1):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.add(_python3_name(*str(argument).split(" ", 1)))
                elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                    names.add(opcode.name)
    return names


def _python3_name(module: str, name: str = "") -> str:
    """The name under which torch's reader looks for one of Python 2 (`__builtin__.long` is `builtins.int`)."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _is_plain(name: str) -> bool:
    if _PLAIN_NAMES.fullmatch(name):
        return True
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _check_sizes(path: Path, content: Any, size: int) -> None:
    """Refuse tensors that claim more elements than the file holds, as an expanded view can."""
    storages: dict[int, int] = {}
    for tensor in tensors(content):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise damaged(path, f"a tensor of shape {list(tensor.shape)} is larger than what the file holds of it")
    if sum(storages.values()) > size:
        raise damaged(path, "its tensors are larger than the file")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__
