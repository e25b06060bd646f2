"""Converts a checkpoint: this toolkit, fairseq, NVIDIA DeepLearningExamples and Hugging Face, in every direction."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from common.errors import CheckpointError, ConfigError
from common.labels import Dictionary
from utils import program
from wav2vec2.convert.compare import TOLERANCE, changed_parts, differences
from wav2vec2.convert.contents import Contents, listed
from wav2vec2.convert.fairseq_settings import lr_scheduler
from wav2vec2.convert.load_any import WRITERS, load_any, with_dictionary

DICTIONARY = "dict.ltr.txt"  # what fairseq looks for in the folder of the data


def main(argv: list[str] | None = None) -> None:
    """Read, write to a temporary name, read back, compare, rename."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("input", metavar="IN", type=Path, help="file, or folder of Hugging Face; recognised by itself")
    parser.add_argument("output", metavar="OUT", type=Path, help="file, or with --to huggingface folder, to be made")
    parser.add_argument("--to", choices=list(WRITERS), required=True, help="format of OUT")
    parser.add_argument("--dictionary", type=Path, help="dict.ltr.txt of a fine-tuned model that has no symbols itself")
    parser.add_argument("--no_ema", action="store_true", help="huggingface: the weights themselves, not averaged ones")
    args = parser.parse(argv)
    if args.output.exists():
        raise ConfigError(f"{args.output}: is there already; remove it or name another")
    if args.to == "fairseq" and args.output.name == DICTIONARY:
        raise ConfigError(f"{args.output}: is the name of the dictionary beside the model; name another file")
    contents = load_any(args.input)
    if args.no_ema and not (args.to == "huggingface" and contents.averaged):
        raise ConfigError("--no_ema: has an effect only with --to huggingface and averaged weights; drop it")
    if args.dictionary:
        contents = with_dictionary(contents, str(args.input), args.dictionary)
    refuse_broken(contents, args.input)
    for remark in contents.remarks:
        print(f"note: {remark}")
    contents = as_target_holds_it(contents, args.to, use_average=not args.no_ema)
    convert(contents, args.output, args.to)
    print(f"{args.input} ({contents.source}) -> {args.output} ({args.to}), {contents.config.mode}")


def refuse_broken(contents: Contents, path: Path) -> None:
    """Weights that are not finite cannot be compared. Raises CheckpointError that lists them."""
    broken = [name for name, tensor in contents.weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{path}: holds weights that are not finite: {listed(broken)}; use an earlier checkpoint")


def as_target_holds_it(contents: Contents, target: str, *, use_average: bool) -> Contents:
    """The contents without what the target has no place for, which is told."""
    if target == "native":
        if any(tensor.dtype.itemsize > 4 for tensor in contents.weights.values()):
            print("note: float64 weights are rounded to float32")
        return contents
    for what in lost_options(contents, target):
        print(f"note: {target} has no place for {what}")
    if target != "huggingface":
        if contents.step is None:
            print(f"note: the input does not count its updates; {target} gets 0")
        return contents
    lost = {
        "the optimizer state": contents.optimizer,
        "the loss scale": contents.scaler,
        "the count of updates": contents.step,
        "the weights that are not averaged": contents.averaged and use_average,
        "the averaged weights": contents.averaged and not use_average,
    }
    for what, there in lost.items():
        if there:
            print(f"note: {target} has no place for {what}")
    weights = contents.inference_weights() if use_average else contents.weights
    return replace(
        contents, weights=weights, averaged=None, optimizer=None, scaler=None, loader=None, step=None, best=None
    )


def lost_options(contents: Contents, target: str) -> list[str]:
    """Options and positions that the target cannot say."""
    config, lost = contents.config, []
    if target == "huggingface":
        return ["options of training other than dropouts, masks and numbers of negatives"]
    if contents.loader and contents.loader["position"] and not contents.epoch_has_ended:
        lost.append("the position within the epoch")
    known = config.optim.lr_policy in ("poly", "exp") if target == "nvidia" else lr_scheduler(config)
    if not known:
        lost.append(f"this curve of the learning rate (--lr_policy {config.optim.lr_policy})")
    if config.precision.amp and config.precision.bf16:
        lost.append("autocast to bfloat16")
    if config.optim.ema and target == "fairseq":
        lost.append("the decay of the averaged weights")
    return lost


def convert(contents: Contents, output: Path, target: str) -> None:
    """Write `output`, and leave it only if reading it gives the same again. Raises CheckpointError."""
    partial = output.with_name(f".{output.name}.partial")
    with program.writing(output, partial):
        output.parent.mkdir(parents=True, exist_ok=True)
        dictionary = missing_dictionary(contents, output) if target == "fairseq" else None
        remove(partial)
        try:
            WRITERS[target](partial, contents)
            check(contents, load_any(partial), target)
            if dictionary:
                program.write_lines(output.parent / DICTIONARY, dictionary)
            partial.replace(output)
        finally:
            remove(partial)
    if dictionary:
        print(
            f"{output.parent / DICTIONARY}: the dictionary; fairseq looks for it in the folder that the file names, so "
            "after moving both give it task.data=FOLDER"
        )


def check(before: Contents, after: Contents, target: str) -> None:
    """Print how far both sides' outputs are apart on one waveform; CheckpointError if that is more than rounding.

    Weights, symbols and training state themselves must be equal, too: one waveform does not reach everything.
    """
    found = differences(before, after)
    worst = max(found, key=lambda name: found[name])
    print(f"largest difference on one waveform: {found[worst]:.1e} of the largest entry ({', '.join(found)})")
    if not found[worst] <= TOLERANCE:
        raise CheckpointError(
            f"--to {target}: {worst} differ by {found[worst]:.1e} of the largest entry, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    others = changed_parts(before, after)
    if others:
        raise CheckpointError(f"--to {target}: {listed(others)} would have other values; nothing was written")


def missing_dictionary(contents: Contents, output: Path) -> list[str] | None:
    """The lines of the dictionary file that belongs beside a fine-tuned model, unless the same is there."""
    path = output.parent / DICTIONARY
    if contents.config.mode == "pretrain":
        return None
    there = tuple(Dictionary.read(path).symbols) if path.exists() else None
    if contents.labels is None:
        print(f"note: the input does not name its symbols; fairseq will look for them in {path}")
    if there and (len(there) != contents.num_symbols or contents.labels not in (None, there)):
        raise ConfigError(f"{path}: is another model's dictionary; choose a folder without one for {output.name}")
    return Dictionary(contents.labels).lines() if contents.labels and not there else None


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    program.run(main)
