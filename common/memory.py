"""How much memory this process takes at its peak, how much it could have, and trying what may be too much.

On a GPU torch's allocator knows. On the CPU it is what the process has in RAM, and what the system, control groups and
RLIMIT_AS leave.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.control_groups import Read, memory_left, read_system
from common.host_memory import give_back_freed_memory

if sys.platform != "win32":
    import resource

GIB = 2**30
# What torch and the libraries below it say when memory is not to be had, beside their own types of errors.
_FAILURES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "could not create a primitive",
    "could not create a memory object",
)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error says that memory was not to be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FAILURES)


def available(device: torch.device, sharing: int = 1) -> int:
    """Bytes that this process could hold: what it has, and of what is free its part where `sharing` do the same.

    On a GPU what others have is gone; on the CPU the processes of a machine share.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    give_back_freed_memory()
    return _status("VmRSS") + free_memory() // sharing


def start_peak(device: torch.device) -> None:
    """Begin to watch for the peak; what was freed before does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back_freed_memory()
    with suppress(OSError):  # the peak is then that since the start
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest size (man 5 proc)


def peak(device: torch.device) -> int:
    """The most bytes in use since start_peak(); waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


@contextmanager
def limited(device: torch.device, most: int) -> Iterator[None]:
    """On the CPU, let a process that would pass `most` bytes get an error, where it would else be killed.

    Systems promise more memory than there is, and end whoever uses it. RLIMIT_AS makes them refuse in time.
    """
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    torch.ones(2**20).exp_()  # starts the threads, whose stacks take address space, too
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _status("VmSize") + max(most - _status("VmRSS"), 0)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if before == resource.RLIM_INFINITY else min(wanted, before), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def free_memory(read: Read = read_system) -> int:
    """Bytes of RAM that this process could get on top of what it has. `read`: gives the files of the system."""
    left = memory_left(read)
    found = [] if left is None else [left]
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    if sys.platform != "win32":
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - _status("VmSize"))
        if not found:  # no Linux: all that is built in
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(min(found, default=0), 0)


def _status(name: str) -> int:
    """A size of this process in bytes: VmRSS, VmHWM (its peak), VmSize (address space)."""
    for line in read_system("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
