"""Downloads the original wav2vec 2.0 checkpoints (fairseq) and their letter dictionary."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError, DataError
from utils import downloader, program

BASE_URL = "https://dl.fbaipublicfiles.com/fairseq/wav2vec"
# As published in fairseq's examples/wav2vec; LibriSpeech 960 h, or Libri-light 60 kh where it says LV-60.
FILES = {
    "wav2vec_small.pt": "Base, pre-trained",
    "wav2vec_small_10m.pt": "Base, fine-tuned on 10 min",
    "wav2vec_small_100h.pt": "Base, fine-tuned on 100 h",
    "wav2vec_small_960h.pt": "Base, fine-tuned on 960 h",
    "libri960_big.pt": "Large, pre-trained",
    "wav2vec_big_10m.pt": "Large, fine-tuned on 10 min",
    "wav2vec_big_100h.pt": "Large, fine-tuned on 100 h",
    "wav2vec_big_960h.pt": "Large, fine-tuned on 960 h",
    "wav2vec_vox_new.pt": "Large LV-60, pre-trained",
    "wav2vec_vox_10m_new.pt": "Large LV-60, fine-tuned on 10 min",
    "wav2vec_vox_100h_new.pt": "Large LV-60, fine-tuned on 100 h",
    "wav2vec2_vox_960h_new.pt": "Large LV-60, fine-tuned on 960 h",
    "wav2vec_vox_10m_pl.pt": "Large LV-60 with self-training, fine-tuned on 10 min",
    "wav2vec_vox_100h_pl.pt": "Large LV-60 with self-training, fine-tuned on 100 h",
    "wav2vec_vox_960h_pl.pt": "Large LV-60 with self-training, fine-tuned on 960 h",
    "dict.ltr.txt": "letter dictionary of all of them",
}
MAGIC = (b"PK\x03\x04", b"\x80")  # a checkpoint is a zip archive, or a pickle in older files


def full_name(name: str) -> str:
    """The published file name; `.pt` may be left out."""
    for file in (name, f"{name}.pt"):
        if file in FILES:
            return file
    raise ConfigError(f"{name}: not a published name; choose from {', '.join(FILES)}")


def check_kind(path: Path) -> None:
    """DataError, and the file is deleted, when it is no checkpoint but, say, a page of a proxy."""
    with path.open("rb") as file:
        if file.read(4).startswith(MAGIC):
            return
    path.unlink()
    raise DataError(f"{path}: what came is no checkpoint and was deleted; check the network and --base_url")


def main(argv: list[str] | None = None) -> None:
    """Fetch the named files that are not there yet."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("dir", type=Path, nargs="?", default=Path("results/pretrained"), help="folder for the files")
    parser.add_argument(
        "names", nargs="*", default=["wav2vec_small.pt"], help="which files (nothing: wav2vec_small.pt); see --list"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--base_url", default=BASE_URL, help="where the files lie (a mirror)")
    parser.add_argument("--attempts", type=int, default=5, help="tries in a row that bring nothing before giving up")
    args = parser.parse(argv)
    if args.list:
        print("\n".join(f"{name:26}{what}" for name, what in FILES.items()))
        return
    base_url = downloader.check_url("--base_url", args.base_url)
    for name in [full_name(name) for name in args.names]:
        path = args.dir / name
        if path.exists():
            print(f"{path} is there already (to fetch it again, delete it)")
            continue
        downloader.download(f"{base_url}/{name}", path, attempts=args.attempts)
        if path.suffix == ".pt":
            check_kind(path)
        print(f"{path}: done ({FILES[name]})")


if __name__ == "__main__":
    program.run(main)
