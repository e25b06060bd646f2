"""What the control groups of this process leave it (containers, batch systems): groups of version 1 and 2."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

Read = Callable[[str], str]  # path -> text of a file of the system, empty where there is none

# Version 1 writes a huge number, a multiple of the page size, where there is no limit.
_NO_LIMIT = 2**60
# The usual period, where a system does not tell it.
_PERIOD = 100_000


def read_system(path: str) -> str:
    """A file of the system; empty where it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def memory_left(read: Read = read_system) -> int | None:
    """Bytes that the tightest group leaves, copies of files counted as free; None without a limit."""
    left = []
    for folder, first in _folders("memory", read):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        limit, used = (read(f"{folder}/{name}").strip() for name in names)
        if limit.isdecimal() and used.isdecimal() and int(limit) < _NO_LIMIT:
            prefix = "total_" if first else ""
            left.append(int(limit) - int(used) + _of_files(read(f"{folder}/memory.stat"), prefix))
    return max(min(left), 0) if left else None


def cores(read: Read = read_system) -> float | None:
    """Cores' worth of time that the tightest group may use; None without a limit."""
    quotas = []
    for folder, first in _folders("cpu", read):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first else ("cpu.max",)
        text = " ".join(read(f"{folder}/{name}").strip() for name in names)
        quota, period = [*text.split(), str(_PERIOD), ""][:2]
        if quota.isdecimal() and period.isdecimal():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _folders(controller: str, read: Read) -> Iterator[tuple[str, bool]]:
    """The groups of this process that have a controller, from its own up to the top; whether they are of version 1.

    In a container some of them are not there: the path is then the host's.
    """
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        first = controllers != ""
        if first and controller not in controllers.split(","):
            continue
        top = PurePosixPath("/sys/fs/cgroup", *([controller] if first else []))
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield str(folder), first
            if folder == top:
                break


def _of_files(statistics: str, prefix: str) -> int:
    """Bytes that are copies of files, which the system drops first."""
    wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
    pairs = (line.split() for line in statistics.splitlines())
    return sum(int(pair[1]) for pair in pairs if pair[0] in wanted)
