"""Makes a file list (.tsv) of all audio below a folder, with an optional random split for validation."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError, DataError
from utils import filelists, program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("dir", type=Path, help="folder to search, with everything below it")
    parser.add_argument("out", type=Path, help="the .tsv file to write")
    parser.add_argument(
        "--extensions",
        nargs="+",
        action="extend",
        metavar="EXT",
        help="name endings to list (default: wav flac)",
    )
    parser.add_argument(
        "--extension",
        action="append",
        dest="extensions",
        metavar="EXT",
        help="one more ending; may come before DIR",
    )
    parser.add_argument("--path_must_contain", default="", metavar="S", help="list only paths that contain S")
    parser.add_argument("--valid_percent", type=float, default=0.0, metavar="F", help="fraction for --valid_out, 0..1")
    parser.add_argument("--valid_out", type=Path, metavar="V.tsv", help="list of the files drawn for validation")
    parser.add_argument("--seed", type=int, default=42, help="seed of that draw")
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="leave out files that cannot be read or that training would refuse, and say which",
    )
    parser.add_argument("--sample_rate", type=int, default=16000, help="that of the model: others are warned of")
    parser.add_argument("--workers", type=int, default=8, help="files read at a time")
    args = parser.parse(argv)
    if not 0 <= args.valid_percent < 1:
        raise ConfigError(f"--valid_percent {args.valid_percent:g}: not in [0, 1); it is a fraction: 5 % is 0.05")
    if (args.valid_percent > 0) != (args.valid_out is not None):
        raise ConfigError("--valid_percent and --valid_out: one needs the other; give both or neither")
    if args.valid_out is not None and program.same_file(args.out, args.valid_out):
        raise ConfigError(f"--valid_out {args.valid_out}: is OUT too; give the two lists different names")
    if args.sample_rate < 1:
        raise ConfigError(f"--sample_rate {args.sample_rate}: not above 0; give it in Hz, such as 16000")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one is needed")
    return args


def draw_valid(count: int, fraction: float, seed: int) -> list[bool]:
    """Which of `count` sorted files go to validation: one number of random.Random(seed) for each."""
    numbers = random.Random(seed)
    return [numbers.random() <= fraction for _ in range(count)]


def write_list(out: Path, root: Path, paths: Sequence[str], headers: Sequence[filelists.Header]) -> None:
    """Write one list and say what is in it."""
    lengths = tuple(header.num_samples for header in headers)
    filelists.write_filelist(out, filelists.FileList(root, tuple(paths), lengths))
    seconds = sum(header.num_samples / header.sample_rate for header in headers)
    rates = Counter(header.sample_rate for header in headers)
    shown = ", ".join(f"{rate} Hz" if len(rates) == 1 else f"{n} at {rate} Hz" for rate, n in rates.most_common(3))
    print(f"{out}: {len(paths)} files, {seconds / 3600:.2f} h ({shown})")


def main(argv: list[str] | None = None) -> None:
    """Make the list."""
    args = parse_args(argv)
    if not args.dir.is_dir():
        raise DataError(f"{args.dir}: no such folder; give the folder that holds the audio")
    root = args.dir.resolve()
    paths = filelists.find_audio(root, args.extensions or ["wav", "flac"])
    paths = [path for path in paths if args.path_must_contain in path]
    if not paths:
        raise DataError(f"--path_must_contain {args.path_must_contain}: no path below {root} contains it")
    headers = filelists.read_headers(root, paths, args.workers)
    # Drawn before bad files are left out, so that a file that is mended later moves no other file.
    valid = draw_valid(len(paths), args.valid_percent, args.seed) if args.valid_out else [False] * len(paths)
    good = filelists.drop_bad(root, paths, headers, skip_bad=args.skip_bad)
    good = filelists.drop_unfit(root, paths, headers, good, sample_rate=args.sample_rate, skip_bad=args.skip_bad)
    parts = {out: [i for i in good if valid[i] == (out != args.out)] for out in [args.out, args.valid_out] if out}
    for out, part in parts.items():
        if not part:
            raise DataError(
                f"{out}: none of {len(good)} files falls to this list; change --valid_percent or --seed"
                if args.valid_out
                else f"{out}: no file is left; see --skip_bad and --sample_rate"
            )
    for out, part in parts.items():
        write_list(out, root, [paths[i] for i in part], [headers[i] for i in part])


if __name__ == "__main__":
    program.run(main)
