"""Faults: signals that ask a run to stop, and two runs in one folder."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.fault_kills import Try, finish, finished, newest
from benchmarks.fault_runs import PATIENCE, Event, Training
from benchmarks.faults_made import GROUP, LAUNCH, PRETRAIN, RECIPES, UPDATE_LINE, UPDATES, Bench, Recipe
from common import checkpoint
from common.errors import ConfigError
from wav2vec2.run_config import RunConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = RunConfig.preempt_exit_code
INTERRUPTED = 130
WITH_WORKERS = RECIPES[1]
LONG_UPDATES = ("--update_freq", "200")  # which take many seconds
AT_ONCE = 10.0  # seconds; starting and ending a process take some, too
BETWEEN_PRESSES = 0.2
MOST_AHEAD = 2  # updates of each process until it is asked to stop: all of them together are fewer than a run has


def stopped(bench: Bench, recipe: Recipe, launcher: tuple[str, ...] = (), code: int | None = STOPPED) -> Iterator[Try]:
    """One run and all signals, one after another, to the process that was started: it ends, has saved, and goes on.

    `code`: the status; None: any but 0, which is what other launchers promise.
    """
    draws = random.Random(bench.seed)  # noqa: S311 - no secrets
    how: dict[str, Any] = {"launcher": launcher} if launcher else {}
    folder = bench.new_folder()
    tries = []
    for number in SIGNALS:
        with bench.training(recipe, folder, **how) as run:
            for _ in range(draws.randint(1, MOST_AHEAD)):
                update = run.until("line", UPDATE_LINE)[1]
            ask(run, number, everyone=bool(launcher) and code is None)
            begun = time.monotonic()
            status = run.end()
            seconds = time.monotonic() - begun
        wrong = _wrong_after_stop(bench, recipe, run, status, code)
        note = f"{number.name} after update {update}, checkpoint {newest(folder)}, status {status}"
        tries.append(Try(wrong=wrong, seconds_to_end=seconds, note=note))
    yield from finished(bench, recipe, folder, tries, **how)


def of_group(bench: Bench, launcher: tuple[str, ...]) -> Iterator[Try]:
    """The same in 2 processes; of the launchers only this toolkit's own promises the status."""
    return stopped(bench, GROUP, launcher, STOPPED if launcher == LAUNCH else None)


def ask(run: Training, number: int, *, everyone: bool) -> None:
    """Send a signal to what was started; SIGUSR1, which torchrun does not pass on, to the processes themselves."""
    if everyone and number == signal.SIGUSR1:
        for pid in run.ranks().values():
            run.signal(number, pid)
    else:
        run.signal(number)


def _wrong_after_stop(bench: Bench, recipe: Recipe, run: Training, status: int, code: int | None) -> str:
    """What is wrong with how a run ended that was asked to stop."""
    if (status != code) if code is not None else (status == 0):
        return f"ended with status {status}: {run.last_words}"
    told = re.search(r"^stopped: .*after update (\d+) ", run.said, re.MULTILINE)
    if not told or ("Traceback" in run.said and code is not None):  # other launchers have one of their own
        return f"did not say that it stopped: {run.last_words}"
    path = checkpoint.update_path(run.folder, int(told[1]))
    if not path.exists():
        return f"said that it stopped after update {told[1]}, which is not saved"
    where = bench.reference(recipe).differs(path)
    return f"{path.name} differs in {where}" if where else ""


def interrupted_twice(bench: Bench) -> Iterator[Try]:
    """Ctrl-C again and again within an update that takes long: the run ends at once."""
    folder = bench.new_folder()
    with bench.training(PRETRAIN, folder, *LONG_UPDATES) as run:
        run.until("create", r"^nvlog.json$")  # all is built, the first update begins
        begun = time.monotonic()
        status, seconds = press_until_ended(run), time.monotonic() - begun
    ended = status == INTERRUPTED and seconds < AT_ONCE
    wrong = "" if ended else f"ended with status {status} after {seconds:.1f} s: {run.last_words}"
    yield Try(wrong=wrong, seconds_to_end=seconds, note=f"status {status}")


def press_until_ended(run: Training) -> int:
    """Ctrl-C as a person does who wants it to end now; the status."""
    latest = time.monotonic() + AT_ONCE
    while time.monotonic() < latest:
        run.signal(signal.SIGINT)
        if Event("end") in list(run.events(BETWEEN_PRESSES)):
            return run.status
    return run.end()


# ---- Two runs in one folder -----------------------------------------------------------------------------------------


def second_run(bench: Bench) -> Iterator[Try]:
    """A second run into the folder of one that trains is refused, and harms nothing."""
    folder = bench.new_folder()
    with bench.training(PRETRAIN, folder) as first:
        first.until("line", UPDATE_LINE)
        first.signal(signal.SIGSTOP)  # so that it is not through before the second has begun
        pid = first.process.pid
        with bench.training(PRETRAIN, folder) as second:
            begun = time.monotonic()
            status, said = second.end(), second.last_words
            seconds = time.monotonic() - begun
        first.signal(signal.SIGCONT)
        ended = first.end(PATIENCE)
    wrong = "" if status == ConfigError.exit_status and f"is in use by another run (process {pid} on" in said else said
    wrong = wrong or (f"the first ended with status {ended}" if ended else "")
    reference = bench.reference(PRETRAIN)
    wrong = wrong or reference.wrong_at_end(folder)
    yield Try(wrong=wrong, updates_lost=UPDATES - reference.reached(folder), seconds_to_end=seconds)


def lock_after_kill(bench: Bench) -> Iterator[Try]:
    """After kill -9 the folder is free at once, though the processes that read audio live a little longer."""
    folder = bench.new_folder()
    with bench.training(WITH_WORKERS, folder) as first:
        first.until("line", UPDATE_LINE.replace(r"\d+", "4"))
        first.signal(signal.SIGKILL)
        first.end()
        left = len(first.members())
        repeated = 4 - newest(folder)
        wrong, lost = finish(bench, WITH_WORKERS, folder)
    yield Try(wrong=wrong, updates_lost=lost, repeated=repeated, note=f"{left} orphans")
