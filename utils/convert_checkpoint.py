"""Converts a checkpoint: this toolkit, fairseq, NVIDIA DeepLearningExamples and Hugging Face, in every direction."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from common.errors import CheckpointError, ConfigError
from common.labels import SPECIAL_SYMBOLS
from utils import program
from wav2vec2.convert import fairseq, huggingface, native, nvidia
from wav2vec2.convert.compare import TOLERANCE, differences
from wav2vec2.convert.contents import Contents, listed
from wav2vec2.convert.load_any import FORMATS, load_any, with_dictionary

WRITERS: dict[str, Callable[[Path, Contents], None]] = {
    "native": native.write,
    "fairseq": fairseq.write,
    "nvidia": nvidia.write,
    "huggingface": huggingface.write,
}


def main(argv: list[str] | None = None) -> None:
    """Read, write to a temporary name, read back, compare, rename."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("input", metavar="IN", type=Path, help="file, or folder of Hugging Face; recognised by itself")
    parser.add_argument("output", metavar="OUT", type=Path, help="file, or with --to huggingface folder, to be made")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format of OUT")
    parser.add_argument("--dictionary", type=Path, help="dict.ltr.txt of a fine-tuned model that has no symbols itself")
    parser.add_argument("--no_ema", action="store_true", help="huggingface: the weights themselves, not averaged ones")
    args = parser.parse(argv)
    if args.output.exists():
        raise ConfigError(f"{args.output}: is there already; remove it or name another")
    contents = load_any(args.input)
    if args.dictionary:
        contents = with_dictionary(contents, str(args.input), args.dictionary)
    for remark in contents.remarks:
        print(f"note: {remark}")
    contents = as_target_holds_it(contents, args.to, use_average=not args.no_ema)
    convert(contents, args.output, args.to)
    print(f"{args.input} ({contents.source}) -> {args.output} ({args.to}), {contents.config.mode}")


def as_target_holds_it(contents: Contents, target: str, *, use_average: bool) -> Contents:
    """The contents without what the target has no place for, which is told."""
    if target == "native":
        if any(tensor.dtype.itemsize > 4 for tensor in contents.weights.values()):
            print("note: float64 weights are rounded to float32")
        return contents
    lost = []
    if contents.loader and contents.loader["position"]:
        lost.append("the position within the epoch")
    if target == "huggingface":
        lost.append("options of training other than dropouts, masks and numbers of negatives")
        lost += [
            what
            for what, there in (
                ("the optimizer state", contents.optimizer),
                ("the loss scale", contents.scaler),
                ("the count of updates", contents.step),
                ("the weights that are not averaged", contents.averaged and use_average),
                ("the averaged weights", contents.averaged and not use_average),
            )
            if there
        ]
        weights = contents.inference_weights() if use_average else contents.weights
        contents = replace(contents, weights=weights, averaged=None, optimizer=None, scaler=None, loader=None)
    for what in lost:
        print(f"note: {target} has no place for {what}")
    return contents


def convert(contents: Contents, output: Path, target: str) -> None:
    """Write `output`, and leave it only if one waveform gives the same with its weights. Raises CheckpointError."""
    partial = output.with_name(f".{output.name}.partial")
    with program.writing(output, partial):
        output.parent.mkdir(parents=True, exist_ok=True)
        dictionary = fairseq_dictionary(contents, output) if target == "fairseq" else {}
        remove(partial)
        try:
            WRITERS[target](partial, contents)
            check(contents, load_any(partial), target)
            partial.replace(output)
        finally:
            remove(partial)
        for path, lines in dictionary.items():
            program.write_lines(path, lines)
            print(f"{path}: the dictionary, which fairseq looks for in its folder 'task.data'")


def check(before: Contents, after: Contents, target: str) -> None:
    """Print how far both sides' outputs are apart on one waveform; CheckpointError if that is more than rounding.

    The weights themselves must be equal, too: one waveform does not reach everything.
    """
    found = differences(before, after)
    worst = max(found, key=lambda name: found[name])
    print(f"largest difference on one waveform: {found[worst]:.1e} of the largest entry ({', '.join(found)})")
    if not found[worst] <= TOLERANCE:
        raise CheckpointError(
            f"--to {target}: {worst} differ by {found[worst]:.1e} of the largest entry, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    others = [
        name
        for name in {**before.weights, **after.weights}
        if name not in before.weights
        or name not in after.weights
        or not torch.equal(before.weights[name].to(after.weights[name].dtype), after.weights[name])
    ]
    if others:
        raise CheckpointError(f"--to {target}: {listed(others)} would have other values; nothing was written")


def fairseq_dictionary(contents: Contents, output: Path) -> dict[Path, list[str]]:
    """The dictionary file that belongs beside a fine-tuned model, unless the same is there."""
    if not contents.labels:
        return {}
    path, symbols = output.parent / "dict.ltr.txt", contents.labels[len(SPECIAL_SYMBOLS) :]
    if path.exists():
        there = [line.split(" ")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        if there == list(symbols):
            return {}
        raise ConfigError(f"{path}: is another model's dictionary; choose a folder without one for {output.name}")
    return {path: [f"{symbol} {len(symbols) - i}" for i, symbol in enumerate(symbols)]}


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    program.run(main)
