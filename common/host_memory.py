"""How a process on the CPU gets its memory."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_NEVER = -1


def give_back_freed_memory() -> None:
    """Let glibc return to the system what lies free between what is in use; elsewhere nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors give back, up to 32 MiB apiece; elsewhere nothing is changed.

    A step makes and drops the same tensors over and over. By default glibc returns most of them to the system, and a
    new one costs a page fault per 4 KiB, in all a few percent of a step on the CPU (docs/performance.md). Larger ones
    still go back, so that the memory of a process does not grow by what lies between them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
