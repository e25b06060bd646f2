"""Do to runs what machines do to them, and see whether they survive: kills, damage, full disks, signals, lost peers.

    python benchmarks/faults.py [--quick] --json OUT

Every fault is done to real runs of train.py, tiny ones on the CPU, and then the same command goes on. A fault is
survived when the run comes to the state of a run that nothing interrupted, bit for bit (weights, moments, averages,
loss scale, position in the data), or, where it cannot go on, when it ends with its message and nothing is harmed. It is
hung when a run neither ends nor goes on within a minute. The points of kills, the bits and the lengths are drawn with
--seed. The table is printed in Markdown, as docs/reliability.md has it. The exit status is 1 if anything is lost or
hung. Linux only; what this machine does not permit (mounting, as a user other than root) is skipped and told. The file
--json is one object:

    lost, hung, skipped         how many tries were not survived, how many of them because they hung; how many faults
                                could not be tried
    faults                      a list of {group, name, tried, survived, lost, hung, updates_lost, repeated,
                                seconds_to_end, seconds, skipped, tries}
      updates_lost              that the state at the end lacks, the most of all tries: 0 after a run has gone on
      repeated                  updates since the last checkpoint, which were computed again, the most of all tries
      seconds_to_end            from the fault to the end of all processes, the most of all tries; null where the fault
                                is not one that ends a run
      seconds                   that all tries of this fault took
      skipped                   why it could not be tried, else null
      tries                     a list of {wrong, hung, updates_lost, repeated, seconds_to_end, note}; `wrong` is empty
                                for what was survived, `note` tells where the fault hit and what was seen
    setting                     the flags
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from benchmarks import fault_files, fault_groups, fault_signals
from benchmarks.fault_kills import Try, killed_at_points
from benchmarks.fault_runs import ROOT, HungError, SkippedError, WrongError
from benchmarks.faults_made import GROUP, LAUNCH, PRETRAIN, RECIPES, TORCHRUN, Bench
from benchmarks.provenance import provenance
from benchmarks.step import check_writable
from common import flags
from common.distributed import usable_cores
from common.entry import run_program
from common.errors import CheckpointError, ConfigError, TrainingError
from common.flags import flag
from utils.program import write_lines


@dataclass(frozen=True)
class Fault:
    """A kind of fault: how it is done to runs, one after another, and what became of each."""

    group: str
    name: str
    tries: Callable[[Bench], Iterable[Try]]


@dataclass(frozen=True)
class Sizes:
    """How often: kills of the first recipe and of each other one, damaged files that a run meets and that are read."""

    kills: int
    kills_of_others: int
    damaged_runs: int
    damaged_read: int


FULL = Sizes(27, 27, 8, 300)
QUICK = Sizes(9, 2, 1, 40)


@dataclass(frozen=True)
class FaultsFlags:
    """The command line."""

    quick: bool = flag(False, "fewer tries of every kind, under 5 minutes on two cores")
    only: str = flag("", "faults whose group or name contains this text")
    seed: int = flag(0, "seed of the points, bits and lengths", minimum=0)
    jobs: int = flag(0, "faults at a time; 0 takes the cores", minimum=0)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> FaultsFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/faults.py",
        usage="benchmarks/faults.py --json OUT [FLAG ...]",
        description="Do to runs what machines do to them, and see whether they survive.",
    )
    flags.add_flags(parser, FaultsFlags, "pretrain", "what is tried")
    return flags.from_namespace(FaultsFlags, parser.parse_args(list(argv)))


def main(argv: Sequence[str]) -> None:
    """Try as the command line says, and write the results. TrainingError if anything is lost or hung."""
    options = parse(argv)
    if sys.platform != "linux":
        raise ConfigError("benchmarks/faults.py: watches files and processes as Linux does; run it on Linux")
    check_writable(Path(options.json))
    chosen = [one for one in faults(QUICK if options.quick else FULL) if options.only in f"{one.group}: {one.name}"]
    if not chosen:
        raise ConfigError(f"--only {options.only}: is in the name of no fault; leave it out to see the names")
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        found = try_all(chosen, Bench(Path(folder), options.seed), options.jobs or usable_cores())
    result = json.loads(without_places(json.dumps(report(found)), folder))
    result |= {"setting": asdict(options) | {"json": Path(options.json).name}}
    result |= provenance(torch.device("cpu")) | {"command": command(argv)}
    print(table(result))
    write_lines(Path(options.json), [json.dumps(result, indent=2)])
    if result["lost"] or result["hung"]:
        raise TrainingError(
            f"{result['lost']} tries were lost, {result['hung']} of them hung; {options.json} tells which"
        )


def without_places(text: str, folder: str) -> str:
    """A text without the folders and the name of this machine."""
    text = text.replace(folder, "WORK").replace(f"{ROOT}{os.sep}", "")
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", text)


def command(argv: Sequence[str]) -> list[str]:
    """The arguments without the folders of this machine."""
    return [Path(text).name if os.sep in text else text for text in argv]


def faults(sizes: Sizes) -> list[Fault]:
    """All faults; those that take long come first, so that nothing is left over at the end."""
    launchers = {"utils/launch.py": LAUNCH, "torchrun": TORCHRUN}
    of_groups = [
        Fault("signals", f"SIGTERM, SIGINT, SIGUSR1; 2 processes, {name}", partial(fault_signals.of_group, launcher=of))
        for name, of in launchers.items()
    ]
    of_groups += [
        Fault("processes", f"SIGKILL, SIGSTOP to each of 2, {name}", partial(fault_groups.lost_process, launcher=of))
        for name, of in launchers.items()
    ]
    of_groups += [
        Fault("processes", f"{name} itself killed, of 2", partial(fault_groups.lost_launcher, launcher=of))
        for name, of in launchers.items()
    ]
    of_groups.append(Fault("processes", "a launcher of 2 and its process killed, a new one", fault_groups.lost_machine))
    kills = [
        Fault(
            "kill -9",
            recipe.name,
            partial(killed_at_points, recipe=recipe, points=sizes.kills_of_others if number else sizes.kills),
        )
        for number, recipe in enumerate(RECIPES)
    ]
    runs, read = sizes.damaged_runs, sizes.damaged_read
    return [
        *of_groups,
        *kills,
        Fault("processes", "1, then 2, then 1 again", fault_groups.other_numbers),
        Fault("processes", "one of 2 out of memory (RLIMIT_AS)", fault_groups.out_of_memory),
        Fault("data", "a file becomes unreadable; 2 processes", partial(fault_groups.bad_file, recipe=GROUP)),
        Fault("data", "a file becomes unreadable", partial(fault_groups.bad_file, recipe=PRETRAIN)),
        Fault("data", "a clip gives NaN: stop", fault_groups.not_a_number),
        Fault("data", "a clip gives NaN: rollback", fault_groups.rolled_back),
        Fault("signals", "SIGTERM, SIGINT, SIGUSR1", partial(fault_signals.stopped, recipe=PRETRAIN)),
        Fault("signals", "Ctrl-C twice", fault_signals.interrupted_twice),
        Fault("lock", "a second run in the same folder", fault_signals.second_run),
        Fault("lock", "free after kill -9, 2 workers", fault_signals.lock_after_kill),
        Fault("checkpoints", "newest truncated", partial(fault_files.truncated, runs=runs, read=read)),
        Fault("checkpoints", "newest with a bit flipped", partial(fault_files.flipped, runs=runs, read=read)),
        Fault("checkpoints", "newest empty", fault_files.emptied),
        Fault("checkpoints", "all truncated: no silent new start", fault_files.all_damaged),
        Fault("checkpoints", "temporary file left behind", fault_files.left_behind),
        Fault("disk", "full (tmpfs), then room again", fault_files.full_disk),
        Fault("disk", "files limited (RLIMIT_FSIZE), then not", fault_files.size_limit),
    ]


# ---- Trying ---------------------------------------------------------------------------------------------------------


def try_all(chosen: Sequence[Fault], bench: Bench, jobs: int) -> list[dict[str, Any]]:
    """What became of every fault, some of them tried at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda fault: judged(fault, bench), chosen))


def judged(fault: Fault, bench: Bench) -> dict[str, Any]:
    """A fault as the file tells it."""
    begun = time.monotonic()
    tries: list[Try] = []
    skipped = None
    try:
        tries += _until_wrong(fault.tries(bench))
    except SkippedError as reason:
        skipped = str(reason)
    lost = sum(bool(one.wrong) for one in tries)
    line = f"{fault.group}: {fault.name}: " + (
        f"skipped, {skipped}" if skipped else f"{len(tries) - lost}/{len(tries)}"
    )
    print("\n".join([line, *(f"  LOST: {one.note}: {one.wrong}" for one in tries if one.wrong)]), flush=True)
    ends = [one.seconds_to_end for one in tries if one.seconds_to_end]
    return {
        "group": fault.group,
        "name": fault.name,
        "tried": len(tries),
        "survived": len(tries) - lost,
        "lost": lost,
        "hung": sum(one.hung for one in tries),
        "updates_lost": max((one.updates_lost for one in tries), default=0),
        "repeated": max((one.repeated for one in tries), default=0),
        "seconds_to_end": max(ends) if ends else None,
        "seconds": time.monotonic() - begun,
        "skipped": skipped,
        "tries": [asdict(one) for one in tries],
    }


def _until_wrong(tries: Iterable[Try]) -> Iterator[Try]:
    """The tries; where the next one cannot be made because a run went wrong on the way, that is a lost one."""
    try:
        yield from tries
    except (WrongError, CheckpointError) as error:
        yield Try(wrong=str(error), hung=isinstance(error, HungError))


# ---- Telling --------------------------------------------------------------------------------------------------------


def report(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The results with their counts, by group as they were listed."""
    groups = list(
        dict.fromkeys(("kill -9", "checkpoints", "disk", "signals", "lock", *(one["group"] for one in found)))
    )
    ordered = sorted(found, key=lambda one: groups.index(one["group"]))
    return {
        "lost": sum(one["lost"] for one in found),
        "hung": sum(one["hung"] for one in found),
        "skipped": sum(one["skipped"] is not None for one in found),
        "faults": ordered,
    }


def table(result: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = [
        "| fault | tried | survived | updates lost | computed again, at most | seconds to the end, at most |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["faults"]:
        name = f"{one['group']}: {one['name']}"
        if one["skipped"]:
            lines.append(f"| {name} | skipped: {one['skipped']} | | | | |")
            continue
        end = "" if one["seconds_to_end"] is None else f"{one['seconds_to_end']:.1f}"
        lines.append(
            f"| {name} | {one['tried']} | {one['survived']} | {one['updates_lost']} | {one['repeated']} | {end} |"
        )
    tried, survived = (sum(one[key] for one in result["faults"]) for key in ("tried", "survived"))
    lines.append(f"| **all** | **{tried}** | **{survived}** | lost: {result['lost']} | hung: {result['hung']} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
