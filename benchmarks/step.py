"""Measure one training step on synthetic audio: this toolkit, alone or beside others.

    python benchmarks/step.py --device cpu --size base --batch 2 --seconds 5 --against huggingface --json OUT

The others are another implementation, and with --plain the toolkit itself with the plain form of some of its parts
(benchmarks/plain.py). Every side has a process of its own that is set up and builds its step as its program would, and
lives until the end. Its first steps tell its peak memory and warm it up. Then every round times all sides, one after
the other and in turns from either end, while the others wait.

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
                                memory_bytes {peak, before: ahead of the first step}, first_step_s: with all that is
                                compiled, chosen or allocated once, parameters}; ours has skipped_updates (fp16), peer
                                its name; peer is null without one
    variants                    name of --plain -> {ratio, ratio_quartiles, memory_ratio: of ours over this one, and the
                                same fields as peer but its name}
    rounds                      a list of {ours_s, peer_s, ratio, variants_s {name: seconds}}: seconds per step
    matrix_rate                 {flop_per_s: the best, by_size}, in the precision of the run
    setting                     sizes of model and batch, precision, device, options of our side (compile, cuda_graphs,
                                checkpoint_activations), repetitions, flops {part: operations}
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from benchmarks.model_flops import training_flops
from benchmarks.our_step import our_program
from benchmarks.peers import Build, hugging_face, load_runner, peer_program
from benchmarks.plain import ALL, VARIANTS, check_plain, plain_program
from benchmarks.provenance import provenance
from benchmarks.sides import OurBench, Side, at_work
from benchmarks.stopwatch import summary
from benchmarks.workload import PRECISIONS, SIZES, SyntheticBatch, Workload, make_recipe
from common import distributed, flags
from common.entry import run_program
from common.errors import ConfigError
from common.flags import flag
from utils.program import write_lines, writing

WARMUP_STEPS = 3  # the peak memory is that of these
STEPS_PER_ROUND = {"cpu": 1, "cuda": 10}
SPEED_OPTIONS = ("compile", "cuda_graphs", "checkpoint_activations")  # of train.py

Rounds = list[dict[str, float]]  # of every round the seconds per step, by side


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
    peer_precision: str | None = flag(None, "number format of the peer (default: that of ours)", choices=PRECISIONS)
    against_runner: str = flag("", "peer to compare with: a file that defines build(config)", metavar="FILE.py")
    checkout: str = flag("", "folder of the peer's code, handed to the runner as config.checkout", metavar="DIR")
    plain: tuple[str, ...] = flag(
        (), f"plain forms to compare with, each on its own; {ALL}: all of them together", choices=VARIANTS
    )
    compile: bool = flag(False, "ours with --compile of train.py")
    cuda_graphs: bool = flag(False, "ours with --cuda_graphs of train.py; needs --compile")
    checkpoint_activations: bool = flag(False, "ours with --checkpoint_activations of train.py")
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> StepFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/step.py",
        usage="benchmarks/step.py --json OUT [FLAG ...]",
        description="Measure one training step on synthetic audio.",
    )
    flags.add_flags(parser, StepFlags, "pretrain", "what is measured")
    options = flags.from_namespace(StepFlags, parser.parse_args(list(argv)))
    if options.against and options.against_runner:
        raise ConfigError("--against and --against_runner: one peer at a time; remove one of them")
    if options.peer_precision and not (options.against or options.against_runner):
        raise ConfigError("--peer_precision: has no effect without a peer; remove it, or add --against")
    if options.checkout and not options.against_runner:
        raise ConfigError("--checkout: has no effect without --against_runner; remove it, or give a runner")
    if options.checkout and not Path(options.checkout).is_dir():
        raise ConfigError(f"--checkout {options.checkout}: no such folder; name the folder of the peer's code")
    if options.hourglass_transformer and options.against == "huggingface":
        raise ConfigError(
            f"--hourglass {options.hourglass_transformer}: Hugging Face has no Hourglass; remove it or --against"
        )
    check_plain(options.plain, options.device)
    check_speed(options)
    return options


def check_speed(options: StepFlags) -> None:
    """Raise ConfigError for options of our side that cannot work together."""
    if options.compile and options.plain:
        raise ConfigError("--plain: a compiled part has no plain form; remove it or --compile")
    if options.cuda_graphs and not options.compile:
        raise ConfigError("--cuda_graphs: needs --compile beside it")
    if options.cuda_graphs and options.device == "cpu":
        raise ConfigError("--cuda_graphs: needs a GPU; drop it with --device cpu")


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with distributed.session(options.device) as device:
        workload, sides = make_workload(options, device), make_sides(options)
        check_writable(Path(options.json))
        result = measure(options, workload, sides) | provenance(device) | {"command": list(argv)}
        print(describe(result))
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def make_workload(options: StepFlags, device: torch.device) -> Workload:
    """What every side is built from, and measured on."""
    recipe = make_recipe(options.size, options.hourglass_transformer, options.precision)
    recipe = replace(recipe, run=replace(recipe.run, **{name: getattr(options, name) for name in SPEED_OPTIONS}))
    samples = round(options.seconds * recipe.model.sample_rate)
    return Workload(recipe, device, options.batch, samples, Path(options.checkout) if options.checkout else None)


def make_sides(options: StepFlags) -> dict[str, Side]:
    """What is compared: "ours", "peer" where there is one, and the variants by name."""
    sides = {"ours": Side("ours", our_program, OurBench)}
    load = peer_loader(options)
    if load:
        load()  # what is wrong with it shall be told before anything is measured
        precision = options.peer_precision or options.precision
        sides["peer"] = Side(f"peer, {peer_name(options)}", partial(peer_program, load=load, precision=precision))
    return sides | {name: Side(f"plain {name}", partial(plain_program, names=(name,))) for name in options.plain}


def peer_loader(options: StepFlags) -> Callable[[], Build] | None:
    """How the peer is found; None without one."""
    if options.against_runner:
        return partial(load_runner, Path(options.against_runner))
    return hugging_face if options.against else None


def peer_name(options: StepFlags) -> str:
    """What the peer is called."""
    return options.against or options.against_runner


def check_writable(path: Path) -> None:
    """Refuse a place for the results before anything is measured."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json {path}: is a folder, or in one that cannot be written; choose another file")


def memory_in_fresh_process(argv: Sequence[str], side: str) -> dict[str, int]:
    """Bytes that "ours" or "peer" of a command line without --json needs at most, `peak` and `before` the first step.

    Raises:
        TrainingError: its process failed; it has said why.
    """
    options = parse([*argv, "--json", "-"])
    workload = make_workload(options, torch.device(options.device))
    with at_work(make_sides(options)[side], workload, options.threads) as process:
        return process.start(WARMUP_STEPS)["memory_bytes"]


def measure(options: StepFlags, workload: Workload, sides: dict[str, Side]) -> dict[str, Any]:
    """All rounds, and what follows from them."""
    steps = options.steps or STEPS_PER_ROUND[workload.device.type]
    with ExitStack() as stack:
        processes, begun = {}, {}
        for name, side in sides.items():
            processes[name] = stack.enter_context(at_work(side, workload, options.threads))
            begun[name] = processes[name].start(WARMUP_STEPS)
        rounds, in_parts = [], []
        for number in range(options.rounds):
            order = list(sides)[:: -1 if number % 2 else 1]  # nobody is always the first
            rounds.append({name: processes[name].time(steps) for name in order})
            in_parts.append(processes["ours"].ask("time_parts", steps))
        finished = processes["ours"].ask("finish")
    batch = replace(workload, device=torch.device("cpu")).batch()  # for its sizes
    flops = training_flops(workload.recipe.model, workload.rows, workload.samples, batch.sub_batches[0].masked)
    rate = finished["matrix_rate"]
    figures = {
        name: throughput(batch, [one[name] for one in rounds], sum(flops.values()), rate["flop_per_s"]) | begun[name]
        for name in sides
    }
    ours = figures["ours"]
    against_peer = compare("peer", rounds, figures)
    return {
        **(against_peer or dict.fromkeys(("ratio", "ratio_quartiles", "memory_ratio"))),
        **{name: ours[name] for name in ("frames_per_s", "masked_frames_per_s", "model_flop_per_s", "mfu")},
        "components": components(rounds, in_parts, flops, rate["flop_per_s"]),
        "ours": ours | {"skipped_updates": finished["skipped_updates"]},
        "peer": figures["peer"] | {"name": peer_name(options)} if against_peer else None,
        "variants": {name: compare(name, rounds, figures) | figures[name] for name in options.plain},
        "rounds": [listed(one, options.plain) for one in rounds],
        "matrix_rate": rate,
        "setting": setting(options, workload, batch, steps, flops),
    }


def throughput(batch: SyntheticBatch, seconds: list[float], flops: int, matrix_rate: float) -> dict[str, Any]:
    """Seconds per step of one side, and what they make of the batch."""
    step = summary(seconds)
    median = step["median"]
    return {
        "seconds": step,
        "frames_per_s": batch.num_frames / median,
        "masked_frames_per_s": batch.num_masked / median,
        "model_flop_per_s": flops / median,
        "mfu": flops / median / matrix_rate,
    }


def compare(side: str, rounds: Rounds, figures: dict[str, Any]) -> dict[str, Any]:
    """Ratios of ours to a side's; nothing where there is no such side."""
    if side not in figures:
        return {}
    found = summary([one[side] / one["ours"] for one in rounds])
    peaks = [figures[name]["memory_bytes"]["peak"] for name in ("ours", side)]
    return {"ratio": found["median"], "ratio_quartiles": found["quartiles"], "memory_ratio": peaks[0] / peaks[1]}


def listed(one: dict[str, float], variants: Sequence[str]) -> dict[str, Any]:
    """A round as the file has it."""
    peer = one.get("peer")
    return {
        "ours_s": one["ours"],
        "peer_s": peer,
        "ratio": peer and peer / one["ours"],
        "variants_s": {name: one[name] for name in variants},
    }


def components(
    rounds: Rounds, parts: list[dict[str, float]], flops: dict[str, int], matrix_rate: float
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
    names = ("device", "size", "hourglass_transformer", "precision", "peer_precision", "batch", "seconds", "checkout")
    return {
        **{name: getattr(options, name) for name in (*names, *SPEED_OPTIONS)},
        "plain": options.plain,
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
        f"peak memory {result['ours']['memory_bytes']['peak'] / 2**20:,.0f} MiB; "
        f"first step {result['ours']['first_step_s']:.2f} s"
    ]
    for name, part in result["components"].items():
        lines.append(f"  {name:17}{part['ms']:10.2f} ms {part['share']:6.1%} of the step")
    if result["peer"]:
        low, high = result["ratio_quartiles"]
        lines.append(
            f"against {result['peer']['name']}: throughput x {result['ratio']:.2f} [{low:.2f}, {high:.2f}], "
            f"memory x {result['memory_ratio']:.2f}"
        )
    for name, variant in result["variants"].items():
        low, high = variant["ratio_quartiles"]
        lines.append(
            f"over plain {name}: throughput x {variant['ratio']:.2f} [{low:.2f}, {high:.2f}], "
            f"memory x {variant['memory_ratio']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
