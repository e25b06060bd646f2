"""Torch files that no honest program writes, and what reading one may cost."""

from __future__ import annotations

import io
import os
import pickle
import time
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError

_FORGET = Path("/proc/self/clear_refs")  # Linux forgets the highest use of memory so far when 5 is written to it
MAX_SECONDS = 20.0  # a few at most, on a machine that does nothing else
MAX_BYTES = 500 * 2**20
MAX_MESSAGE = 400
MAX_LIST = 10_000  # a list of weights that do not fit


class Named:
    """A class or function that a pickle asks for by name, whether there is one or not."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Nothing: pickles of calls want something that can be called."""


class Call:
    """What a pickle makes by calling something."""

    def __init__(self, function: Named | Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self._reduced = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


class Pickler(pickle._Pickler):  # type: ignore[misc, name-defined]  # the one in Python, which can be taught
    """Writes Named as the name."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_named(self, named: Named) -> None:
        self.write(f"c{named.module}\n{named.name}\n".encode())

    dispatch[Named] = save_named


_MODULE = types.ModuleType("hostile")
_MODULE.__dict__.update(Pickler=Pickler, dump=pickle.dump)


def save(content: Any, path: Path, *, old: bool = False) -> None:
    """torch.save() of content that may hold Named and Call; `old` is the format before torch 1.6."""
    torch.save(content, path, pickle_module=_MODULE, pickle_protocol=2, _use_new_zipfile_serialization=not old)


def pickled(body: bytes) -> bytes:
    """A pickle that ends with what its opcodes leave."""
    return b"\x80\x02" + body + b"."


def long1(number: int, size: int = 8) -> bytes:
    """The opcode of a whole number."""
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)


def text(content: str) -> bytes:
    """The opcode of a text."""
    data = content.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def records_of(path: Path) -> dict[str, bytes]:
    """The records of a zip archive by name."""
    with zipfile.ZipFile(path) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def write_records(path: Path, records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A zip archive of records."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def zip_of(path: Path, content: bytes, storages: Mapping[str, bytes] | None = None) -> None:
    """A file of torch's present format with a pickle and storages by key."""
    records = {"a/data.pkl": content, "a/byteorder": b"little", "a/version": b"3\n"}
    write_records(path, {**records, **{f"a/data/{key}": data for key, data in (storages or {}).items()}})


def old_of(path: Path, content: bytes, storages: Mapping[str, bytes] | None = None, listed: Any = None) -> None:
    """A file of torch's format before 1.6; storages of float32 by key."""
    stream = io.BytesIO()
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    start = stream.getvalue().removesuffix(pickle.dumps([], 2)).removesuffix(pickle.dumps({}, 2))
    storages = storages or {}
    data = b"".join((len(data) // 4).to_bytes(8, "little") + data for data in storages.values())
    path.write_bytes(start + content + pickle.dumps(list(storages) if listed is None else listed, 2) + data)


def tensor(shape: bytes, stride: bytes, *, elements: bytes = b"K\x06", offset: bytes = b"K\x00", old: bool) -> bytes:
    """Opcodes of a float32 tensor whose numbers have the key 0."""
    view = b"N" if old else b""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + elements + view + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89" + hooks + b"tR"


def outcome(path: Path, read: Callable[[Path], Any]) -> UserError | Any:
    """What reading a file gives, or its error; whatever it is, it must be short in every respect."""
    start, before = time.monotonic(), _memory("VmRSS")
    if os.access(_FORGET, os.W_OK):
        _FORGET.write_text("5")
    try:
        found = read(path)
    except UserError as error:
        found = error
    assert time.monotonic() - start < MAX_SECONDS
    assert _memory("VmHWM") - before < MAX_BYTES
    if isinstance(found, UserError):
        place, separator, message = str(found).partition(": ")
        assert (place, separator) == (str(path), ": "), str(found)
        assert message.isprintable(), repr(message)
        assert len(message) < (MAX_LIST if " weights" in message else MAX_MESSAGE), message
    return found


def _memory(what: str) -> int:
    """Bytes of memory that this process has now (VmRSS), or had at most (VmHWM); 0 where Linux does not tell."""
    if not os.access(_FORGET, os.W_OK):
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
