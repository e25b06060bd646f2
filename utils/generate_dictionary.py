"""Counts the symbols of .ltr label files into a dictionary: lines `symbol count`, the most frequent first."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError, DataError
from common.labels import Dictionary
from utils import program


def count_symbols(paths: Iterable[Path]) -> Counter[str]:
    """Counts of all symbols (separated by spaces) in the files."""
    counts = Counter[str]()
    for path in paths:
        try:
            own = Counter(path.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text; convert it") from error
        if not own:
            raise DataError(f"{path}: no symbols; make it with utils/libri_labels.py")
        if "|" not in own and max(map(len, own)) > 3:
            raise DataError(f"{path}: these are words, not letters; give the .ltr file, not the .wrd file")
        counts += own
    return counts


def check_output(out: Path, labels: Iterable[Path]) -> None:
    """ConfigError when `out` is or would be something else than a dictionary: a slip of the order must cost nothing."""
    if any(program.same_file(out, path) for path in labels):
        raise ConfigError(f"{out}: is among the label files; the dictionary comes last, such as dict.ltr.txt")
    if out.suffix in (".ltr", ".wrd", ".tsv"):
        raise ConfigError(f"{out}: is the name of labels or of a list; the dictionary comes last, such as dict.ltr.txt")
    if out.is_file() and out.stat().st_size:
        try:
            Dictionary.read(out)
        except DataError as error:
            raise ConfigError(f"{out}: exists and is not a dictionary; choose another name, or delete it") from error


def main(argv: list[str] | None = None) -> None:
    """Write the dictionary."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("labels", type=Path, nargs="+", metavar="IN.ltr", help="label files of the training lists")
    parser.add_argument("out", type=Path, metavar="dict.ltr.txt", help="the dictionary to write")
    args = parser.parse(argv)
    check_output(args.out, args.labels)
    counts = count_symbols(args.labels)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    program.write_lines(args.out, (f"{symbol} {count}" for symbol, count in ordered))
    print(f"{args.out}: {len(ordered)} symbols")


if __name__ == "__main__":
    program.run(main)
