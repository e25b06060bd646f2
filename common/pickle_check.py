"""What a pickle would build and call, found without building or calling anything.

torch's weights-only reader calls nothing but what it knows, yet a small pickle can still cost a lot: nested tuples
as the key of a table overflow the stack of the process, keys of equal hash take hours, a storage type that is called
claims any memory. So a pickle is first run by a machine that knows of every value only what the rules here need.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # how Python 3 reads the names of Python 2
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, Any

# What torch.save() writes: protocol 2. Newer opcodes make names of texts, older ones call by other ways.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}
_PROTOCOL = 2
_MAX_OPCODES = 1_000_000  # some 50 for a tensor
_MAX_NAMES = 50
_MAX_NESTING = 5  # of tuples: the arguments of a tensor hold its shape
_MAX_NUMBER = 2**64  # numbers that are larger can all have the same hash


class ForbiddenError(ValueError):
    """A pickle that torch.save() does not write."""


class CodeError(ForbiddenError):
    """A pickle that calls what torch.save() does not call, or may do so; the message is its name."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a value."""

    name: str = ""  # of a class or function
    text: str | None = None
    number: int | None = None
    items: tuple[_Value, ...] | None = None  # of a tuple
    nesting: int = 0  # of tuples

    @classmethod
    def tuple(cls, items: Iterable[_Value]) -> _Value:
        items = tuple(items)
        return cls(items=items, nesting=1 + max((item.nesting for item in items), default=0))


_ANY = _Value()


@dataclass(frozen=True)
class Storage:
    """Numbers that a pickle says lie elsewhere in the file."""

    key: str
    kind: str  # full name of its class
    length: int


@dataclass
class Machine:
    """What is known of a pickle after it has run."""

    names: set[str] = field(default_factory=set)  # of classes and functions
    storages: set[Storage] = field(default_factory=set)  # of its tensors
    texts: set[str] = field(default_factory=set)
    _stack: list[_Value] = field(default_factory=list)
    _marks: list[int] = field(default_factory=list)
    _memo: dict[int, _Value] = field(default_factory=dict)

    def run(self, stream: IO[bytes]) -> Machine:
        """Run one pickle to its end. Raises ForbiddenError; another ValueError or LookupError where it is broken."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name not in _OPCODES or (opcode.name == "PROTO" and argument != _PROTOCOL):
                raise CodeError(f"protocol {argument}" if opcode.name == "PROTO" else f"opcode {opcode.name}")
            if number > _MAX_OPCODES or len(self.names) > _MAX_NAMES:
                raise ForbiddenError("its table of contents is too long")
            self._step(opcode, argument)
        return self

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        match opcode.name:
            case "MARK":
                self._marks.append(len(self._stack))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case _:
                taken = self._take(opcode.stack_before)
                self._stack += [self._made(opcode.name, argument, taken)] * len(opcode.stack_after)

    def _take(self, before: list[pickletools.StackObject]) -> list[_Value]:
        """What an opcode takes from the stack."""
        if pickletools.markobject not in before:
            return [self._stack.pop() for _ in before][::-1]
        start = self._marks.pop()
        container = before.index(pickletools.markobject)  # below the mark: 1, or 0 for a tuple
        taken = self._stack[start - container :]
        del self._stack[start - container :]
        return taken

    def _made(self, opcode: str, argument: Any, taken: list[_Value]) -> _Value:
        """What an opcode leaves on the stack."""
        match opcode:
            case "GLOBAL":
                name = _python3_name(*argument.split(" ", 1))
                self.names.add(name)
                return _Value(name=name)
            case "BINUNICODE" | "SHORT_BINSTRING":
                self.texts.add(argument)
                return _Value(text=argument)
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                made = _Value.tuple(taken)
                _forbid(made.nesting > _MAX_NESTING, "its tuples are nested without end")
                return made
            case "SETITEM" | "SETITEMS":
                _forbid(any(key.items is not None for key in taken[1::2]), "the key of a table is a tuple")
            case "REDUCE" | "NEWOBJ":
                _check_call(*taken)
            case "BINPERSID":
                self.storages.add(_storage(taken[0].items or ()))
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                _forbid(abs(argument) > _MAX_NUMBER, "it holds a number that no program needs")
                return _Value(number=argument)
        return _ANY


def _check_call(function: _Value, arguments: _Value) -> None:
    """Calls are of named functions; of those that torch itself admits, only as torch.save() writes them."""
    name, items = function.name, arguments.items
    if not name or items is None:
        raise CodeError("a call without a name")
    if name.endswith("Storage") or (name == "collections.OrderedDict" and items):
        raise CodeError(name)
    if name == "_codecs.encode" and [item.text for item in items[1:]] != ["latin1"]:  # bytes, in protocol 2
        raise CodeError(name)


def _storage(items: tuple[_Value, ...]) -> Storage:
    """What the reference of a tensor to its numbers says: 'storage', class, key, device, length."""
    _forbid(len(items) < 5 or items[0].text != "storage", "it refers to something else than numbers")
    _, kind, key, _, length, *_ = items
    _forbid(not re.fullmatch("[0-9]+", key.text or ""), "the numbers of a tensor have no key")
    _forbid(length.number is None or length.number < 0, "the numbers of a tensor have no length")
    return Storage(str(key.text), kind.name, int(length.number or 0))


def _forbid(condition: bool, reason: str) -> None:
    if condition:
        raise ForbiddenError(reason)


def _python3_name(module: str, name: str) -> str:
    """The name under which torch's reader looks for one of Python 2 (`__builtin__.long` is `builtins.int`)."""
    module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
    return f"{module}.{name}"
