"""A worker that dies is told of where its batch is waited for, in one line, and nowhere else."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from common.data.workers import living
from common.errors import DataError

KILLED = "--num_workers 1: a process that reads audio was killed"


class Numbers(Dataset):
    """Takes its time for the last one."""

    def __len__(self):
        return 6

    def __getitem__(self, number):
        time.sleep(60 if number == 5 else 0)
        return number


def kill_the_worker():
    """And wait until the system has told the parent, whose handler has then run."""
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0)  # a bytecode boundary


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_death_between_two_batches_waits_for_the_next_one():
    batches = living(DataLoader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert next(batches) == 0
    kill_the_worker()
    update = sum(range(1000))  # an update, in the middle of which nothing may be raised
    assert update == 499500
    with pytest.raises(DataError, match=KILLED):
        next(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_death_while_its_batch_is_waited_for_is_told_at_once():
    batches = living(DataLoader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
    (worker,) = multiprocessing.active_children()
    begin = time.monotonic()
    if not os.fork():
        time.sleep(0.3)  # the parent waits by then; if not, the death is told a moment later
        os.kill(worker.pid, signal.SIGKILL)
        os._exit(0)
    with pytest.raises(DataError, match=KILLED):
        next(batches)
    assert time.monotonic() - begin < 30


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_the_death_of_a_worker_of_the_past_is_no_matter():
    batches = living(DataLoader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert next(batches) == 0
    kill_the_worker()
    others = living(DataLoader(range(3), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert list(others) == [0, 1, 2]


def test_other_errors_stay_what_they_are():
    class Broken:
        num_workers = 3

        def __iter__(self):
            yield 1
            raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        list(living(Broken()))
