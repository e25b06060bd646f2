"""Makes a file list (.tsv) of all audio below a folder, with an optional random split for validation."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.data.audio import AudioInfo
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
        help="name endings to list (default: all that is read: wav, flac, mp3, ogg, opus, aiff, ...)",
    )
    parser.add_argument(
        "--extension",
        action="append",
        dest="extensions",
        metavar="EXT",
        help="one more ending; may come before DIR",
    )
    parser.add_argument("--path_must_contain", default="", metavar="S", help="list only paths that contain S")
    parser.add_argument("--valid_percent", type=float, metavar="F", help="fraction for --valid_out: 0.05; 0: one list")
    parser.add_argument("--valid_out", type=Path, metavar="V.tsv", help="list of the files drawn for validation")
    parser.add_argument("--seed", type=int, default=42, help="seed of that draw")
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="leave out files that cannot be read, and say which",
    )
    parser.add_argument("--sample_rate", type=int, default=16000, help="that of the model; lengths count at it")
    parser.add_argument("--workers", type=int, default=8, help="files read at a time")
    args = parser.parse(argv)
    fraction = 0.0 if args.valid_percent is None else args.valid_percent
    if not 0 <= fraction <= 1:
        raise ConfigError(f"--valid_percent {fraction:g}: not within 0 to 1; it is a fraction: 5 % is 0.05")
    if fraction == 1:
        raise ConfigError(f"--valid_percent 1: leaves no file for {args.out}; it is a fraction: 1 % is 0.01")
    # 0 is one list, whether or not the other has a name.
    if (args.valid_percent is None and args.valid_out is not None) or (fraction > 0 and args.valid_out is None):
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


def write_list(out: Path, root: Path, paths: Sequence[str], infos: Sequence[AudioInfo], sample_rate: int) -> None:
    """Write one list and say what is in it."""
    lengths = tuple(info.num_samples(sample_rate) for info in infos)
    filelists.write_filelist(out, filelists.FileList(root, tuple(paths), lengths))
    hours = sum(info.num_frames / info.sample_rate for info in infos) / 3600
    print(f"{out}: {len(paths):,} files, {hours:,.2f} h, lengths at {sample_rate} Hz")


def main(argv: list[str] | None = None) -> None:
    """Make the list."""
    args = parse_args(argv)
    for out in (args.out, args.valid_out):
        if out is not None:
            filelists.check_target(out)
    if not args.dir.is_dir():
        raise DataError(f"{args.dir}: no such folder; give the folder that holds the audio")
    root = args.dir.resolve()
    paths = filelists.find_audio(root, args.extensions or filelists.EXTENSIONS)
    paths = [path for path in paths if args.path_must_contain in path]
    if not paths:
        raise DataError(f"--path_must_contain {args.path_must_contain}: no path below {root} contains it")
    headers = filelists.read_headers(root, paths, args.workers)
    # Drawn before bad files are left out, so that a file that is mended later moves no other file.
    valid = draw_valid(len(paths), args.valid_percent, args.seed) if args.valid_percent else [False] * len(paths)
    good = filelists.drop_bad(root, paths, headers, skip_bad=args.skip_bad)
    outputs = [args.out, args.valid_out] if args.valid_percent else [args.out]
    parts = {out: [i for i in good if valid[i] == (out != args.out)] for out in outputs}
    for out, part in parts.items():
        if not part:
            raise DataError(
                f"{out}: none of {len(good)} files falls to this list; change --valid_percent or --seed"
                if args.valid_percent
                else f"{out}: no file is left; see --skip_bad"
            )
    for out, part in parts.items():
        write_list(out, root, [paths[i] for i in part], [good[i] for i in part], args.sample_rate)
    for line in filelists.conversions(good.values(), args.sample_rate):
        print(f"  {line}")


if __name__ == "__main__":
    program.run(main)
