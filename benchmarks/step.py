"""Measure one training step on synthetic audio: this toolkit, alone or beside another implementation.

    python benchmarks/step.py --device cpu --size base --batch 2 --seconds 5 --against huggingface --json OUT

What every figure means, and what a runner file looks like: docs/performance.md. The file --json is one object:

    ratio, ratio_quartiles      throughput of ours over the peer's: median over the rounds; null without a peer
    memory_ratio                peak memory of ours over the peer's; null without a peer
    frames_per_s                frames of all rows per second, of ours
    masked_frames_per_s         masked frames per second, of ours
    model_flop_per_s            operations of the model (forward and backward) per second, of ours
    mfu                         model_flop_per_s over matrix_rate.flop_per_s
    components                  extractor, encoder, quantizer_logits, optimizer -> {ms, ms_quartiles, share of the
                                step, and (not for the optimizer) flop_per_s, mfu}
    ours, peer                  {seconds {median, quartiles}, frames_per_s, masked_frames_per_s, model_flop_per_s, mfu,
                                memory_bytes {peak, before: ahead of the first step}, parameters}; ours has
                                skipped_updates (fp16), peer its name; peer is null without one
    rounds                      a list of {ours_s, peer_s, ratio}: seconds per step
    matrix_rate                 {flop_per_s: the best, by_size}, in the precision of the run
    setting                     sizes of model and batch, precision, device, repetitions, flops {part: operations}
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from benchmarks.model_flops import training_flops
from benchmarks.our_step import OurParts, OurStep
from benchmarks.peers import Build, hugging_face, load_runner
from benchmarks.provenance import provenance
from benchmarks.stopwatch import MatrixRate, Stopwatch, peak_memory, summary
from benchmarks.workload import PRECISIONS, SIZES, SyntheticBatch, Workload, make_recipe
from common import distributed, flags
from common.entry import run_program
from common.errors import ConfigError, TrainingError
from common.flags import flag
from utils.program import write_lines, writing
from wav2vec2.build import HALF

WARMUP_STEPS = 3
MEMORY_STEPS = 3
STEPS_PER_ROUND = {"cpu": 1, "cuda": 10}


@dataclass(frozen=True)
class StepFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=tuple(SIZES))
    hourglass_transformer: str = flag(
        "", 'Hourglass "[n_pre,(n_mid,factor),n_post]" in place of the layers of --size', aliases=("hourglass",)
    )
    precision: str = flag("fp32", "number format", choices=PRECISIONS)
    batch: int = flag(8, "rows of the batch", minimum=1)
    seconds: float = flag(8.0, "length of a row, in seconds of audio", minimum=0.5)
    rounds: int = flag(7, "repetitions, ours and the peer's in turn", minimum=1)
    steps: int = flag(0, "steps per repetition; 0: 1 on the CPU, 10 on a GPU", minimum=0)
    threads: int = flag(0, "threads of the CPU; 0: torch's own number", minimum=0)
    against: str | None = flag(None, "peer to compare with", choices=("huggingface",))
    against_runner: str = flag("", "peer to compare with: a file that defines build(config)", metavar="FILE.py")
    checkout: str = flag("", "folder of the peer's code, handed to the runner as config.checkout", metavar="DIR")
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> tuple[StepFlags, str | None]:
    """The command line, and for a process that measures memory whose: "ours" or "peer"."""
    parser = flags.Parser(
        prog="benchmarks/step.py",
        usage="benchmarks/step.py --json OUT [FLAG ...]",
        description="Measure one training step on synthetic audio.",
    )
    flags.add_flags(parser, StepFlags, "pretrain", "what is measured")
    parser.add_argument("--memory_of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    namespace = parser.parse_args(list(argv))
    options = flags.from_namespace(StepFlags, namespace)
    if options.against and options.against_runner:
        raise ConfigError("--against and --against_runner: one peer at a time; remove one of them")
    if options.checkout and not options.against_runner:
        raise ConfigError("--checkout: has no effect without --against_runner; remove it, or give a runner")
    if options.checkout and not Path(options.checkout).is_dir():
        raise ConfigError(f"--checkout {options.checkout}: no such folder; name the folder of the peer's code")
    if options.hourglass_transformer and options.against == "huggingface":
        raise ConfigError(
            f"--hourglass {options.hourglass_transformer}: Hugging Face has no Hourglass; remove it or --against"
        )
    return options, namespace.memory_of


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options, memory_of = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with distributed.session(options.device) as device:
        recipe = make_recipe(options.size, options.hourglass_transformer, options.precision)
        # for all implementations alike
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.precision.allow_tf32
        samples = round(options.seconds * recipe.model.sample_rate)
        checkout = Path(options.checkout) if options.checkout else None
        workload = Workload(recipe, device, options.batch, samples, checkout)
        builds = {"ours": OurStep, **peer_build(options)}
        if memory_of:
            result = measure_memory(builds[memory_of], workload)
        else:
            check_writable(Path(options.json))
            # first, while this process holds nothing on a GPU that they share
            memory = {side: memory_in_fresh_process(argv, side) for side in builds}
            result = measure(options, workload, builds, memory) | provenance(device) | {"command": list(argv)}
            print(describe(result))
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def check_writable(path: Path) -> None:
    """Refuse a place for the results before anything is measured."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json {path}: is a folder, or in one that cannot be written; choose another file")


def peer_build(options: StepFlags) -> dict[str, Build]:
    """How the peer is built; nothing without one."""
    if options.against_runner:
        return {"peer": load_runner(Path(options.against_runner))}
    return {"peer": hugging_face()} if options.against else {}


def measure_memory(build: Build, workload: Workload) -> dict[str, int]:
    """Bytes that one implementation needs at most, in a process of its own."""
    stepper, batch = build(workload), workload.batch()
    return peak_memory(partial(stepper.step, batch), MEMORY_STEPS, workload.device)


def memory_in_fresh_process(argv: Sequence[str], side: str) -> dict[str, int]:
    """measure_memory() of "ours" or "peer", by this program started anew.

    Raises:
        TrainingError: the process failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "memory.json"
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--memory_of", side, "--json", str(out)]
        status = subprocess.run(command, check=False).returncode  # noqa: S603
        if status:
            raise TrainingError(
                f"the process that measures the memory of {side} ended with status {status}; if it told no error, "
                "there was too little memory: lower --batch or --seconds"
            )
        return json.loads(out.read_text())


def measure(
    options: StepFlags, workload: Workload, builds: dict[str, Build], memory: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """All rounds, and what follows from them."""
    batch = workload.batch()
    ours = OurStep(workload)
    steppers = {side: ours if side == "ours" else build(workload) for side, build in builds.items()}
    stopwatch = Stopwatch(workload.device)
    steps = options.steps or STEPS_PER_ROUND[workload.device.type]
    matrix = MatrixRate(stopwatch, HALF.get(options.precision, torch.float32))
    for stepper in steppers.values():
        stopwatch.time(partial(stepper.step, batch), WARMUP_STEPS)
    parts = OurParts(ours, batch)
    parts.time(stopwatch, 1)
    rounds, in_parts = [], []
    for number in range(options.rounds):
        order = list(steppers)[:: -1 if number % 2 else 1]  # nobody is always the first
        seconds = {side: stopwatch.time(partial(steppers[side].step, batch), steps) for side in order}
        rounds.append(seconds)
        in_parts.append(parts.time(stopwatch, steps))
        matrix.measure(steps)
    flops = training_flops(workload.recipe.model, workload.rows, workload.samples, batch.sub_batches[0].masked)
    rate = matrix.result()
    sides = {
        side: throughput(batch, [one[side] for one in rounds], sum(flops.values()), rate["flop_per_s"])
        | {"memory_bytes": memory[side], "parameters": getattr(stepper, "num_parameters", None)}
        for side, stepper in steppers.items()
    }
    return {
        **compare(rounds, memory),
        **{name: sides["ours"][name] for name in ("frames_per_s", "masked_frames_per_s", "model_flop_per_s", "mfu")},
        "components": components(rounds, in_parts, flops, rate["flop_per_s"]),
        "ours": sides["ours"] | {"skipped_updates": ours.optimizer.num_skipped},
        "peer": sides["peer"] | {"name": options.against or options.against_runner} if "peer" in sides else None,
        "matrix_rate": rate,
        "setting": setting(options, workload, batch, steps, flops),
    }


def throughput(batch: SyntheticBatch, seconds: list[float], flops: int, matrix_rate: float) -> dict[str, Any]:
    """Seconds per step of one implementation, and what they make of the batch."""
    step = summary(seconds)
    median = step["median"]
    return {
        "seconds": step,
        "frames_per_s": batch.num_frames / median,
        "masked_frames_per_s": batch.num_masked / median,
        "model_flop_per_s": flops / median,
        "mfu": flops / median / matrix_rate,
    }


def compare(rounds: list[dict[str, float]], memory: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Ratios of ours to the peer's, and the rounds that they come from."""
    listed: list[dict[str, float | None]] = [{"ours_s": one["ours"], "peer_s": None, "ratio": None} for one in rounds]
    if "peer" not in memory:
        return {"ratio": None, "ratio_quartiles": None, "memory_ratio": None, "rounds": listed}
    ratios = [one["peer"] / one["ours"] for one in rounds]
    for entry, one, ratio in zip(listed, rounds, ratios, strict=True):
        entry |= {"peer_s": one["peer"], "ratio": ratio}
    found = summary(ratios)
    return {
        "ratio": found["median"],
        "ratio_quartiles": found["quartiles"],
        "memory_ratio": memory["ours"]["peak"] / memory["peer"]["peak"],
        "rounds": listed,
    }


def components(
    rounds: list[dict[str, float]], parts: list[dict[str, float]], flops: dict[str, int], matrix_rate: float
) -> dict[str, Any]:
    """Time of every part of our step; the share is the median of those of the rounds."""
    found: dict[str, Any] = {}
    for name in parts[0]:
        seconds = summary([part[name] for part in parts])
        shares = [part[name] / one["ours"] for part, one in zip(parts, rounds, strict=True)]
        found[name] = {
            "ms": 1000 * seconds["median"],
            "ms_quartiles": [1000 * value for value in seconds["quartiles"]],
            "share": summary(shares)["median"],
        }
        if name in flops:
            rate = flops[name] / seconds["median"]
            found[name] |= {"flop_per_s": rate, "mfu": rate / matrix_rate}
    return found


def setting(
    options: StepFlags, workload: Workload, batch: SyntheticBatch, steps: int, flops: dict[str, int]
) -> dict[str, Any]:
    """What was measured, in numbers that do not depend on the machine."""
    names = ("device", "size", "hourglass_transformer", "precision", "batch", "seconds", "checkout")
    return {
        **{name: getattr(options, name) for name in names},
        "rounds": options.rounds,
        "steps_per_round": steps,
        "samples": workload.samples,
        "frames": batch.num_frames,
        "masked_frames": batch.num_masked,
        "flops": flops,
        "recipe": flags.to_dict(workload.recipe),
    }


def describe(result: dict[str, Any]) -> str:
    """A few lines for the console."""
    lines = [
        f"{result['frames_per_s']:,.0f} frames/s, {result['masked_frames_per_s']:,.0f} masked frames/s, "
        f"{result['model_flop_per_s'] / 1e9:,.1f} GFLOP/s, {result['mfu']:.1%} of the rate of matrix products; "
        f"peak memory {result['ours']['memory_bytes']['peak'] / 2**20:,.0f} MiB"
    ]
    for name, part in result["components"].items():
        lines.append(f"  {name:17}{part['ms']:10.2f} ms {part['share']:6.1%} of the step")
    if result["peer"]:
        low, high = result["ratio_quartiles"]
        lines.append(
            f"against {result['peer']['name']}: throughput x {result['ratio']:.2f} [{low:.2f}, {high:.2f}], "
            f"memory x {result['memory_ratio']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
