"""Faults: kill -9 at points drawn over a save cycle, one after another, until the run is through."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_runs import PATIENCE, HungError, Training, WrongError
from benchmarks.faults_made import PHASES, TEMPORARY, UPDATE_LINE, UPDATES, Bench, Recipe, Reference
from common import checkpoint
from common.errors import CheckpointError

# How the points are shared out among the parts of a save cycle
SHARES = ("updates", "write", "copy", "rename", "validation", "write", "prune", "updates", "write")
MOST_AHEAD = 3  # updates that a killed run makes at most before it is killed
MOST_LAPS = 3  # runs in which a point does not come up, until it counts as lost


@dataclass
class Try:
    """What became of one fault.

    `wrong`: why it was not survived, empty if it was; `updates_lost`: see Reference.reached(); `repeated`: updates that
    were computed again; `seconds_to_end`: from the fault to the end of the run; `note`: where it hit.
    """

    wrong: str = ""
    hung: bool = False
    updates_lost: int = 0
    repeated: int = 0
    seconds_to_end: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A moment of a save cycle: some share of a phase's usual length behind its beginning, some updates from now."""

    phase: str
    share: float
    ahead: int


def draw_points(number: int, seed: str) -> list[Point]:
    """Points over all phases, the same for the same seed."""
    draws = random.Random(seed)  # noqa: S311 - no secrets
    turns = draws.randrange(len(SHARES))
    phases = [SHARES[(turns + index) % len(SHARES)] for index in range(number)]
    draws.shuffle(phases)
    return [Point(phase, draws.random(), draws.randint(1, MOST_AHEAD)) for phase in phases]


def killed_at_points(bench: Bench, recipe: Recipe, points: int) -> Iterator[Try]:
    """Kill a run at a point, go on with the same command, kill it at the next point, and so on until it is through.

    All kills of a run count as survived when each left a checkpoint as that of the run never interrupted, or none
    before the first save, and the run came to the same result as that one, bit for bit.
    """
    reference = bench.reference(recipe)
    waiting = draw_points(points, f"{bench.seed} {recipe.name}")
    laps = 0
    while waiting:
        laps += 1
        before = len(waiting)
        yield from _lap(bench, recipe, reference, waiting)
        if before == len(waiting) and laps >= MOST_LAPS:
            yield Try(wrong=f"no run came to the point {waiting.pop()}")


def _lap(bench: Bench, recipe: Recipe, reference: Reference, waiting: list[Point]) -> list[Try]:
    """One run, from its beginning to its end, with as many kills as fit; takes their points off `waiting`."""
    folder = bench.new_folder()
    tries: list[Try] = []
    done = False
    while waiting and not done:
        with bench.training(recipe, folder) as run:
            killed = _kill(run, waiting[0], reference, newest(folder))
            done = killed is None
            if killed:
                waiting.pop(0)
                killed.wrong = _wrong_after_kill(reference, folder)
                tries.append(killed)
    return finished(bench, recipe, folder, tries)


def _kill(run: Training, point: Point, reference: Reference, resumed: int) -> Try | None:
    """Kill a run at a point; None if it ended before."""
    (kind, pattern), _ = PHASES[point.phase]
    reached = resumed
    for event in run.events():
        if event.kind == "end":
            if run.status:
                raise WrongError(f"ended with status {run.status} after {resumed} updates: {run.last_words}")
            return None
        if line := re.search(UPDATE_LINE, event.text):
            reached = int(line[1])
        found = re.search(pattern, event.text) if event.kind == kind else None
        if found and int(found[1]) >= min(resumed + point.ahead, UPDATES):
            time.sleep(point.share * reference.phases[point.phase])  # the moment itself is what is drawn
            run.signal(signal.SIGKILL)
            begun = time.monotonic()
            status = run.end()
            if status == 0:
                return None
            seconds = time.monotonic() - begun
            reached = max([reached, *(int(line[1]) for text in run.lines if (line := re.search(UPDATE_LINE, text)))])
            repeated = reached - newest(run.folder)
            return Try(repeated=repeated, seconds_to_end=seconds, note=_note(point, run.folder, reached))
    raise HungError(f"nothing to be seen of {point} in {PATIENCE:.0f} s: {run.last_words}")


def _note(point: Point, folder: Path, reached: int) -> str:
    """Where the kill hit."""
    half = " and a half-written one" if any(re.search(TEMPORARY, path.name) for path in folder.iterdir()) else ""
    return f"{point.phase} at update {reached}, checkpoint {newest(folder)}{half}"


def newest(folder: Path) -> int:
    """The update of the newest checkpoint, whole or not; 0 if there is none."""
    paths = checkpoint.update_paths(folder)
    return (checkpoint.update_number(paths[0]) or 0) if paths else 0


def _wrong_after_kill(reference: Reference, folder: Path) -> str:
    """What is wrong with the newest checkpoint that a killed run left."""
    try:
        found = checkpoint.load_newest(folder)
        where = reference.differs(found[0]) if found else ""
    except CheckpointError as error:
        return str(error)
    return f"{found[0].name} differs in {where}" if found and where else ""


def finish(bench: Bench, recipe: Recipe, folder: Path, **how: Any) -> tuple[str, int]:
    """Go on with the same command to the end: what is wrong with the result (or nothing), and the updates lost.

    `how`: as for Bench.training().
    """
    reference = bench.reference(recipe)
    with bench.training(recipe, folder, **how) as run:
        status = run.end(PATIENCE)
        said = run.last_words
    lost = UPDATES - reference.reached(folder)
    if status:
        return f"the same command ended with status {status}: {said}", lost
    return reference.wrong_at_end(folder), lost


def finished(bench: Bench, recipe: Recipe, folder: Path, tries: list[Try], **how: Any) -> list[Try]:
    """The faults of one run, none of which is survived unless the same command comes to the right end."""
    wrong, lost = finish(bench, recipe, folder, **how)
    for one in tries:
        one.wrong, one.updates_lost = one.wrong or wrong, lost
    return tries
