"""Downloads and unpacks LibriSpeech and Libri-light's fine-tuning sets; can be stopped and started again."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError, DataError
from utils import downloader, program

OPENSLR = "https://www.openslr.org/resources/12"
LIBRILIGHT = "https://dl.fbaipublicfiles.com/librilight/data"
FINETUNING = "librispeech_finetuning"  # Libri-light's 10 min, 1 h and 10 h
SUBSETS = ["train-clean-100", "train-clean-360", "train-other-500"]
SUBSETS += ["dev-clean", "dev-other", "test-clean", "test-other"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("dir", type=Path, help="folder for the subsets: DIR/dev-clean and so on")
    parser.add_argument("--subsets", nargs="+", default=SUBSETS, metavar="NAME", help=f"which ones; also: {FINETUNING}")
    parser.add_argument("--base_url", default=OPENSLR, help="where LibriSpeech's archives lie (a mirror)")
    parser.add_argument("--librilight_url", default=LIBRILIGHT, help=f"where {FINETUNING}.tgz lies")
    parser.add_argument("--keep_archives", action="store_true", help="do not delete an archive once it is unpacked")
    parser.add_argument("--attempts", type=int, default=5, help="tries in a row that bring nothing before giving up")
    args = parser.parse(argv)
    for name in args.subsets:
        if name not in [*SUBSETS, FINETUNING]:
            raise ConfigError(f"--subsets {name}: not known; choose from {', '.join([*SUBSETS, FINETUNING])}")
    if args.attempts < 1:
        raise ConfigError(f"--attempts {args.attempts}: at least one is needed")
    args.base_url = downloader.check_url("--base_url", args.base_url)
    args.librilight_url = downloader.check_url("--librilight_url", args.librilight_url)
    return args


def read_checksums(base_url: str) -> dict[str, str]:
    """File name -> md5, from the list that openslr publishes; {} when it cannot be had."""
    text = downloader.fetch_text(f"{base_url}/md5sum.txt")
    rows = [line.split() for line in (text or "").splitlines()]
    checksums = {row[1].lstrip("*"): row[0] for row in rows if len(row) == 2 and len(row[0]) == 32}
    if not checksums:
        print(f"{base_url}/md5sum.txt cannot be had: archives are checked by their size only", file=sys.stderr)
    return checksums


def unpack_subset(archive: Path, name: str, folder: Path) -> None:
    """Unpack one archive so that FOLDER/NAME appears only when it is whole."""
    partial = folder / f".{name}.partial"
    with program.writing(folder / name, partial):
        shutil.rmtree(partial, ignore_errors=True)
        downloader.unpack(archive, partial)
        inner = partial / "LibriSpeech" / name  # openslr's archives; Libri-light's begin with the name
        inner = inner if inner.is_dir() else partial / name
        if not inner.is_dir():
            shutil.rmtree(partial)
            raise DataError(f"{archive}: holds no folder {name}; it is another archive: delete it and run again")
        for text in inner.parent.glob("*.TXT"):  # SPEAKERS.TXT and others, the same in every archive
            text.replace(folder / text.name)
        inner.replace(folder / name)
        shutil.rmtree(partial)


def main(argv: list[str] | None = None) -> None:
    """Fetch what is not there yet, one subset after the other."""
    args = parse_args(argv)
    missing = [name for name in args.subsets if not (args.dir / name).is_dir()]
    for name in args.subsets:
        if name not in missing:
            print(f"{args.dir / name} is there already (to fetch it again, delete it)")
    openslr = any(name != FINETUNING for name in missing)
    checksums = read_checksums(args.base_url) if openslr else {}
    for name in missing:
        file = f"{name}.tgz" if name == FINETUNING else f"{name}.tar.gz"
        base_url = args.librilight_url if name == FINETUNING else args.base_url
        archive = args.dir / file
        if not archive.exists():
            downloader.download(f"{base_url}/{file}", archive, md5=checksums.get(file), attempts=args.attempts)
        unpack_subset(archive, name, args.dir)
        if not args.keep_archives:
            archive.unlink()
        print(f"{args.dir / name}: done")


if __name__ == "__main__":
    program.run(main)
