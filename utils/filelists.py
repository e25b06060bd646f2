"""File lists (.tsv): find audio below a folder, read its headers, read and write the lists."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.data.audio import AudioInfo, read_info
from common.errors import ConfigError, DataError
from utils import program

# What people have and libsndfile reads. Its other formats are asked for by name (--extensions).
EXTENSIONS = (
    *("wav", "flac", "mp3", "ogg", "oga", "opus", "aiff", "aif", "aifc", "au", "snd"),
    *("caf", "w64", "rf64", "sph", "nist", "voc"),
)
UNREADABLE = ("m4a", "aac", "mp4", "wma", "amr", "webm", "mka", "ape", "wv")  # audio that libsndfile does not know
BATCH = 100  # files per task: one task per file would cost more than reading the header


@dataclass(frozen=True)
class FileList:
    """Audio files below one root folder, with their lengths in samples at the model's rate."""

    root: Path
    paths: tuple[str, ...]
    num_samples: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file's header says, or why the file cannot be listed (`fault`)."""

    info: AudioInfo | None = None
    fault: str = ""


def read_filelist(tsv: Path) -> FileList:
    """Read a list: the root folder, then lines `path<TAB>samples`; DataError names a line that is not so."""
    try:
        lines = tsv.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{tsv}: no such file; make it with utils/generate_filelist.py") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{tsv}: not UTF-8 text; make the list with utils/generate_filelist.py") from error
    lines = [line.removesuffix("\r") for line in lines]
    if lines[-1] == "":
        lines.pop()
    if not lines or "\t" in lines[0] or not lines[0].strip():
        raise DataError(f"{tsv}:1: the first line should be the root folder; make the list again")
    paths, lengths = [], []
    for number, line in enumerate(lines[1:], start=2):
        path, tab, samples = line.partition("\t")
        if not (path and tab and samples.isascii() and samples.isdigit()):
            raise DataError(f"{tsv}:{number}: {line!r} is not path<TAB>samples; make the list again")
        paths.append(path)
        lengths.append(int(samples))
    return FileList(Path(lines[0]), tuple(paths), tuple(lengths))


def check_target(tsv: Path) -> None:
    """Refuse a name that is no list's, and a file that is no list: it would be lost. Raises ConfigError."""
    if tsv.suffix != ".tsv":
        raise ConfigError(f"{tsv}: the name of a file list ends in .tsv; give another name")
    if tsv.is_file():
        try:
            read_filelist(tsv)
        except DataError:
            raise ConfigError(f"{tsv}: is there and is no file list; give another name, or move it away") from None


def write_filelist(tsv: Path, files: FileList) -> None:
    """Write a list with its absolute root; refuses an empty one."""
    if not files.paths:
        raise DataError(f"{tsv}: no file is left for this list; nothing was written")
    lines = [f"{path}\t{samples}" for path, samples in zip(files.paths, files.num_samples, strict=True)]
    program.write_lines(tsv, [str(files.root.absolute()), *lines])


def _raise(error: OSError) -> None:
    """For os.walk, which else leaves out a folder that it may not read."""
    raise error


def find_audio(root: Path, extensions: Sequence[str]) -> list[str]:
    """All files below `root` with one of `extensions` (any case), as sorted paths relative to `root`."""
    wanted = {"." + extension.lower().lstrip(".") for extension in extensions}
    found, others = [], Counter[str]()
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder that was listed already
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders.sort()
        below = Path(folder).relative_to(root)
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in wanted:
                found.append((below / name).as_posix())
            else:
                others[suffix or "no extension"] += 1
    if not found:
        there = ", ".join(f"{number} {suffix}" for suffix, number in others.most_common(3)) or "nothing"
        raise DataError(f"{root}: no {'/'.join(sorted(wanted))} file ({there} there); see --extensions")
    unreadable = {suffix: others[suffix] for suffix in ("." + name for name in UNREADABLE) if others[suffix]}
    if unreadable:
        named = ", ".join(f"{number} {suffix}" for suffix, number in unreadable.items())
        print(
            f"warning: {root}: {named} files are left out, they cannot be read; "
            "convert them, for example: ffmpeg -i IN OUT.flac",
            file=sys.stderr,
        )
    return sorted(found)


def read_header(path: Path) -> Header:
    """What the header alone says; a file that cannot be listed has a `fault`."""
    if any(character in str(path) for character in "\t\n\r"):
        return Header(fault="a tab or a line end in its name; rename it")
    try:
        str(path).encode()
        return Header(read_info(path))
    except UnicodeEncodeError:
        return Header(fault="its name is not UTF-8; rename it")
    except DataError as error:
        return Header(fault=str(error).removeprefix(f"{path}: "))


def read_headers(root: Path, paths: Sequence[str], workers: int = 8) -> list[Header]:
    """Headers of all files, read by `workers` threads (what takes time is mostly the disk or the network)."""
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    headers: list[Header] = []
    with (
        program.bar(total=len(paths), unit="file", desc="headers") as bar,
        ThreadPoolExecutor(max_workers=workers) as pool,
    ):
        for batch in pool.map(lambda batch: [read_header(root / path) for path in batch], batches):
            headers += batch
            bar.update(len(batch))
    return headers


def drop_bad(root: Path, paths: Sequence[str], headers: Sequence[Header], *, skip_bad: bool) -> dict[int, AudioInfo]:
    """Positions and headers of the files that can be listed; others are an error, or are reported with `skip_bad`."""
    bad = [position for position, header in enumerate(headers) if header.info is None]
    if bad:
        shown = "".join(f"\n  {paths[position]!r}: {headers[position].fault}" for position in bad[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        text = f"{root}: {len(bad)} of {len(paths)} files cannot be listed"
        if not skip_bad:
            raise DataError(f"{text}; mend or remove them, or leave them out with --skip_bad{shown}{more}")
        print(f"{text} and are left out{shown}{more}")
    return {position: header.info for position, header in enumerate(headers) if header.info is not None}


def conversions(infos: Iterable[AudioInfo], sample_rate: int) -> list[str]:
    """What reading does to every kind of source, most frequent first: "1,204 files 44.1 kHz stereo -> 16 kHz mono"."""
    target = AudioInfo("", "", sample_rate, 1, 0).kind
    lines = []
    for kind, number in Counter(info.kind for info in infos).most_common():
        count = f"{number:,} file" if number == 1 else f"{number:,} files"
        lines.append(f"{count} {kind}" + (f" -> {target}" if kind != target else ""))
    return lines


def scan(root: Path, extensions: Sequence[str], *, sample_rate: int = 16000, skip_bad: bool = False) -> FileList:
    """Find and list all audio below `root`, with lengths at `sample_rate`."""
    paths = find_audio(root, extensions)
    good = drop_bad(root, paths, read_headers(root, paths), skip_bad=skip_bad)
    lengths = tuple(info.num_samples(sample_rate) for info in good.values())
    return FileList(root, tuple(paths[i] for i in good), lengths)
