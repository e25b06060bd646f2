"""File lists (.tsv): find audio below a folder, read its headers, read and write the lists."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile

from common.data.audio import CONTAINERS, CONVERT
from common.errors import DataError
from utils import program

UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's answer for a FLAC whose header gives no length
BATCH = 100  # files per task: one task per file would cost more than reading the header


@dataclass(frozen=True)
class FileList:
    """Audio files below one root folder, with their lengths in samples."""

    root: Path
    paths: tuple[str, ...]
    num_samples: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file's header says; `fault` is empty when the file can be listed."""

    num_samples: int = 0
    sample_rate: int = 0
    channels: int = 1
    container: str = ""
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
    return sorted(found)


def read_header(path: Path) -> Header:
    """What the header alone says; a file that cannot be listed has a `fault`."""
    if any(character in str(path) for character in "\t\n\r"):
        return Header(fault="a tab or a line end in its name; rename it")
    try:
        str(path).encode()
        with soundfile.SoundFile(path) as file:
            header = Header(file.frames, file.samplerate, file.channels, file.format)
    except UnicodeEncodeError:
        return Header(fault="its name is not UTF-8; rename it")
    except (soundfile.LibsndfileError, OSError) as error:
        return Header(fault=getattr(error, "error_string", None) or str(error))
    if header.num_samples == 0:
        return Header(fault="no samples")
    if header.num_samples == UNKNOWN_LENGTH:
        return Header(fault="its header gives no length; encode it again")
    return header


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


def drop_bad(root: Path, paths: Sequence[str], headers: Sequence[Header], *, skip_bad: bool) -> list[int]:
    """Positions of the files that can be listed; the others are an error, or reported with `skip_bad`."""
    bad = [position for position, header in enumerate(headers) if header.fault]
    if bad:
        shown = "".join(f"\n  {paths[position]!r}: {headers[position].fault}" for position in bad[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        text = f"{root}: {len(bad)} of {len(paths)} files cannot be listed"
        if not skip_bad:
            raise DataError(f"{text}; mend or remove them, or leave them out with --skip_bad{shown}{more}")
        print(f"{text} and are left out{shown}{more}")
    return [position for position, header in enumerate(headers) if not header.fault]


def drop_unfit(
    root: Path,
    paths: Sequence[str],
    headers: Sequence[Header],
    positions: Sequence[int],
    *,
    sample_rate: int,
    skip_bad: bool,
) -> list[int]:
    """Warn of files that training refuses, by kind; `positions` without them with `skip_bad`, else as they are."""
    kinds = {
        "not WAV or FLAC": [(i, headers[i].container) for i in positions if headers[i].container not in CONTAINERS],
        f"not at {sample_rate} Hz": [
            (i, f"{headers[i].sample_rate} Hz") for i in positions if headers[i].sample_rate != sample_rate
        ],
        "not mono": [(i, f"{headers[i].channels} channels") for i in positions if headers[i].channels != 1],
    }
    unfit: set[int] = set()
    for kind, found in kinds.items():
        if found:
            unfit.update(position for position, _ in found)
            first, what = found[0]
            print(
                f"warning: {len(found)} of {len(paths)} files are {kind}, such as {paths[first]!r} ({what}); "
                + ("left out" if skip_bad else f"training refuses them: {CONVERT.format(rate=sample_rate)}"),
                file=sys.stderr,
            )
    if not skip_bad:
        return list(positions)
    if unfit:
        print(f"{root}: {len(unfit)} of {len(paths)} files would be refused in training and are left out")
    return [position for position in positions if position not in unfit]


def scan(root: Path, extensions: Sequence[str], *, skip_bad: bool = False) -> FileList:
    """Find and list all audio below `root`."""
    paths = find_audio(root, extensions)
    headers = read_headers(root, paths)
    good = drop_bad(root, paths, headers, skip_bad=skip_bad)
    return FileList(root, tuple(paths[i] for i in good), tuple(headers[i].num_samples for i in good))
