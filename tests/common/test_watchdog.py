"""Two processes of which one is killed, frozen, stuck or fails: the other one ends, too, and says why.

Run as a program, this file is one of the processes. No launcher is there to end them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

import pytest
import torch

from common import distributed, watchdog
from common.errors import ConfigError, DataError, TrainingError
from common.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()


def process(scenario: str) -> None:
    """Two updates in step; then the scenario befalls process 1 (or 0)."""
    from common.entry import run_program  # noqa: PLC0415

    watchdog.TICK = 0.2
    hang = 3.0 if scenario == "hang" else 0.0

    def main(argv: object) -> None:
        with (
            distributed.session("cpu") as device,
            Watchdog(heartbeat_timeout=3.0, hang_timeout=hang) as dog,
        ):
            for update in (1, 2):
                dog.at("forward and backward", update=update, ids=[f"clip{n}" for n in range(6)])
                distributed.sum_across_ranks(1.0, device)
            while [peer.standing.update for peer in dog._peers.values()] != [2]:
                time.sleep(0.01)
            distributed.barrier()  # now each has heard of the other
            if distributed.rank() == (0 if scenario == "kill_0" else 1):
                befall(scenario)
            if scenario != "finish":
                distributed.sum_across_ranks(1.0, device)

    run_program(main, [], rank=distributed.launched_rank(), local_rank=distributed.local_rank())


def befall(scenario: str) -> None:
    if scenario.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif scenario == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif scenario == "data":
        raise DataError("train.tsv:7: a.flac: zero bytes; copy the file again")
    elif scenario == "alone":
        raise ConfigError("--data: is no folder here")  # of those that are told by the first of a machine
    elif scenario == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    elif scenario == "bug":
        raise KeyError("bug")
    elif scenario == "hang":
        time.sleep(600)
    elif scenario == "finish":
        time.sleep(5.0)  # longer than the timeout: who has finished is not missed


def two_processes(scenario: str, log: int | IO[str] = subprocess.PIPE) -> tuple[list[int], list[str | None]]:
    """Exit statuses and what was written to standard error, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, scenario],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stderr=log,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for one in processes:
            one.kill()
    return [one.returncode for one in processes], told


PLACE = "forward and backward, update 2, utterances clip0, clip1, clip2, clip3 and 2 more"


@pytest.mark.parametrize(
    ("scenario", "statuses", "verdict"),
    [
        ("kill", [1, -9], "was killed; it was last seen in: " + PLACE),
        ("freeze", [1, -9], "has shown no sign of life for 3 s (--heartbeat_timeout)"),
        ("kill_0", [-9, 1], "was killed; it was last seen in: " + PLACE),  # and the store with it
    ],
)
def test_a_silent_process_ends_the_others_which_say_where_it_stood(scenario, statuses, verdict):
    found, told = two_processes(scenario)
    assert found == statuses
    victim = 0 if scenario == "kill_0" else 1
    survivor = told[1 - victim]
    assert f"error: process {victim} (host {HOST}, pid " in survivor
    assert verdict in survivor
    assert f"  process {1 - victim} (host {HOST}, pid " in survivor
    assert survivor.count(PLACE) >= 2
    assert "the same command (with --resume) goes on from the last checkpoint" in survivor


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("data", "error: train.tsv:7: a.flac: zero bytes; copy the file again ("),
        ("memory", "error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB; halve --num_concat_batches"),
        ("bug", "error: process 1 (host "),
    ],
)
def test_a_process_that_fails_tells_its_place_and_the_others_leave_it_the_word(scenario, message):
    statuses, told = two_processes(scenario)
    assert statuses == [1, 1]
    assert message in told[1]
    assert f"process 1 (host {HOST}, pid " in told[1]
    assert PLACE in told[1]
    assert "KeyError" in told[1] if scenario == "bug" else "Traceback" not in told[1]
    assert "error" not in told[0]


def test_what_only_one_process_finds_is_told_by_the_other_where_that_one_leaves_it_to_the_first():
    statuses, told = two_processes("alone")
    assert statuses == [1, 2]
    assert f"error: process 1 (host {HOST}, pid " in told[0]
    assert "--data: is no folder here" in told[0]
    assert told[1] == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_keeps_no_process_alive():
    with Path("/dev/full").open("w") as full:
        assert two_processes("freeze", full)[0] == [1, -9]


def test_all_know_when_one_is_asked_to_stop():
    dog, other = Watchdog(), Watchdog()
    other.is_asked = lambda: True
    assert not dog.others_are_asked
    dog._hear(1, json.dumps(asdict(other._own())).encode())
    assert dog.others_are_asked


def test_a_process_that_stands_still_ends_all_with_its_stack():
    statuses, told = two_processes("hang")
    assert statuses == [1, 1]
    first = told[0]
    assert "error: no progress for " in first
    for rank in range(2):
        assert f"  process {rank} (host {HOST}, pid " in first
    assert "Current thread" in first  # where it waits


def test_a_process_that_has_finished_is_not_missed():
    assert two_processes("finish") == ([0, 0], ["", ""])


def test_running_out_of_memory_alone_tells_the_place_and_the_remedy():
    dog = Watchdog()
    dog.at("forward", update=7, ids=["a", "b"])
    with pytest.raises(TrainingError, match="not enough memory.*--num_concat_batches") as caught, dog:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")
    assert caught.value.where.endswith("forward, update 7, utterances a, b")


def test_other_errors_of_a_single_process_stay_what_they_are():
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError) as caught, Watchdog():
        raise error
    assert caught.value is error


if __name__ == "__main__":
    process(sys.argv[1])
