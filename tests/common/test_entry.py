"""How programs end: one line and a status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.entry import run_program
from common.errors import ConfigError, DataError, TrainingError


def end(capsys, error, argv=(), rank=0, local_rank=0):
    def main(_):
        if error:
            raise error

    with pytest.raises(SystemExit) as ended:
        run_program(main, argv, rank, local_rank)
    return ended.value.code, capsys.readouterr().err


def test_mistakes_are_one_line_and_the_status_says_whose(capsys):
    assert end(capsys, None) == (0, "")
    assert end(capsys, ConfigError("--lr x: no number")) == (2, "error: --lr x: no number\n")
    assert end(capsys, DataError("a.tsv:3: no tab")) == (1, "error: a.tsv:3: no tab\n")
    assert end(capsys, KeyboardInterrupt()) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("Stopped('saved', 75)", 75),
        ("ConfigError('x')", 2),
        ("KeyboardInterrupt()", 130),
        ("BrokenPipeError()", 141),  # as after SIGPIPE: whatever the program was about, it is not done
    ],
)
def test_the_status_does_not_depend_on_whether_the_last_words_can_be_written(error, status):
    program = f"""
from common.entry import run_program
from common.errors import ConfigError, Stopped
def main(_):
    raise {error}
run_program(main, [])
"""
    with Path("/dev/full").open("w") as full:
        for buffered in ("", "1"):
            environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
            ended = subprocess.run([sys.executable, "-c", program], stderr=full, cwd=ROOT, env=environment, check=False)
            assert ended.returncode == status


def test_output_that_is_lost_is_no_success():
    program = "from common.entry import run_program; run_program(lambda _: print('figures'), [])"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, cwd=ROOT, env=environment, check=False)
    assert ended.returncode == 1


def test_what_all_processes_find_is_told_once_per_machine_and_a_fault_by_the_process_that_met_it(capsys):
    for error, status in ((ConfigError("--lr x: no number"), 2), (TrainingError("codebook collapse"), 1)):
        assert end(capsys, error, rank=1, local_rank=1) == (status, "")
        assert end(capsys, error, rank=8) == (status, f"error: {error} (process 8)\n")
    error.by_all = False
    assert end(capsys, error, rank=1, local_rank=1) == (1, "error: codebook collapse (process 1)\n")
    fault = DataError("a.tsv:3: no tab")
    assert end(capsys, fault, rank=1, local_rank=1) == (1, "error: a.tsv:3: no tab (process 1)\n")


def test_debug_keeps_the_traceback_and_faults_of_the_program_are_not_hidden():
    def main(_):
        raise DataError("x")

    with pytest.raises(DataError):
        run_program(main, ["--debug"])

    def broken(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program(broken, [])
