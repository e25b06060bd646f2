"""Measure attention over padded rows: runs of rows of one length, each without a mask, beside a mask over all.

    python benchmarks/padding.py --device cuda --size base --precision bf16 --batch 40 --seconds 15.6 --json OUT

A training step is forward and backward through the transformer alone, once with keys as runs and once as a mask (see
`wav2vec2.attention.keys_of`), in turns from either end. Lengths fall evenly from --seconds to a quarter of it, over
--groups groups of rows of one length; as many groups as rows are rows that all differ. The file --json is one object:

    groups                      a list of {groups, rows_of_a_run, throughput_ratio (runs over mask, median of the
                                rounds), throughput_ratio_quartiles, seconds {runs, mask}, memory_ratio (GPU only)}
    setting                     sizes of model and batch, precision, device, repetitions
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from benchmarks.provenance import provenance
from benchmarks.step import STEPS_PER_ROUND, WARMUP_STEPS, check_writable
from benchmarks.stopwatch import Stopwatch, peak_memory, summary
from benchmarks.workload import SIZES, make_recipe
from common import distributed, flags
from common.entry import run_program
from common.errors import ConfigError
from common.flags import flag
from utils.program import write_lines
from wav2vec2.model import TransformerEncoder, num_frames

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PaddingFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=tuple(SIZES))
    precision: str = flag("fp32", "number format", choices=tuple(FORMATS))
    batch: int = flag(8, "rows of the batch", minimum=1)
    groups: tuple[int, ...] = flag((2, 4, 8), "groups of rows of one length", minimum=2)
    seconds: float = flag(15.0, "length of the longest row, in seconds of audio", minimum=0.5)
    rounds: int = flag(7, "repetitions, both forms in turn", minimum=1)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> PaddingFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/padding.py",
        usage="benchmarks/padding.py --json OUT [FLAG ...]",
        description="Measure attention over padded rows.",
    )
    flags.add_flags(parser, PaddingFlags, "pretrain", "what is measured")
    options = flags.from_namespace(PaddingFlags, parser.parse_args(list(argv)))
    if options.batch < max(options.groups):
        raise ConfigError(f"--groups {max(options.groups)}: more than --batch {options.batch} rows; lower it")
    return options


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    with distributed.session(options.device) as device:
        check_writable(Path(options.json))
        found = [measure(options, device, groups) for groups in options.groups]
        for group in found:
            low, high = group["throughput_ratio_quartiles"]
            print(f"{group['groups']:4} groups: {group['throughput_ratio']:.2f} [{low:.2f}, {high:.2f}] x a mask")
        taken = {name: value for name, value in flags.to_dict(options).items() if name not in ("json", "debug")}
        result = {"groups": found, "setting": taken} | provenance(device) | {"command": list(argv)}
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def group_lengths(rows: int, groups: int, longest: int) -> list[int]:
    """Frames of every row, longest first."""
    return [longest - longest * 3 * (row * groups // rows) // (4 * (groups - 1)) for row in range(rows)]


def measure(options: PaddingFlags, device: torch.device, groups: int) -> dict[str, Any]:
    """Both forms on rows of so many lengths."""
    recipe = make_recipe(options.size)
    frames = num_frames(round(options.seconds * recipe.model.sample_rate), recipe.model.conv_layers())
    lengths = group_lengths(options.batch, groups, frames)
    forms = _forms(TransformerEncoder(recipe.model, recipe.dropout), lengths, FORMATS[options.precision], device)
    stopwatch, steps = Stopwatch(device), STEPS_PER_ROUND[device.type]
    for form in forms.values():
        stopwatch.time(form, WARMUP_STEPS)
    rounds = []
    for number in range(options.rounds):
        order = list(forms)[:: -1 if number % 2 else 1]
        rounds.append({name: stopwatch.time(forms[name], steps) for name in order})
    ratio = summary([one["mask"] / one["runs"] for one in rounds])
    peaks = {name: peak_memory(form, 1, device)["peak"] for name, form in forms.items() if device.type == "cuda"}
    return {
        "groups": groups,
        "rows_of_a_run": options.batch / groups,
        "throughput_ratio": ratio["median"],
        "throughput_ratio_quartiles": ratio["quartiles"],
        "seconds": {name: summary([one[name] for one in rounds]) for name in forms},
        "memory_ratio": peaks["runs"] / peaks["mask"] if peaks else None,
    }


def _forms(
    encoder: TransformerEncoder, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], None]]:
    """A training step of the transformer in both forms."""
    encoder = encoder.to(device, dtype).train()
    x_BTD = torch.randn(len(lengths), max(lengths), encoder.layer_norm.normalized_shape[0]).to(device, dtype)
    lengths_B = torch.tensor(lengths, device=device)

    def step(known: list[int] | None) -> None:
        encoder.zero_grad()
        with patch("wav2vec2.attention.ROWS_OF_A_RUN", {"cpu": 1, "cuda": 1}):  # to see where it stops to pay
            encoder(x_BTD, lengths_B, frame_lengths=known).sum().backward()

    return {"runs": lambda: step(lengths), "mask": lambda: step(None)}


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
