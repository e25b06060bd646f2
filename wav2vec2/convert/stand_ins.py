"""Inert stand-ins for the classes that fairseq, omegaconf and NumPy leave in checkpoints.

A stand-in keeps what its class was given and does nothing with it. plain() turns the ones that hold settings into
dicts and lists. No class of those packages is imported, and no name outside the list is accepted.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import CheckpointError, shown

# Settings are a few levels deep and, with a large dictionary, some 100 000 entries large; long text counts as several.
_MAX_DEPTH = 100
_MAX_ENTRIES = 1_000_000
_CHARACTERS_PER_ENTRY = 8
_MAX_KEY_LENGTH = 200

_PACKAGES = ("fairseq.", "omegaconf.", "typing.")
_TYPES = ("dict", "list", "tuple", "set", "int", "float", "str", "bool", "bytes", "object", "complex")
_SETTINGS = ("argparse.Namespace", "torch.device", *(f"builtins.{name}" for name in _TYPES))
_NUMPY = ("numpy.core.multiarray.", "numpy._core.multiarray.")


class StandIn:
    """What a class of another program was made of."""

    name = ""

    def __new__(cls, *arguments: Any) -> StandIn:
        """Keep the arguments."""
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = {}
        return made

    arguments: tuple[Any, ...]
    state: Any

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _NumpyType(StandIn):
    """numpy.dtype: its code ("f8") is the first argument, its byte order the second entry of the state."""


def stand_in(name: str) -> Any | None:
    """What takes the place of a name in a pickle; None for names that no checkpoint of these programs needs."""
    if name == "collections.defaultdict":
        return _plain_dict
    if name == "_codecs.encode":
        return codecs.encode  # pickles of Python 2 spell bytes as text
    if name == "numpy.dtype":
        return _NumpyType
    if name in [f"{module}scalar" for module in _NUMPY]:
        return _number
    if name in _SETTINGS or name.startswith(_PACKAGES):
        return type(name.rpartition(".")[2], (StandIn,), {"name": name})
    return None


def plain(where: str, value: Any) -> Any:
    """Settings and stand-ins as dicts by name, lists, numbers and text; what has no such form becomes None.

    Raises CheckpointError where they are nested or repeated beyond any use.
    """
    return _Unwrapping(where).plain(value, 0)


def table_in(found: Any, name: str) -> Mapping[str, Any]:
    """A table in a table of a file; empty where there is none."""
    section = found.get(name) if isinstance(found, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def number_in(found: Any, name: str) -> float | None:
    """A finite number in a table of a file, also as a tensor; None where there is none."""
    value = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def count_in(found: Any, name: str) -> int | None:
    """A number of things in a table of a file; None where there is none."""
    value = number_in(found, name)
    return int(value) if value is not None and value >= 0 else None


class _Unwrapping:
    """Counts entries and levels: shared lists could make an endless tree of a short pickle."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = _MAX_ENTRIES

    def plain(self, value: Any, depth: int) -> Any:
        self._left -= 1 + (len(value) // _CHARACTERS_PER_ENTRY if isinstance(value, (str, bytes)) else 0)
        if depth > _MAX_DEPTH or self._left < 0:
            raise CheckpointError(f"{self._where}: its settings are nested or repeated without end; use another file")
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        if isinstance(value, Tensor):
            return value.item() if value.numel() == 1 else None
        if isinstance(value, Mapping):
            names = [name for name in value if isinstance(name, str) and len(name) <= _MAX_KEY_LENGTH]
            return {name: self.plain(value[name], depth + 1) for name in names}
        if isinstance(value, (list, tuple)):
            return [self.plain(item, depth + 1) for item in value]
        if isinstance(value, StandIn):
            return self._of_stand_in(value, depth)
        return None

    def _of_stand_in(self, value: StandIn, depth: int) -> Any:
        state = value.state
        if not isinstance(state, Mapping):
            return None
        if not state and len(value.arguments) == 1:  # a member of an enumeration is made of its value
            return self.plain(value.arguments[0], depth + 1)
        for holder in ("_content", "_val"):  # omegaconf's containers and leaves
            if value.name.startswith("omegaconf.") and holder in state:
                return self.plain(state[holder], depth + 1)
        return self.plain(state, depth + 1)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _number(kind: _NumpyType, content: bytes = b"") -> float | int | bool:
    """numpy.core.multiarray.scalar."""
    state = kind.state if isinstance(kind, _NumpyType) else None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|") else "<"
    code = kind.arguments[0] if isinstance(kind, _NumpyType) and kind.arguments else None
    if not isinstance(code, str) or len(code) != 2 or code[0] not in "fiub" or code[1] not in "1248":
        raise ValueError(f"a NumPy number of type {shown(code)}")
    return np.frombuffer(content, dtype=np.dtype(order + code), count=1)[0].item()
