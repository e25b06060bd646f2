"""Signals that ask to stop, in this process and in another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from common import preemption
from common.preemption import SIGNALS, Preemption, held_back, shield_worker

CPU = torch.device("cpu")


def wait_until(happened, seconds=20):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_nothing(number):
    with Preemption() as asked:
        assert not asked.agreed(CPU)
        os.kill(os.getpid(), number)
        wait_until(lambda: asked.asked is not None)
        assert asked.asked == number
        assert asked.agreed(CPU)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("second", "later", "ended"),
    [
        (signal.SIGINT, 0.01, []),  # the terminal's and the launcher's, of one keystroke
        (signal.SIGINT, 1.0, [130]),
        (signal.SIGTERM, 1.0, []),  # a launcher may insist
    ],
)
def test_the_second_ctrl_c_ends_the_process(monkeypatch, second, later, ended):
    statuses, now = [], [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption.os, "_exit", statuses.append)
    asked = Preemption()
    asked._note(signal.SIGINT)
    now[0] += later
    asked._note(second)
    assert statuses == ended
    assert asked.asked == signal.SIGINT


def test_a_process_whose_main_thread_is_stuck_ends_at_the_second_ctrl_c():
    stuck = "import threading; from common.preemption import Preemption\n"
    stuck += "with Preemption() as asked:\n    print('ready', flush=True)\n    threading.Event().wait()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", stuck], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"

        def ended():
            process.send_signal(signal.SIGINT)
            return process.poll() is not None

        wait_until(ended)
        assert (process.returncode, process.stderr.read()) == (130, "interrupted\n")


def echo(pipe):
    shield_worker()
    while True:
        pipe.send(pipe.recv())


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
def test_a_shielded_worker_ends_for_its_parent_only():
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=echo, args=(theirs,), daemon=True)
    worker.start()
    ours.send("ready")
    assert ours.recv() == "ready"
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        ours.send(name)
        assert ours.recv() == name
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals are not held back there")
def test_signals_that_are_held_back_are_not_lost_and_are_inherited_so():
    with Preemption() as asked:
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            line = "import signal; print(*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, set())))"
            child = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
            assert {int(number) for number in child.stdout.split()} >= {int(number) for number in SIGNALS}
        wait_until(lambda: asked.asked is not None)
        assert asked.asked == signal.SIGTERM
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & set(SIGNALS)
