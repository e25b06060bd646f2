"""Collects the LibriSpeech transcripts of a file list into NAME.ltr (characters) and NAME.wrd (words)."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from utils import filelists, program, transcripts


def main(argv: list[str] | None = None) -> None:
    """Write the labels, in the order of the list; words stay as they stand."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("filelist", type=Path, help="the .tsv file list")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the two label files")
    parser.add_argument("--output_name", required=True, metavar="NAME", help="name of the list, such as dev-other")
    args = parser.parse(argv)
    files = filelists.read_filelist(args.filelist)
    output = args.output_dir / args.output_name
    words = transcripts.write_labels(files.root, files.paths, args.filelist, output)
    print(f"{output}.ltr, .wrd: {len(files.paths)} lines, {words} words")


if __name__ == "__main__":
    program.run(main)
