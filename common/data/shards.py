"""Tar shards in WebDataset's layout: which names a pattern means, who reads which shard, and what lies where in one.

A clip is a member `KEY.flac` (or another kind of audio); `KEY.txt` and `KEY.json` beside it may hold its text. The key
ends, as in WebDataset, at the first dot of the base name. An index is a file list whose paths are
`shard.tar:OFFSET:SIZE:KEY.flac`: with it a shard is read at random places, like files.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, DataError, one_line, shown

AUDIO = frozenset(  # extensions of what libsndfile reads
    ["flac", "wav", "mp3", "ogg", "oga", "opus", "aif", "aiff", "au", "caf", "w64", "rf64", "sph", "nist", "voc", "avr"]
)
TEXT = ("txt", "json")
PIPE = "pipe:"
SEPARATOR = ","
BRACKETS = re.compile(r"[(\[<]([^()\[\]<>{}]*(?:\.\.|,)[^()\[\]<>{}]*)[)\]>]")  # NeMo's, where a shell would expand {}
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")  # webdataset's
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset passes over
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
REPACK = "copy it again, or write it anew with utils/make_shards.py"


def expand_pattern(pattern: str) -> list[str]:
    """The names that a pattern means, in order: `s_{0..7}.tar`, `s_{00..11}.tar`, `s_{a,b}.tar`, or a folder of shards.

    Brackets ( ) [ ] < > and the words _OP_ _CL_ may stand for braces, as in NeMo, and commas separate patterns. After
    `pipe:` everything is the command, in which only braces are expanded; `,pipe:` begins the next. ConfigError for
    a pattern that names nothing, and for a folder without shards.
    """
    text = pattern.replace("_OP_", "{").replace("_CL_", "}")
    names = [name for part in _parts(text) for name in _expand(part.strip()) if name]
    if not names:
        raise ConfigError(f"--tarred_filepaths {pattern!r}: names no shard; give a pattern such as DIR/s_{{0..7}}.tar")
    return names


def shards_of_rank(names: list[str], strategy: str, rank: int, world: int) -> list[str]:
    """The shards of one process of `world`: "replicate": all; "scatter": its block of floor(shards / world).

    The blocks leave the last shards (modulo world) to nobody: a stream shares them clip by clip. ConfigError where
    a process would have none.
    """
    if strategy == "replicate":
        return list(names)
    if strategy != "scatter":
        raise ConfigError(f"--tarred_shard_strategy {strategy}: unknown; choose scatter or replicate")
    number = len(names) // world
    if not number:
        raise ConfigError(
            f"--tarred_shard_strategy scatter: {len(names)} shards for {world} processes; make at least {world} "
            "shards (utils/make_shards.py --num_shards), or use --tarred_shard_strategy replicate"
        )
    return names[rank * number : (rank + 1) * number]


@dataclass(frozen=True)
class ShardClip:
    """A clip in a shard: the member's name, its first byte and number of bytes within the file, and its words."""

    name: str
    offset: int
    size: int
    text: str | None

    def path(self, shard: str) -> str:
        """How a file list names it."""
        return f"{shard}:{self.offset}:{self.size}:{self.name}"


def index_shard(path: Path) -> list[ShardClip]:
    """The clips of a shard in its order: only headers and texts are read. DataError where it cannot be indexed."""
    _check_readable(path)
    audio: list[tuple[str, str, tarfile.TarInfo]] = []
    fields: dict[str, dict[str, bytes]] = {}  # texts by key and extension
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                found = split_name(member.name)
                if found is None or member.isdir():
                    continue
                key, extension = found
                if is_audio(extension):
                    _check_member(path, member)
                    audio.append((key, extension, member))
                elif extension.rpartition(".")[2] in TEXT and (file := tar.extractfile(member)):
                    fields.setdefault(key, {})[extension] = file.read()
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: truncated or damaged ({one_line(error)}); {REPACK}") from None
    _check_end(path, end)
    return [
        ShardClip(
            member.name.removeprefix("./"),
            member.offset_data,
            member.size,
            text_of(fields.get(key, {}), extension, f"{path}: {member.name}"),
        )
        for key, extension, member in audio
    ]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) of a member, split where webdataset does; None for what belongs to no clip."""
    name = name.removeprefix("./")
    found = NAME.fullmatch(name)
    return None if found is None or META.match(name) else (found[1], found[2].lower())


def is_audio(extension: str) -> bool:
    """Whether a member with this extension ("flac", "left.wav") is a clip."""
    return extension.rpartition(".")[2] in AUDIO


def text_of(fields: Mapping[str, bytes], extension: str, where: str) -> str | None:
    """The words of the clip with this extension, given the members of its key: its .txt, or "text" in its .json."""
    prefix = extension.rpartition(".")[0]
    for start in dict.fromkeys((f"{prefix}." if prefix else "", "")):
        try:
            if f"{start}txt" in fields:
                return " ".join(fields[f"{start}txt"].decode().split())
            entry = json.loads(fields.get(f"{start}json", b"{}"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{where}: its .txt or .json is not UTF-8 text or JSON ({error}); {REPACK}") from None
        text = entry.get("text") if isinstance(entry, dict) else None
        if isinstance(text, str):
            return " ".join(text.split())
    return None


def _parts(text: str) -> list[str]:
    """The patterns between commas that are in no bracket and in no command."""
    parts, start, depth = [], 0, 0
    for place, character in enumerate(text):
        command = text.startswith(PIPE, start)
        if character in ("{" if command else "{([<"):
            depth += 1
        elif character in ("}" if command else "})]>"):
            depth -= 1
        elif character == SEPARATOR and depth <= 0 and (not command or text.startswith(PIPE, place + 1)):
            parts.append(text[start:place])
            start, depth = place + 1, 0
    return [*parts, text[start:]]


def _expand(part: str) -> list[str]:
    """The names of one pattern; what exists is taken by its name, a folder for the shards in it."""
    if part.startswith(PIPE):
        return _braces(part)
    kind = _kind(part)
    if stat.S_ISREG(kind):
        return [part]
    if stat.S_ISDIR(kind) and part:
        found = sorted(str(path) for path in Path(part).glob("*.tar"))
        if not found:
            raise ConfigError(
                f"--tarred_filepaths {part}: a folder without *.tar; make shards with utils/make_shards.py"
            )
        return found
    return _braces(BRACKETS.sub(r"{\1}", part))


def _kind(name: str) -> int:
    """The mode of what has this name; 0 where nothing has, or nothing can."""
    try:
        return Path(name).stat().st_mode
    except (OSError, ValueError):  # also a pattern that is too long for a name
        return 0


def _braces(text: str) -> list[str]:
    """Brace expansion as in a shell; braces around no range and no list stay."""
    start = text.find("{")
    while start >= 0:
        stop = _closing(text, start)
        choices = _choices(text[start + 1 : stop]) if stop > start else []
        if choices:
            return [text[:start] + choice + rest for choice in choices for rest in _braces(text[stop + 1 :])]
        start = text.find("{", start + 1)
    return [text]


def _closing(text: str, start: int) -> int:
    """Place of the brace that closes the one at `start`; -1 without one."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return -1


def _choices(inner: str) -> list[str]:
    """What a pair of braces stands for; nothing if it holds no range and no list."""
    if found := RANGE.fullmatch(inner):
        first, last, step = int(found[1]), int(found[2]), max(int(found[3] or 1), 1)
        padded = any(re.match(r"-?0\d", end) for end in found.group(1, 2))
        width = max(map(len, found.group(1, 2))) if padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{number:0{width}d}" for number in numbers]
    parts, depth = [""], 0
    for character in inner:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == SEPARATOR and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [name for part in parts for name in _braces(part)] if len(parts) > 1 else []


def _check_readable(path: Path) -> None:
    """Refuse what is no plain tar file."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name of the shard") from None
    if path.suffix != ".tar":
        raise DataError(f"{path}: the name of a shard ends in .tar; rename it")
    if start.startswith(COMPRESSED):
        raise DataError(
            f"{path}: is compressed, so nothing in it can be found without reading all; unpack it (gunzip, "
            "zstd -d): audio does not get smaller that way"
        )


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Refuse audio whose bytes do not lie in the shard as they are."""
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.issparse() else "a link"
        raise DataError(f"{path}: {shown(member.name)} is stored as {kind}; write the shard with utils/make_shards.py")
    if any(character in member.name for character in "\t\n\r"):
        raise DataError(f"{path}: {shown(member.name)} has a tab or a line end in its name; rename it")


def _check_end(path: Path, end: int) -> None:
    """Refuse a shard that does not end, after its last member, with a block of zeros: tarfile stops in silence."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        size = path.stat().st_size
        raise DataError(f"{path}: truncated or damaged at byte {end} of {size}; {REPACK}")
