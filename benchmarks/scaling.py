"""Measure how a training step scales over processes ("ranks"), and what their communication costs.

    python benchmarks/scaling.py --device cpu --size small --batch 8 --seconds 8 --ranks 1 2 --json OUT

Strong scaling: an update of --batch rows is shared out, --batch / ranks rows each. Weak scaling: every rank has --batch
rows. Every rank has the same number of threads (--threads), and so has the one process that they are compared with:
on the CPU the question is what more processes give, not what more threads give. There one process with the threads of
all ranks together is measured too, which is the other way to use the same cores.

Communication is what a step needs more than the same step under DDP's `no_sync()`; both are timed in turns by the same
processes. Much of an all-reduce runs while the backward pass still computes. So this is what is left of it beside the
backward pass: waiting for the last buckets, copies into them, and what the exchange takes from the computation
meanwhile (memory bandwidth, cores, multiprocessors). Both steps begin with the all-reduce of one number, the masked
frames of the update, so both wait for the slowest rank. A time is that of the slowest rank.

All numbers of ranks are measured in one pass, each by processes of its own, and there are --passes of them, in turns
from either end. Ratios are taken within a pass. All rows are the same noise. The file --json is one object:

    runs                        a list of {ranks, threads_per_rank, bucket_bytes (null for 1), strong, weak}; strong and
                                weak are {rows_per_rank, seconds {median, quartiles}, frames_per_s: of all ranks
                                together, efficiency, no_sync_seconds, communication_share, over_one_process}
      efficiency                {median, quartiles} over the passes. Strong: seconds of 1 rank / (ranks x seconds);
                                weak: seconds of 1 rank / seconds. 1 is perfect
      communication_share       {median, quartiles} over the rounds of 1 - no_sync_seconds / seconds; null for 1 rank
      over_one_process          {median, quartiles}: throughput over that of one_process; null on a GPU
    one_process                 {threads, seconds, frames_per_s}: --batch rows in one process; null on a GPU
    gradient_bytes              what every rank hands to the all-reduce in one step
    passes                      for every pass, for every number of ranks the rounds: seconds of the kinds of step
    setting                     the flags as they were taken
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.our_step import OurStep
from benchmarks.provenance import provenance
from benchmarks.step import STEPS_PER_ROUND, WARMUP_STEPS, check_writable
from benchmarks.stopwatch import Stopwatch, summary
from benchmarks.workload import PRECISIONS, SIZES, SyntheticBatch, Workload, make_recipe
from common import distributed, flags
from common.entry import run_program
from common.errors import ConfigError, TrainingError
from common.flags import flag
from utils.program import cpu_count, write_lines
from wav2vec2.config import Config

MODES = ("strong", "weak")
NO_SYNC = "_no_sync"
ONE_PROCESS = "one_process"

Pass = dict[int, dict[str, Any]]  # number of ranks -> what its processes measured


@dataclass(frozen=True)
class ScalingFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=tuple(SIZES))
    hourglass_transformer: str = flag(
        "", 'Hourglass "[n_pre,(n_mid,factor),n_post]" in place of the layers of --size', aliases=("hourglass",)
    )
    precision: str = flag("fp32", "number format", choices=PRECISIONS)
    batch: int = flag(8, "rows of an update (strong scaling), and of every rank (weak scaling)", minimum=1)
    seconds: float = flag(8.0, "length of a row, in seconds of audio", minimum=0.5)
    ranks: tuple[int, ...] = flag(
        (), "numbers of processes, beside 1; default: 2 on the CPU, 2, 4, ... on the GPUs that are there", minimum=1
    )
    threads: int = flag(0, "threads of every rank; 0: the cores by the highest number of ranks", minimum=0)
    bucket_cap_mb: int = flag(25, "size of DDP's gradient buckets in MiB", minimum=1)
    rounds: int = flag(5, "repetitions within a pass, all kinds of step in turn", minimum=1)
    passes: int = flag(3, "how often the processes are started, all numbers of ranks in turn", minimum=1)
    steps: int = flag(0, "steps per repetition; 0: 1 on the CPU, 10 on a GPU", minimum=0)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")

    def recipe(self) -> Config:
        """The recipe, with the buckets asked for."""
        recipe = make_recipe(self.size, self.hourglass_transformer, self.precision)
        return replace(recipe, run=replace(recipe.run, bucket_cap_mb=self.bucket_cap_mb))


def parse(argv: Sequence[str]) -> tuple[ScalingFlags, bool]:
    """The command line, and whether this process is one of the ranks."""
    parser = flags.Parser(
        prog="benchmarks/scaling.py",
        usage="benchmarks/scaling.py --json OUT [FLAG ...]",
        description="Measure how a training step scales over processes.",
    )
    flags.add_flags(parser, ScalingFlags, "pretrain", "what is measured")
    parser.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)
    namespace = parser.parse_args(list(argv))
    return flags.from_namespace(ScalingFlags, namespace), namespace.as_rank


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options, as_rank = parse(argv)
    with distributed.session(options.device) as device:
        if as_rank:
            measured = measure_as_rank(options, device)
            if distributed.is_main():
                write_lines(Path(options.json), [json.dumps(measured)])
            return
        options.recipe()  # an Hourglass that cannot be built is told before anything starts
        options = resolve(options, cpu_count() if device.type == "cpu" else torch.cuda.device_count())
        check_writable(Path(options.json))
        passes = [one_pass(argv, options, number) for number in range(options.passes)]
        result = report(options, passes) | provenance(device) | {"command": list(argv)}
        print(describe(result))
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def resolve(options: ScalingFlags, places: int) -> ScalingFlags:
    """The options with numbers of ranks and threads, for a machine with so many `places` (cores or GPUs) for a rank.

    Raises:
        ConfigError: the machine has not enough places, or the rows cannot be shared out evenly.
    """
    on_cpu = options.device == "cpu"
    ranks = options.ranks or ((2,) if on_cpu else tuple(2**power for power in range(1, places.bit_length())))
    most = max(ranks, default=1)
    if most > places and not (on_cpu and options.threads):
        what = "cores" if on_cpu else "GPUs"
        remedy = "lower it, or say --threads 1 to share cores" if on_cpu else "lower it"
        raise ConfigError(f"--ranks {most}: there are {places} {what} for them; {remedy}")
    uneven = [number for number in ranks if options.batch % number]
    if uneven:
        raise ConfigError(
            f"--batch {options.batch}: cannot be shared out evenly to {uneven[0]} ranks; take a multiple of all --ranks"
        )
    return replace(
        options,
        ranks=tuple(sorted({1, *ranks})),
        threads=options.threads or max(1, cpu_count() // most),
        steps=options.steps or STEPS_PER_ROUND[options.device],
    )


def one_pass(argv: Sequence[str], options: ScalingFlags, number: int) -> Pass:
    """Every number of ranks once; odd passes begin with the highest."""
    return {ranks: launch(argv, options, ranks) for ranks in options.ranks[:: -1 if number % 2 else 1]}


def launch(argv: Sequence[str], options: ScalingFlags, ranks: int) -> dict[str, Any]:
    """measure_as_rank() in processes of their own.

    Raises:
        TrainingError: one of them failed; it has said why.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank.json"
        resolved = [
            "--ranks",
            *map(str, options.ranks),
            "--threads",
            str(options.threads),
            "--steps",
            str(options.steps),
        ]
        flags_of_rank = [*argv, *resolved, "--as_rank", "--json", str(out)]
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), *flags_of_rank]
        status = subprocess.run(command, check=False).returncode  # noqa: S603
        if status:
            raise TrainingError(
                f"the processes of {ranks} ranks ended with status {status}; if they told no error, there was too "
                "little memory: lower --batch or --seconds"
            )
        return json.loads(out.read_text())


def measure_as_rank(options: ScalingFlags, device: torch.device) -> dict[str, Any]:
    """All rounds of this number of ranks: seconds per step of the slowest rank, the same on every rank."""
    recipe = options.recipe()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.precision.allow_tf32
    samples, ranks = round(options.seconds * recipe.model.sample_rate), distributed.world_size()
    rows = {"strong": options.batch // ranks, "weak": options.batch}
    batches = {mode: Workload(recipe, device, rows[mode], samples).batch() for mode in MODES}
    ours = OurStep(Workload(recipe, device, options.batch, samples))
    steppers = kinds_of_step(ours, batches, options)
    stopwatch = Stopwatch(device)
    for stepper in steppers.values():
        stepper.settle()
        stopwatch.time(stepper, WARMUP_STEPS)
    rounds = []
    for number in range(options.rounds):
        seconds = {}
        for kind in list(steppers)[:: -1 if number % 2 else 1]:  # no kind is always the first
            steppers[kind].settle()
            distributed.barrier()
            seconds[kind] = max(distributed.gather_objects(stopwatch.time(steppers[kind], options.steps)))
        rounds.append({kind: seconds[kind] for kind in steppers})
    trained = [parameter for parameter in ours.task.parameters() if parameter.requires_grad]
    engine = engine_of(ours)
    return {
        "rounds": rounds,
        "rows": rows,
        "frames": {mode: ranks * batches[mode].num_frames for mode in MODES},
        "threads": {kind: stepper.threads for kind, stepper in steppers.items()},
        "bucket_bytes": engine.bucket_bytes_cap if isinstance(engine, DistributedDataParallel) else None,
        "gradient_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
    }


@dataclass(frozen=True)
class TimedStep:
    """One kind of step."""

    ours: OurStep
    batch: SyntheticBatch
    threads: int
    sync: bool = True

    def __call__(self) -> None:
        """Make a step; without `sync` the ranks keep their gradients to themselves."""
        with nullcontext() if self.sync else engine_of(self.ours).no_sync():
            self.ours.step(self.batch)

    def settle(self) -> None:
        """Take its number of threads, and make a step where that changes: the first one starts them."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
            self()


def kinds_of_step(ours: OurStep, batches: dict[str, SyntheticBatch], options: ScalingFlags) -> dict[str, TimedStep]:
    """What is timed, by name. For one rank strong and weak scaling are the same, and there is nothing to exchange."""
    threads = options.threads
    if distributed.world_size() == 1:
        alone = {"strong": TimedStep(ours, batches["strong"], threads)}
        if ours.device.type == "cpu":
            alone[ONE_PROCESS] = TimedStep(ours, batches["strong"], threads * max(options.ranks))
        return alone
    kinds = {}
    for mode in MODES:
        kinds[mode] = TimedStep(ours, batches[mode], threads)
        kinds[mode + NO_SYNC] = TimedStep(ours, batches[mode], threads, sync=False)
    return kinds


def engine_of(ours: OurStep) -> DistributedDataParallel | distributed.SingleProcess:
    """What wraps the task in OurStep: DDP, or what stands for it in one process."""
    return ours._run.engine


def report(options: ScalingFlags, passes: Sequence[Pass]) -> dict[str, Any]:
    """What follows from all passes."""
    alone = passes[0][1]
    one_process = None
    if ONE_PROCESS in alone["rounds"][0]:
        seconds = summary(pooled(passes, 1, ONE_PROCESS))
        one_process = {
            "threads": alone["threads"][ONE_PROCESS],
            "seconds": seconds,
            "frames_per_s": alone["frames"]["strong"] / seconds["median"],
        }
    return {
        "runs": [
            {
                "ranks": ranks,
                "threads_per_rank": passes[0][ranks]["threads"]["strong"],
                "bucket_bytes": passes[0][ranks]["bucket_bytes"],
                **{mode: scaling(passes, ranks, mode) for mode in MODES},
            }
            for ranks in options.ranks
        ],
        "one_process": one_process,
        "gradient_bytes": alone["gradient_bytes"],
        "passes": [{str(ranks): group["rounds"] for ranks, group in sorted(one.items())} for one in passes],
        "setting": {name: value for name, value in flags.to_dict(options).items() if name not in ("json", "debug")},
    }


def scaling(passes: Sequence[Pass], ranks: int, mode: str) -> dict[str, Any]:
    """The figures of one number of ranks in one mode."""
    kind = mode if ranks > 1 else "strong"
    times = passes[0][ranks]
    seconds = summary(pooled(passes, ranks, kind))
    work = times["frames"][mode] / passes[0][1]["frames"]["strong"]  # in updates of one rank
    without = communication = over_one_process = None
    if ranks > 1:
        without = summary(pooled(passes, ranks, kind + NO_SYNC))
        rounds = [one for group in passes for one in group[ranks]["rounds"]]
        communication = summary([1 - one[kind + NO_SYNC] / one[kind] for one in rounds])
    if ONE_PROCESS in passes[0][1]["rounds"][0]:
        over_one_process = summary([work * typical(one, 1, ONE_PROCESS) / typical(one, ranks, kind) for one in passes])
    return {
        "rows_per_rank": times["rows"][mode],
        "seconds": seconds,
        "frames_per_s": times["frames"][mode] / seconds["median"],
        "efficiency": summary([work / ranks * typical(one, 1, "strong") / typical(one, ranks, kind) for one in passes]),
        "no_sync_seconds": without,
        "communication_share": communication,
        "over_one_process": over_one_process,
    }


def pooled(passes: Sequence[Pass], ranks: int, kind: str) -> list[float]:
    """Seconds of one kind of step in all rounds of all passes."""
    return [one[kind] for group in passes for one in group[ranks]["rounds"]]


def typical(one: Pass, ranks: int, kind: str) -> float:
    """Median seconds of one kind of step within a pass."""
    return median(seconds[kind] for seconds in one[ranks]["rounds"])


def describe(result: dict[str, Any]) -> str:
    """A table for the console."""
    lines = [
        f"{'ranks':>5} {'threads':>7} {'scaling':>7} {'rows':>5} {'frames/s':>12} {'efficiency':>10} {'exchange':>8}"
    ]
    for run in result["runs"]:
        for mode in MODES if run["ranks"] > 1 else MODES[:1]:
            found, label = run[mode], mode if run["ranks"] > 1 else "-"
            share = found["communication_share"]
            lines.append(
                f"{run['ranks']:5} {run['threads_per_rank']:7} {label:>7} {found['rows_per_rank']:5} "
                f"{found['frames_per_s']:12,.0f} {found['efficiency']['median']:10.1%} "
                + (f"{share['median']:8.1%}" if share else f"{'-':>8}")
            )
    if result["one_process"]:
        alone = result["one_process"]
        lines.append(f"one process with {alone['threads']} threads: {alone['frames_per_s']:,.0f} frames/s")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:], rank=distributed.launched_rank())
