"""Makes the lists of Libri-light's 1 h and 10 h fine-tuning sets, and of the 100 h set (train-clean-100)."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import DataError
from utils import filelists, program, transcripts

# 1h holds six sets of ten minutes; the 10 h set is 1h and 9h together.
ONE_HOUR = [f"1h/{part}/{kind}" for part in range(6) for kind in ("clean", "other")]
NINE_HOURS = ["9h/clean", "9h/other"]


def write_subset(name: str, output_dir: Path, files: filelists.FileList) -> None:
    """Write NAME.tsv, .ltr and .wrd and say how long the set is."""
    tsv = output_dir / f"{name}.tsv"
    filelists.write_filelist(tsv, files)
    transcripts.write_labels(files.root, files.paths, tsv, output_dir / name)
    print(f"{tsv}: {len(files.paths)} files, {sum(files.num_samples) / 16000 / 3600:.2f} h at 16 kHz")


def main(argv: list[str] | None = None) -> None:
    """Write train-1h, train-10h and, with --filelists, train-100h."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("finetuning_dir", type=Path, help="the folder librispeech_finetuning of Libri-light")
    parser.add_argument("output_dir", type=Path, help="folder for the lists and labels")
    parser.add_argument("--filelists", type=Path, help="folder with train-clean-100.tsv/.ltr/.wrd: adds train-100h")
    args = parser.parse(argv)
    for part in ONE_HOUR + NINE_HOURS:
        if not (args.finetuning_dir / part).is_dir():
            raise DataError(
                f"{args.finetuning_dir / part}: no such folder; fetch the set with "
                "utils/download_librispeech.py DIR --subsets librispeech_finetuning"
            )
    hundred = (
        [args.filelists / f"train-clean-100{suffix}" for suffix in (".tsv", ".ltr", ".wrd")] if args.filelists else []
    )
    for path in hundred:
        if not path.is_file():
            raise DataError(f"{path}: no such file; make it with scripts/generate_filelists.sh")

    every = filelists.scan(args.finetuning_dir.resolve(), ["flac"])
    for name, folders in {"train-1h": ONE_HOUR, "train-10h": ONE_HOUR + NINE_HOURS}.items():
        keep = [i for i, path in enumerate(every.paths) if path.startswith(tuple(f"{part}/" for part in folders))]
        files = filelists.FileList(
            every.root, tuple(every.paths[i] for i in keep), tuple(every.num_samples[i] for i in keep)
        )
        write_subset(name, args.output_dir, files)
    for path in hundred:
        copy = args.output_dir / f"train-100h{path.suffix}"
        with program.writing(copy):
            shutil.copyfile(path, copy)
        print(f"{copy}: the same as {path}")


if __name__ == "__main__":
    program.run(main)
