"""How programs end: one line and a status."""

from __future__ import annotations

import pytest

from common.entry import run_program
from common.errors import ConfigError, DataError


def end(capsys, error, argv=(), rank=0):
    def main(_):
        if error:
            raise error

    with pytest.raises(SystemExit) as ended:
        run_program(main, argv, rank)
    return ended.value.code, capsys.readouterr().err


def test_mistakes_are_one_line_and_the_status_says_whose(capsys):
    assert end(capsys, None) == (0, "")
    assert end(capsys, ConfigError("--lr x: no number")) == (2, "error: --lr x: no number\n")
    assert end(capsys, DataError("a.tsv:3: no tab")) == (1, "error: a.tsv:3: no tab\n")
    assert end(capsys, KeyboardInterrupt()) == (130, "interrupted\n")


def test_a_wrong_flag_is_told_once_and_a_fault_by_the_process_that_met_it(capsys):
    assert end(capsys, ConfigError("--lr x: no number"), rank=1) == (2, "")
    assert end(capsys, DataError("a.tsv:3: no tab"), rank=1) == (1, "error: a.tsv:3: no tab (process 1)\n")


def test_debug_keeps_the_traceback_and_faults_of_the_program_are_not_hidden():
    def main(_):
        raise DataError("x")

    with pytest.raises(DataError):
        run_program(main, ["--debug"])

    def broken(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program(broken, [])
