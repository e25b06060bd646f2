"""Measure how long training waits for a checkpoint: written while it waits, and written beside it.

    python benchmarks/saving.py --device cpu --size base --folder DIR --json OUT

In turns, the state of a run is saved as `checkpoint.save` does it, until it is on the disk, and as `CheckpointWriter`
does it, which copies it to host memory. A training step is timed alone and while the writer's thread writes. The file
--json is one object:

    bytes                       of a checkpoint
    seconds                     {waiting, beside, written, copy_rate}: each {median, quartiles}; `waiting` is how long
                                training would wait for the disk, `beside` how long it waits for the copy,
                                `written` until that is on the disk, `copy_rate` in bytes per second
    step                        {alone, while_writing, ratio}: seconds of a training step, and what the thread costs it
    setting                     size, device, repetitions
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

import train
from benchmarks.our_step import bare_run
from benchmarks.provenance import provenance
from benchmarks.step import check_writable
from benchmarks.stopwatch import summary
from benchmarks.workload import SIZES, Workload, make_recipe
from common import checkpoint, distributed, flags
from common.checkpoint_writer import CheckpointWriter
from common.entry import run_program
from common.flags import flag
from utils.program import write_lines

NAMES = ("waiting.pt", "beside.pt")


@dataclass(frozen=True)
class SavingFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=tuple(SIZES))
    batch: int = flag(1, "rows of a training step", minimum=1)
    seconds: float = flag(3.0, "their length, in seconds of audio", minimum=0.5)
    rounds: int = flag(7, "repetitions, both forms in turn", minimum=1)
    folder: str = flag("", "where checkpoints are written; they are removed", required=True, metavar="DIR")
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> SavingFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/saving.py",
        usage="benchmarks/saving.py --folder DIR --json OUT [FLAG ...]",
        description="Measure how long training waits for a checkpoint.",
    )
    flags.add_flags(parser, SavingFlags, "pretrain", "what is measured")
    return flags.from_namespace(SavingFlags, parser.parse_args(list(argv)))


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    with distributed.session(options.device) as device:
        check_writable(Path(options.json))
        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = measure(options, device, folder)
        finally:
            for name in NAMES:
                (folder / name).unlink(missing_ok=True)
        seconds, step = found["seconds"], found["step"]
        print(f"{found['bytes'] / 2**20:.0f} MiB: training waits {seconds['beside']['median']:.3f} s for the copy, ")
        print(
            f"and waited {seconds['waiting']['median']:.3f} s for the disk; a step takes {step['ratio']:.2f} x beside"
        )
        taken = {name: value for name, value in flags.to_dict(options).items() if name in ("device", "size", "rounds")}
        result = {**found, "setting": taken} | provenance(device) | {"command": list(argv)}
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def measure(options: SavingFlags, device: torch.device, folder: Path) -> dict[str, Any]:
    """Both ways of saving the state of a run, and its steps."""
    recipe = make_recipe(options.size)
    workload = Workload(recipe, device, options.batch, round(options.seconds * recipe.model.sample_rate))
    run, batch = bare_run(recipe, device), workload.batch()

    def step() -> None:
        train.train_step(run, [batch], 0)

    state, writer = run.state_dict({}), CheckpointWriter()
    size = checkpoint.num_bytes(state)
    taken: dict[str, list[float]] = {name: [] for name in ("waiting", "beside", "written", "alone", "while_writing")}
    _seconds(step, device)  # the first one is slower
    for _ in range(options.rounds):
        taken["alone"].append(_seconds(step, device))
        taken["waiting"].append(_seconds(lambda: checkpoint.save(folder / NAMES[0], state), device))
        begin = time.perf_counter()
        taken["beside"].append(_seconds(lambda: writer.save([folder / NAMES[1]], state, lambda: None), device))
        taken["while_writing"].append(_seconds(step, device))
        writer.wait()
        taken["written"].append(time.perf_counter() - begin)
    seconds: dict[str, Any] = {name: summary(taken[name]) for name in ("waiting", "beside", "written")}
    steps: dict[str, Any] = {name: summary(taken[name]) for name in ("alone", "while_writing")}
    ratio = summary([beside / alone for alone, beside in zip(taken["alone"], taken["while_writing"], strict=True)])
    return {
        "bytes": size,
        "seconds": {**seconds, "copy_rate": summary([size / one for one in taken["beside"]])},
        "step": {**steps, "ratio": ratio["median"], "ratio_quartiles": ratio["quartiles"]},
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
