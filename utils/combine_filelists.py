"""Joins several file lists, with their .ltr and .wrd labels where they have them, into one list."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError, DataError
from utils import filelists, program


def combine(lists: Sequence[filelists.FileList]) -> filelists.FileList:
    """One list below the nearest common folder of all roots, in the order given."""
    roots = [files.root.absolute() for files in lists]
    common = Path(os.path.commonpath(roots))
    paths: list[str] = []
    for root, files in zip(roots, lists, strict=True):
        paths += [(root.relative_to(common) / path).as_posix() for path in files.paths]
    return filelists.FileList(common, tuple(paths), tuple(n for files in lists for n in files.num_samples))


def read_labels(tsvs: Sequence[Path], lists: Sequence[filelists.FileList], suffix: str) -> list[str]:
    """The label lines of all lists in order; [] when no list has labels."""
    labels = [tsv.with_suffix(suffix) for tsv in tsvs]
    missing = [path for path in labels if not path.is_file()]
    if len(missing) == len(labels):
        return []
    if missing:
        raise DataError(f"{missing[0]}: missing, but other lists have labels; make it with utils/libri_labels.py")
    lines: list[str] = []
    for path, files in zip(labels, lists, strict=True):
        own = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        if len(own) != len(files.paths):
            raise DataError(f"{path}: {len(own)} lines for {len(files.paths)} files; make it again")
        lines += own
    return lines


def main(argv: list[str] | None = None) -> None:
    """Write the joined list and labels."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("filelists", type=Path, nargs="+", metavar="LIST.tsv", help="lists, labels beside them")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.tsv", help="the list to write")
    args = parser.parse(argv)
    for path in [*args.filelists, args.output]:
        if path.suffix != ".tsv":
            raise ConfigError(f"{path}: the name of a file list ends in .tsv")
    if any(program.same_file(args.output, path) for path in args.filelists):
        raise ConfigError(f"--output {args.output}: is among the lists to join; choose another name")
    lists = [filelists.read_filelist(path) for path in args.filelists]
    labels = {suffix: read_labels(args.filelists, lists, suffix) for suffix in (".ltr", ".wrd")}
    joined = combine(lists)
    twice = len(joined.paths) - len(set(joined.paths))
    filelists.write_filelist(args.output, joined)
    for suffix, lines in labels.items():
        if lines:
            program.write_lines(args.output.with_suffix(suffix), lines)
    print(
        f"{args.output}: {len(joined.paths)} files of {len(lists)} lists"
        + ("" if labels[".ltr"] else ", without labels")
        + (f"; {twice} are in it more than once" if twice else "")
    )


if __name__ == "__main__":
    program.run(main)
