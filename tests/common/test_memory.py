"""What memory there is, what a peak is, and errors instead of a killed process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from common import memory

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def system(files: dict[str, str]) -> Callable[[str], str]:
    return lambda path: files.get(path.lstrip("/"), "")


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:     8000 kB\n"}
# Version 2: the job's own group has no limit, the one above leaves 3000 - 2500 + 100 + 20.
SECOND = {
    "proc/self/cgroup": "0::/slice/job\n",
    "sys/fs/cgroup/slice/job/memory.max": "max\n",
    "sys/fs/cgroup/slice/job/memory.current": "2000\n",
    "sys/fs/cgroup/slice/memory.max": "3000\n",
    "sys/fs/cgroup/slice/memory.current": "2500\n",
    "sys/fs/cgroup/slice/memory.stat": "anon 1\ninactive_file 100\nactive_file 20\nfile 500\n",
}
# Version 1, seen from within a container: the path is the host's, and the limit lies at the top.
FIRST = {
    "proc/self/cgroup": "5:devices:/\n4:cpu,memory:/docker/0f3c\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 50\ntotal_active_file 7\n",
}


@linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [(MEMINFO, 8000 * 1024), (MEMINFO | SECOND, 620), (MEMINFO | FIRST, 6057), (SECOND, 620)],
)
def test_the_least_that_system_and_control_groups_leave_counts(files, expected):
    assert memory.free_memory(system(files)) == expected


@linux
def test_a_full_group_leaves_nothing():
    full = SECOND | {"sys/fs/cgroup/slice/memory.current": "9000\n"}
    assert memory.free_memory(system(MEMINFO | full)) == 0


@linux
def test_processes_of_a_machine_share_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 600 * MIB)
    alone, shared = memory.available(CPU), memory.available(CPU, 3)
    assert alone - shared == pytest.approx(400 * MIB, abs=20 * MIB)


@linux
def test_a_peak_is_that_since_its_start():
    torch.ones(400 * MIB // 4)
    memory.start_peak(CPU)
    before = memory.peak(CPU)
    torch.ones(200 * MIB // 4)  # freed at once
    assert memory.peak(CPU) - before == pytest.approx(200 * MIB, abs=20 * MIB)
    memory.start_peak(CPU)
    assert memory.peak(CPU) - before < 20 * MIB


@linux
def test_what_passes_the_limit_is_an_error_and_the_limit_ends():
    held = memory.available(CPU) - memory.free_memory()
    with memory.limited(CPU, held + 400 * MIB):
        torch.ones(100 * MIB // 4)
        assert memory.free_memory() <= 400 * MIB
        with pytest.raises(RuntimeError) as caught:
            torch.ones(800 * MIB // 4)
    assert memory.is_allocation_failure(caught.value)
    torch.ones(800 * MIB // 4)


def test_other_errors_are_no_failures_of_allocation():
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not memory.is_allocation_failure(caught.value)
    assert not memory.is_allocation_failure(OSError("out of memory"))
    assert memory.is_allocation_failure(MemoryError())
