"""Runs of train.py to which machines do what they do: killed, damaged, full disks, signals, frozen processes.

Few of each; benchmarks/faults.py does the same many times, and says what surviving means.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

import pytest

from benchmarks import fault_files, fault_groups, fault_kills, fault_signals
from benchmarks.fault_kills import Try
from benchmarks.fault_runs import SkippedError
from benchmarks.faults_made import GROUP, PRETRAIN, Bench

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches files and processes as Linux does")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


def check(tries: Iterable[Try], number: int) -> None:
    """So many tries, all survived."""
    try:
        found = list(tries)
    except SkippedError as reason:
        pytest.skip(str(reason))
    assert [one for one in found if one.wrong] == []
    assert [one.updates_lost for one in found] == [0] * number


def test_a_run_killed_at_drawn_points_comes_to_the_same_weights(bench):
    check(fault_kills.killed_at_points(bench, PRETRAIN, 3), 3)


def test_a_truncated_checkpoint_is_reported_and_the_one_before_is_used(bench):
    check(fault_files.truncated(bench, runs=1, read=10), 11)


def test_a_flipped_bit_is_found_or_does_not_matter(bench):
    check(fault_files.flipped(bench, runs=1, read=30), 31)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_full_disk_ends_the_run_in_one_line_and_costs_nothing_that_was_saved(bench, share):
    check(fault_files.full_disk(bench, [share]), 1)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(bench):
    check(fault_signals.stopped(bench, PRETRAIN), len(fault_signals.SIGNALS))


def test_ctrl_c_again_ends_it_at_once(bench):
    check(fault_signals.interrupted_twice(bench), 1)


def test_a_second_run_in_the_same_folder_is_refused(bench):
    check(fault_signals.second_run(bench), 1)


def test_a_killed_and_a_frozen_process_end_all_and_are_named(bench):
    check(fault_groups.lost_process(bench, [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)]), 2)


def test_an_error_of_one_process_ends_all_and_names_it(bench):
    check(fault_groups.bad_file(bench, GROUP), 1)


def test_a_clip_that_gives_nan_spoils_no_checkpoint(bench):
    check(fault_groups.not_a_number(bench), 1)
