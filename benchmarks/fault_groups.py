"""Faults: one of several processes is killed, frozen, out of memory, or finds a bad file; NaN; fewer processes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.fault_kills import Try, finish, finished, newest
from benchmarks.fault_runs import DEADLINE, PATIENCE, HungError, Training
from benchmarks.faults_made import (
    GROUP,
    LAUNCH,
    MEETING,
    PRETRAIN,
    SAVED,
    TORCHRUN,
    UPDATE_LINE,
    UPDATES,
    Bench,
    Recipe,
)
from common import checkpoint

# how a line names a process and where it stands: see common/watchdog.py
STANDING = r"process {rank} \(host \S+, pid {pid}\).*update \d+"
MOST_MEMORY = 8 * 2**20  # bytes that a process may still take
HUGE, SELDOM = 3.4e38, 100  # a sample, finite unlike what becomes of it; every how many have the other sign
WITHOUT_DROPOUT = ("--dropout", "0", "--attention_dropout", "0")  # which alone depends on the number of processes
LASTING = ("--max_update", "100000")  # a run that does not come to its end meanwhile
HITS = [(number, rank) for number in (signal.SIGKILL, signal.SIGSTOP) for rank in range(GROUP.processes)]
MOST_AHEAD = 2  # updates of each group until it is hit: all of them together are fewer than a run has
BETWEEN_LOOKS = 0.1  # seconds
ATOL, RTOL = 2e-5, 1e-4


def lost_process(
    bench: Bench, hits: Sequence[tuple[int, int]] = HITS, launcher: tuple[str, ...] = TORCHRUN
) -> Iterator[Try]:
    """One run and some (signal, process) that cannot be caught: each time all end, say which it was, and go on."""
    draws = random.Random(bench.seed)  # noqa: S311 - no secrets
    folder = bench.new_folder()
    tries = []
    for number, rank in hits:
        with bench.training(GROUP, folder, launcher=launcher) as run:
            if not newest(folder):
                run.until("rename", SAVED)
            for _ in range(draws.randint(1, MOST_AHEAD)):
                update = int(run.until("line", UPDATE_LINE)[1])
            pids = run.ranks()
            run.signal(number, pids[rank])
            wrong, seconds = wrong_after_loss(bench, run, rank, pids[rank])
        kept = newest(folder)
        note = f"{signal.Signals(number).name} to process {rank} at update {update}, checkpoint {kept}"
        tries.append(Try(wrong=wrong, repeated=max(update - kept, 0), seconds_to_end=seconds, note=note))
    yield from finished(bench, GROUP, folder, tries, launcher=launcher)


def wrong_after_loss(bench: Bench, run: Training, rank: int, pid: int) -> tuple[str, float]:
    """What is wrong with how a group ended that has lost a process, and the seconds it took."""
    begun = time.monotonic()
    status = run.end()
    seconds = time.monotonic() - begun
    alive = [one for one in run.ranks().values() if one != pid]
    if status == 0 or alive:
        return f"status {status}, processes {alive} live on: {run.last_words}", seconds
    if not re.search(STANDING.format(rank=rank, pid=pid), run.said):
        return f"nothing names process {rank} (pid {pid}) and where it stood: {run.last_words}", seconds
    left = newest(run.folder)
    if left and bench.reference(GROUP).reached(run.folder) != left:
        return f"checkpoint {left} is not what it should be", seconds
    return "", seconds


def lost_launcher(bench: Bench, launcher: tuple[str, ...]) -> Iterator[Try]:
    """The launcher alone is killed: its processes end, too, so that the folder is free again."""
    folder = bench.new_folder()
    with bench.training(GROUP, folder, *LASTING, launcher=launcher) as run:
        run.until("rename", SAVED)
        run.signal(signal.SIGKILL)
        begun = time.monotonic()
        run.end()
        wait_until(lambda: not run.members(), DEADLINE, "its processes live on")
        seconds = time.monotonic() - begun
    kept = newest(folder)
    with bench.training(GROUP, folder, *LASTING, launcher=launcher) as run:
        first = int(run.until("line", UPDATE_LINE)[1])
    wrong = "" if first == kept + 1 else f"goes on with update {first} after checkpoint {kept}"
    yield Try(wrong=wrong, seconds_to_end=seconds, note=f"checkpoint {kept}")


def lost_machine(bench: Bench) -> Iterator[Try]:
    """Two launchers, one of which is killed with all that it has started; another one takes its place."""
    folder, port = bench.new_folder(), free_port()
    launcher = (*LAUNCH, "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", MEETING)
    how: dict[str, Any] = {"launcher": (*launcher, f"--rdzv_endpoint=127.0.0.1:{port}")}
    with bench.training(GROUP, folder, **how) as first:
        wait_until(lambda: answers(port), PATIENCE, "nobody listens")  # the first has what they meet by
        with bench.training(GROUP, folder, **how) as second:
            first.until("rename", SAVED)
            for pid in second.members():
                second.signal(signal.SIGKILL, pid)
            second.end()
        begun, kept = time.monotonic(), newest(folder)
        with bench.training(GROUP, folder, **how):
            status = first.end(PATIENCE)
        seconds, said = time.monotonic() - begun, first.last_words
    reference = bench.reference(GROUP)
    lost = UPDATES - reference.reached(folder)
    wrong = f"the other launcher ended with status {status}: {said}" if status else ""
    wrong = wrong or reference.wrong_at_end(folder)
    yield Try(wrong=wrong, updates_lost=lost, note=f"checkpoint {kept}; at the end again after {seconds:.0f} s")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Look again and again. HungError if that takes too long."""
    latest = time.monotonic() + seconds
    while not done():
        if time.monotonic() > latest:
            raise HungError(f"{otherwise} after {seconds:.0f} s")
        time.sleep(BETWEEN_LOOKS)


def out_of_memory(bench: Bench) -> Iterator[Try]:
    """One process gets no more memory (RLIMIT_AS): all end."""
    folder = bench.new_folder()
    with bench.training(GROUP, folder) as run:
        run.until("rename", SAVED)
        pid = run.ranks()[1]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MOST_MEMORY
        resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        wrong, seconds = wrong_after_loss(bench, run, 1, pid)
        note = next((line for line in run.lines if line.startswith("error: ")), "")[:200]
    after, lost = finish(bench, GROUP, folder)
    yield Try(wrong=wrong or after, updates_lost=lost, seconds_to_end=seconds, note=note)


# ---- Bad data -------------------------------------------------------------------------------------------------------


def bad_file(bench: Bench, recipe: Recipe = GROUP) -> Iterator[Try]:
    """A file becomes unreadable while the run trains: all processes end, and the message names file and process."""
    folder, data = bench.new_folder(), bench.files_of_its_own()
    victim = data / "train" / "0.wav"
    whole = victim.read_bytes()
    with bench.training(recipe, folder, data=data) as run:
        run.until("rename", SAVED)
        victim.write_bytes(bytes(len(whole)))
        run.until("line", r"^error: ")  # when its turn comes
        begun = time.monotonic()
        status = run.end()
        seconds = time.monotonic() - begun
    told = re.search(r"^error: \S*train\.tsv:2: .*0\.wav: .*", run.said, re.MULTILINE)
    named = told and (recipe.processes == 1 or re.search(STANDING.format(rank=r"\d", pid=r"\d+"), told[0]))
    clean = recipe.processes > 1 or "Traceback" not in run.said  # a launcher may have one of its own
    wrong = "" if status and named and clean else f"status {status}: {run.last_words}"
    victim.write_bytes(whole)
    after, lost = finish(bench, recipe, folder, data=data)
    yield Try(wrong=wrong or after, updates_lost=lost, seconds_to_end=seconds, note=told[0][:200] if told else "")


def not_a_number(bench: Bench) -> Iterator[Try]:
    """A clip gives NaN: the run ends before that is saved, and goes on when the clip is mended."""
    folder, data = bench.new_folder(), bench.files_of_its_own()
    victim = data / "train" / "0.wav"
    whole = victim.read_bytes()
    with bench.training(PRETRAIN, folder, data=data) as run:
        run.until("rename", SAVED)
        spoil(victim)
        run.until("line", r"^error: ")
        begun = time.monotonic()
        status = run.end()
        seconds = time.monotonic() - begun
        said = run.said
    kept, reference = newest(folder), bench.reference(PRETRAIN)
    told = re.search(r"^error: .*not finite.*", said, re.MULTILINE | re.IGNORECASE)
    wrong = "" if status and told else f"status {status}: {run.last_words}"
    wrong = wrong or ("" if reference.reached(folder) == kept else f"checkpoint {kept} is spoiled")
    victim.write_bytes(whole)
    after, lost = finish(bench, PRETRAIN, folder, data=data)
    yield Try(wrong=wrong or after, updates_lost=lost, seconds_to_end=seconds, note=told[0][:200] if told else "")


def rolled_back(bench: Bench) -> Iterator[Try]:
    """The same with --on_nan rollback: the run goes back by itself, leaves the update out, and comes to its end."""
    folder, data = bench.new_folder(), bench.files_of_its_own()
    victim = data / "train" / "0.wav"
    whole = victim.read_bytes()
    with bench.training(PRETRAIN, folder, "--on_nan", "rollback", data=data) as run:
        run.until("rename", SAVED)
        spoil(victim)
        told = run.until("line", "not finite.*goes on from .* without this update")
        victim.write_bytes(whole)  # a run goes back once
        status = run.end(PATIENCE)
    last = checkpoint.update_path(folder, UPDATES)
    wrong = "" if status == 0 and last.exists() else f"status {status}: {run.last_words}"
    weights = checkpoint.load(last)["model"] if last.exists() else {}
    finite = all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    yield Try(wrong=wrong or ("" if finite else "the weights at the end are not finite"), note=told[0][:200])


def spoil(path: Path) -> None:
    """Make a clip whose samples are finite, and nothing that is computed from them is."""
    frames, rate = soundfile.info(path).frames, soundfile.info(path).samplerate
    wave = np.where(np.arange(frames) % SELDOM, HUGE, -HUGE)  # further from their mean than a number can be
    soundfile.write(path, wave.astype(np.float32), rate, subtype="FLOAT")


# ---- Another number of processes ------------------------------------------------------------------------------------


def other_numbers(bench: Bench) -> Iterator[Try]:
    """1 process, then 2, then 1 again: the same sub-batches in the same order, and weights that differ by rounding."""
    one = replace(PRETRAIN, flags=(*PRETRAIN.flags, *WITHOUT_DROPOUT))
    two = replace(one, flags=(*one.flags, "--update_freq", "1"), processes=2)
    straight, mixed = bench.new_folder(), bench.new_folder()
    with bench.training(one, straight) as run:
        status = run.end(PATIENCE)
    wrong = f"status {status}: {run.last_words}" if status else ""
    said = ""
    for recipe, update in ((one, 5), (two, 11), (one, UPDATES)):
        with bench.training(recipe, mixed) as run:
            if update < UPDATES:
                run.until("line", UPDATE_LINE.replace(r"\d+", str(update)))
                for pid in run.ranks().values() if recipe.processes > 1 else [run.process.pid]:
                    run.signal(signal.SIGTERM, pid)
            status = run.end(PATIENCE)
            said += run.said
        if (status != 0) == (update == UPDATES):
            wrong = wrong or f"status {status}: {run.last_words}"
    told = re.findall(r"was written by \d processes, this run has \d", said)
    wrong = wrong or ("" if len(told) == 2 else "the log does not tell of the other number of processes")
    yield Try(wrong=wrong or _differs_by_more_than_rounding(straight, mixed), note="; ".join(told))


def _differs_by_more_than_rounding(straight: Path, mixed: Path) -> str:
    """What differs between two runs; the frames that each update masked are those of its sub-batches."""
    if masked(mixed) != masked(straight):
        return "other sub-batches, or in another order"
    found, expected = (checkpoint.load(checkpoint.update_path(one, UPDATES)) for one in (mixed, straight))
    if found["loader"] != expected["loader"]:
        return "the position in the data differs"
    for name, weight in expected["model"].items():
        if not torch.allclose(found["model"][name], weight, RTOL, ATOL):
            return f"{name} differs by {float((found['model'][name] - weight).abs().max()):.1e}"
    return ""


def masked(folder: Path) -> list[tuple[Any, Any]]:
    """Update and its masked frames, for every line of training in a folder's log."""
    lines = [json.loads(line[5:]) for line in (folder / "nvlog.json").read_text().splitlines()]
    return [(line["step"], line["data"]["train_ntokens"]) for line in lines if "train_ntokens" in line.get("data", {})]
