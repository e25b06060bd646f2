"""Measure what the Hourglass transformer saves: throughput and peak memory of a training step, factor by factor.

    python benchmarks/hourglass.py --device cuda --size base --precision bf16 --batch 40 --seconds 15.6 --json OUT

The model without the Hourglass is beside the models with a third of the layers (Base: 4 of 12) at the full frame rate,
half of these before and half after, and the others at 1/factor of it. Number of layers and weights are the same.
Every round times all models, in turns from either end; memory is that of a fresh process each, as in
benchmarks/step.py. All models are in memory while they are timed. The file --json is one object:

    models                      a list of {factor (null: no Hourglass), hourglass, seconds {median, quartiles},
                                frames_per_s, masked_frames_per_s, throughput_ratio, throughput_ratio_quartiles,
                                memory_bytes {peak, before: ahead of the first step}, memory_ratio}. Ratios are over the
                                model without the Hourglass: medians of the rounds' ratios; above 1 is faster, below 1
                                is less memory
    rounds                      a list of {hourglass: seconds per step}
    setting                     sizes of model and batch, precision, device, repetitions
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from benchmarks.our_step import OurStep
from benchmarks.provenance import provenance
from benchmarks.step import STEPS_PER_ROUND, WARMUP_STEPS, check_writable, memory_in_fresh_process
from benchmarks.stopwatch import Stopwatch, summary
from benchmarks.workload import PRECISIONS, SIZES, SyntheticBatch, Workload, make_recipe
from common import distributed, flags
from common.entry import run_program
from common.errors import ConfigError
from common.flags import flag
from utils.program import write_lines

POST_LN = tuple(name for name, model in SIZES.items() if not model.layer_norm_first)  # what the Hourglass needs


@dataclass(frozen=True)
class HourglassFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=POST_LN)
    factors: tuple[int, ...] = flag((1, 2, 3, 4, 5, 6), "shortening factors", minimum=1)
    precision: str = flag("fp32", "number format", choices=PRECISIONS)
    batch: int = flag(8, "rows of the batch", minimum=1)
    seconds: float = flag(8.0, "length of a row, in seconds of audio", minimum=0.5)
    rounds: int = flag(7, "repetitions, all models in turn", minimum=1)
    steps: int = flag(0, "steps per repetition; 0: 1 on the CPU, 10 on a GPU", minimum=0)
    threads: int = flag(0, "threads of the CPU; 0: torch's own number", minimum=0)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")

    def of_step(self) -> list[str]:
        """The same for benchmarks/step.py, which measures the memory."""
        names = ("device", "size", "precision", "batch", "seconds", "threads")
        return [word for name in names for word in (f"--{name}", str(getattr(self, name)))]


def parse(argv: Sequence[str]) -> HourglassFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/hourglass.py",
        usage="benchmarks/hourglass.py --json OUT [FLAG ...]",
        description="Measure what the Hourglass transformer saves.",
    )
    flags.add_flags(parser, HourglassFlags, "pretrain", "what is measured")
    options = flags.from_namespace(HourglassFlags, parser.parse_args(list(argv)))
    if len(set(options.factors)) < len(options.factors):
        raise ConfigError(f"--factors {' '.join(map(str, options.factors))}: the same factor twice; remove one")
    return options


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with distributed.session(options.device) as device:
        check_writable(Path(options.json))
        models = hourglasses(SIZES[options.size].encoder_layers, options.factors)
        # first, while this process holds nothing on a GPU that they share
        memory = {name: memory_in_fresh_process([*options.of_step(), "--hourglass", name], "ours") for name in models}
        result = measure(options, device, models, memory) | provenance(device) | {"command": list(argv)}
        print(describe(result))
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def hourglasses(layers: int, factors: Sequence[int]) -> dict[str, int | None]:
    """The Hourglass of every factor, ahead of them "" for none; a sixth of the layers comes before, a sixth after."""
    edge = round(layers / 6)
    return {"": None, **{f"[{edge},({layers - 2 * edge},{factor}),{edge}]": factor for factor in factors}}


def measure(
    options: HourglassFlags,
    device: torch.device,
    models: dict[str, int | None],
    memory: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """All rounds, and what follows from them."""
    recipes = {name: make_recipe(options.size, name, options.precision) for name in models}
    precision, rate = recipes[""].precision, recipes[""].model.sample_rate
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.allow_tf32
    samples = round(options.seconds * rate)
    batch = Workload(recipes[""], device, options.batch, samples).batch()
    steppers = {name: OurStep(Workload(recipe, device, options.batch, samples)) for name, recipe in recipes.items()}
    stopwatch, steps = Stopwatch(device), options.steps or STEPS_PER_ROUND[device.type]
    for stepper in steppers.values():
        stopwatch.time(partial(stepper.step, batch), WARMUP_STEPS)
    rounds = []
    for number in range(options.rounds):
        order = list(steppers)[:: -1 if number % 2 else 1]  # no model is always the first
        rounds.append({name: stopwatch.time(partial(steppers[name].step, batch), steps) for name in order})
    sizes = {
        "samples": samples,
        "frames": batch.num_frames,
        "masked_frames": batch.num_masked,
        "steps_per_round": steps,
    }
    flags_taken = {name: value for name, value in flags.to_dict(options).items() if name not in ("json", "debug")}
    return {
        "models": [
            {"factor": factor, "hourglass": name} | figures(name, rounds, memory, batch)
            for name, factor in models.items()
        ],
        "rounds": [{name: one[name] for name in models} for one in rounds],
        "setting": flags_taken | sizes,
    }


def figures(
    name: str, rounds: list[dict[str, float]], memory: dict[str, dict[str, int]], batch: SyntheticBatch
) -> dict[str, Any]:
    """What one model needs, and how that compares to the model without the Hourglass."""
    seconds, ratio = summary([one[name] for one in rounds]), summary([one[""] / one[name] for one in rounds])
    return {
        "seconds": seconds,
        "frames_per_s": batch.num_frames / seconds["median"],
        "masked_frames_per_s": batch.num_masked / seconds["median"],
        "throughput_ratio": ratio["median"],
        "throughput_ratio_quartiles": ratio["quartiles"],
        "memory_bytes": memory[name],
        "memory_ratio": memory[name]["peak"] / memory[""]["peak"],
    }


def describe(result: dict[str, Any]) -> str:
    """A table for the console."""
    lines = [f"{'Hourglass':14} {'frames/s':>12} {'throughput':>10} {'[quartiles]':>14} {'MiB':>8} {'memory':>7}"]
    for model in result["models"]:
        low, high = model["throughput_ratio_quartiles"]
        lines.append(
            f"{model['hourglass'] or 'none':14} {model['frames_per_s']:12,.0f} {model['throughput_ratio']:10.2f} "
            f"{f'[{low:.2f}, {high:.2f}]':>14} {model['memory_bytes']['peak'] / 2**20:8,.0f} "
            f"{model['memory_ratio']:7.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
