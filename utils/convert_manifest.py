"""Converts a file list (.tsv, with its .ltr and .wrd) to a JSON-lines manifest (.json, .jsonl), or back.

Both name the same files with the same lengths and texts in the same order; what only one of them can say (a part of a
recording, labels that are not characters) is refused, and fields that neither training nor lists know are left out.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np

from common.data import manifest_files
from common.data.audio import read_info
from common.data.manifest import JSON_SUFFIXES, Manifest
from common.data.manifest_files import SHARD_PATH, Columns
from common.errors import ConfigError, DataError, shown
from common.labels import spell, words
from utils import program

BATCH = 1000  # files whose headers are asked for at a time


def main(argv: list[str] | None = None) -> None:
    """Convert in the direction that the names say."""
    args = _parse(argv)
    if args.input.suffix == ".tsv":
        _to_json(args.input, args.output, labels=args.labels, sample_rate=args.sample_rate)
    else:
        _to_tsv(args.input, args.output, root=args.root, sample_rate=args.sample_rate, read_lengths=args.read_lengths)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ConfigError for names that give no direction and for flags of the other direction."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("input", type=Path, metavar="IN", help="LIST.tsv, MANIFEST.json or MANIFEST.jsonl")
    parser.add_argument("output", type=Path, metavar="OUT", help="the other kind, told by its ending")
    parser.add_argument("--sample_rate", type=int, default=16000, metavar="HZ", help="of the numbers of samples")
    parser.add_argument(
        "--labels",
        choices=("ltr", "wrd"),
        help="to JSON: which labels beside the list become texts; ltr where there are any",
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="to TSV: root folder of the list; else the common folder of all files"
    )
    parser.add_argument(
        "--read_lengths",
        action="store_true",
        help="to TSV: lengths from the headers of the files, where the durations of the manifest were rounded",
    )
    args = parser.parse(argv)
    for path in (args.input, args.output):
        if path.suffix not in (".tsv", *JSON_SUFFIXES):
            raise ConfigError(f"{path}: the name of a list ends in .tsv, that of a manifest in .json or .jsonl")
    from_list, to_list = (path.suffix == ".tsv" for path in (args.input, args.output))
    if from_list == to_list:
        raise ConfigError(f"{args.output}: the same kind as {args.input.name}; name one .tsv and one .json file")
    if args.sample_rate < 1:
        raise ConfigError(f"--sample_rate {args.sample_rate}: a rate is at least 1 Hz; 16000 is the models'")
    for flag, given, use in (
        ("--labels", args.labels is not None and to_list, "the texts of a manifest stand in it"),
        ("--root", args.root is not None and from_list, "the root stands in the list"),
        ("--read_lengths", args.read_lengths and from_list, "the lengths of a list are exact"),
    ):
        if given:
            raise ConfigError(f"{flag}: has no effect from {args.input.suffix} to {args.output.suffix}, {use}; omit it")
    return args


def _to_json(tsv: Path, output: Path, *, labels: str | None, sample_rate: int) -> None:
    """Write a list as a manifest; a relative root gives relative paths."""
    columns, num_samples = manifest_files.read_tsv(tsv)
    texts = None
    if labels or tsv.with_suffix(".ltr").is_file():
        path = tsv.with_suffix(f".{labels or 'ltr'}")
        lines = manifest_files.read_labels(path, tsv, len(num_samples))
        texts = (_plain(lines[row], f"{path}:{row + 1}", path.suffix) for row in range(len(lines)))
    root = _moved_root(_root_line(tsv), tsv.parent, output.parent)
    entries = _entries(columns, num_samples, root, texts, sample_rate)
    program.write_lines(output, (json.dumps(entry, ensure_ascii=False) for entry in entries))
    hours = float(num_samples.sum()) / sample_rate / 3600
    print(f"{output}: {len(num_samples)} entries, {hours:.2f} hours, {'with' if texts else 'without'} text")


def _entries(
    columns: Columns, num_samples: np.ndarray, root: str, texts: Iterator[str] | None, sample_rate: int
) -> Iterator[dict[str, object]]:
    for row in range(len(num_samples)):
        entry: dict[str, object] = {
            "audio_filepath": os.path.join(root, columns.paths[row]),  # noqa: PTH118 - a path within a shard too
            "duration": int(num_samples[row]) / sample_rate,
        }
        if texts is not None:
            entry["text"] = next(texts)
        yield entry


def _plain(line: str, where: str, suffix: str) -> str:
    """The text of a label line; DataError for one that would not come back from it as it is."""
    line = " ".join(line.split())
    if suffix == ".wrd":
        if "|" in line:
            raise DataError(f"{where}: {shown(line)} has a '|', which marks the end of a word in labels; remove it")
        return line
    text = words(line)
    if spell(text) != line:
        raise DataError(
            f"{where}: {shown(line)} is not spelt as characters with '|' after each word, and text can say no more "
            "than that; correct the line, keep the list, or convert it with --labels wrd"
        )
    return text


def _root_line(tsv: Path) -> str:
    with tsv.open(encoding="utf-8-sig") as file:
        return file.readline().strip()


def _moved_root(root: str, old: Path, new: Path) -> str:
    """A root that is relative to the folder `old`, as it has to stand in a file in `new`; "" for this folder itself."""
    if not Path(root).is_absolute() and old.resolve() != new.resolve():
        root = os.path.relpath((old / root).resolve(), new.resolve())
    return "" if root == "." else root


def _to_tsv(json_path: Path, output: Path, *, root: Path | None, sample_rate: int, read_lengths: bool) -> None:
    """Write a manifest as a list and, when it has texts, its .ltr and .wrd labels."""
    for labels in (output.with_suffix(".ltr"), output.with_suffix(".wrd")):
        if labels.exists() and not output.exists():  # not of an earlier conversion
            raise ConfigError(f"{labels}: is there without {output.name}, and would be lost; give OUT another name")
    columns, num_samples = manifest_files.read_json(json_path, sample_rate=sample_rate, text=True)
    rows = range(len(num_samples))
    if columns.starts is not None and (columns.starts > 0).any():
        row = int(np.flatnonzero(columns.starts > 0)[0])
        raise DataError(
            f"{columns.where(row)}: has an offset, and a list can only name whole files; keep the manifest, "
            "which training reads as well, or cut the recording into files"
        )
    texts = columns.texts
    if texts is not None and columns.textless is not None:
        raise DataError(
            f"{columns.where(columns.textless)}: no text, though others have one; add it, or remove all texts"
        )
    root_line, paths = _below_root(columns, root, output.parent)
    if read_lengths:
        num_samples = _true_lengths(columns, num_samples, sample_rate)
    if texts is not None:
        program.write_lines(output.with_suffix(".ltr"), (spell(texts[row]) for row in rows))
        program.write_lines(output.with_suffix(".wrd"), (" ".join(texts[row].split()) for row in rows))
    lines = (f"{path}\t{samples}" for path, samples in zip(paths, num_samples.tolist(), strict=True))
    program.write_lines(output, [root_line, *lines])
    hours = float(num_samples.sum()) / sample_rate / 3600
    print(
        f"{output}: {len(rows)} files, {hours:.2f} hours, "
        + ("with .ltr and .wrd" if texts is not None else "without labels")
        + ("" if columns.speakers is None else "; speakers are not in it, which a list cannot name")
    )
    if not read_lengths:
        print("lengths are those of the durations; where training finds others, convert with --read_lengths")


def _below_root(columns: Columns, root: Path | None, folder: Path) -> tuple[str, list[str]]:
    """The root line of a list in `folder`, and all paths below it; relative paths only give a relative root."""
    paths = [_tidy(columns.paths[row]) for row in range(len(columns.paths))]
    relative = root is None and not any(path.startswith("/") for path in paths)
    if not relative:
        base = str(columns.root.absolute())
        paths = [os.path.join(base, path) for path in paths]  # noqa: PTH118 - no Path per file
    if root is None:
        folders = {_folder(path) for path in paths}
        common = os.path.commonpath(folders)
        line = _moved_root(common or ".", columns.root, folder) if relative else common
    else:
        common = line = str(root.absolute())
    if line != line.strip() or any(character in line for character in "\t\n\r"):
        raise DataError(
            f"{columns.path}: the root folder {shown(line)} has a tab, a line end or outer spaces; rename it"
        )
    start = common.rstrip("/") + "/" if common else ""
    for row, path in enumerate(paths):
        if not path.startswith(start):
            raise DataError(f"{columns.where(row)}: {shown(path)} is not below --root {root}; name a folder above all")
        if any(character in path for character in "\t\n\r"):
            raise DataError(f"{columns.where(row)}: {shown(path)} has a tab or a line end in its name; rename the file")
    return line or ".", [path.removeprefix(start) for path in paths]


def _tidy(path: str) -> str:
    """A path without parts that say nothing (`./a//b` is `a/b`); `..` stays, which may lead through a link."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "/" * path.startswith("/") + "/".join(parts)


def _folder(path: str) -> str:
    """The folder of a file, or of the shard that it is in."""
    shard = SHARD_PATH.match(path)
    return (shard[1] if shard else path).rpartition("/")[0] or "/" * path.startswith("/")


def _true_lengths(columns: Columns, num_samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Numbers of samples by the headers; DataError for a file that differs from its duration by more than rounding."""
    manifest = Manifest((columns,), num_samples, name=columns.path.stem)

    def length(row: int) -> int:
        utterance = manifest[row]
        whole = replace(utterance.clip, start=None, seconds=None)  # an offset of 0 may still mean a part
        return read_info(whole, utterance.where).num_samples(sample_rate)

    lengths: list[int] = []
    with (
        program.bar(total=len(manifest), unit="file", desc="headers") as bar,
        ThreadPoolExecutor(max_workers=8) as pool,
    ):
        for first in range(0, len(manifest), BATCH):
            lengths += pool.map(length, range(first, min(first + BATCH, len(manifest))))
            bar.update(len(lengths) - first)
    true = np.array(lengths, np.int64)
    wrong = np.flatnonzero(np.abs(true - num_samples) > columns.tolerance)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{columns.where(row)}: has {true[row]} samples at {sample_rate} Hz, but its duration is that of "
            f"{num_samples[row]} ({len(wrong)} such files); correct the durations, or keep the manifest "
            "where they mean parts of files"
        )
    return true


if __name__ == "__main__":
    program.run(main)
