"""What a machine has for training, as far as it can be told without torch: packages, cores, memory, disk, ports.

Every check takes `Probes`, the questions that are asked of the system, so that any machine can be described to it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import importlib.metadata
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import control_groups
from common.errors import size
from utils import program
from utils.findings import Finding, Status

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 2**20, 2**30
OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 11)
TORCHRUN_PORT = 29500

# Package of requirements.txt -> (whether no run gets far without it, what it is for)
PURPOSES: dict[str, tuple[bool, str]] = {
    "torch": (True, "everything"),
    "numpy": (True, "everything"),
    "soundfile": (True, "reading audio"),
    "jiwer": (True, "word error rates in fine-tuning and inference"),
    "tensorboard": (True, "the log of a run"),
    "tqdm": (False, "progress bars"),
    "librosa": (False, "audio of other sampling rates, --trim_silence"),
    "soxr": (False, "audio of other sampling rates, made corpora"),
    "espeakng-loader": (False, "the made corpus of scripts/quickstart.sh"),
    "safetensors": (False, "checkpoints of Hugging Face"),
    "matplotlib": (False, "pictures"),
}
OPTIONAL = {
    "transformers": "benchmarks against it, and some tests",
    "webdataset": "a few more openers of shards",
    "dllogger": "nvlog.json by NVIDIA's own writer",
}

# What the loader's workers and NCCL share; docker gives a container 64 MiB.
SHARED_MEMORY = (65 * MIB, GIB)
# 95 M weights with their two moments in fp32 are 1.1 GB; a run keeps several such checkpoints.
DISK = (int(1.2e9), 20 * GIB)
MEMORY = (GIB, 4 * GIB)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that cannot lock
NO_LOCK_REMEDY = "never start two runs with the same --output_dir, or choose one on another disk"

# Takes a lock that another process holds: status 0 if that is refused, as it should be.
_SECOND_LOCK = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except (BlockingIOError, PermissionError):
    sys.exit(0)
sys.exit(3)
"""


def installed_version(package: str) -> str | None:
    """None for a package that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def disk_space(path: str) -> tuple[int, int]:
    """Free bytes and all bytes of the file system that a path is on."""
    usage = shutil.disk_usage(path)
    return usage.free, usage.total


def bind_port(port: int) -> int:
    """Listen on a port of this machine for a moment; 0 is any. OSError where that is refused."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(1)
        return listener.getsockname()[1]


def lock_excludes(folder: Path) -> bool:
    """Whether a lock on a file in this folder keeps another process out, as `common/lock.py` relies on.

    OSError where a file cannot be written or locked.
    """
    import fcntl  # not on every system

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, "-c", _SECOND_LOCK, file.name]
        return subprocess.run(command, check=False, timeout=60).returncode == 0  # noqa: S603


@dataclass(frozen=True)
class Probes:
    """What is asked of the system."""

    version: Callable[[str], str | None] = installed_version
    text: control_groups.Read = control_groups.read_system
    space: Callable[[str], tuple[int, int]] = disk_space
    bind: Callable[[int], int] = bind_port
    resolve: Callable[[str], str] = socket.gethostbyname
    hostname: Callable[[], str] = socket.gethostname
    locks: Callable[[Path], bool] = lock_excludes
    cores: Callable[[], int] = program.cpu_count


# ---- Packages -------------------------------------------------------------------------------------------------------


def python_version(version: tuple[int, int, int] = sys.version_info[:3]) -> Iterator[Finding]:
    """The interpreter that runs this."""
    text = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        remedy = "install Python {}.{} or newer, and name it in PYTHON for scripts/setup_env.sh".format(*OLDEST_PYTHON)
        yield Finding("packages", "python", "problem", text, remedy)
    else:
        yield Finding("packages", "python", "ok", f"{text}, {sys.executable}")


def installed(findings: Iterable[Finding]) -> set[str]:
    """Names of the packages that are there, by the findings about packages."""
    return {finding.name for finding in findings if finding.values.get("version")}


def packages(probes: Probes) -> Iterator[Finding]:
    """Every package of requirements.txt against the tested versions, then the optional ones."""
    pins = pinned_versions(probes.text(str(ROOT / "constraints.txt")), sys.version_info[:2])
    for name in requirement_names(probes.text(str(ROOT / "requirements.txt"))):
        yield _package(name, probes.version(name), pins.get(name, ""))
    for name, purpose in OPTIONAL.items():
        version = probes.version(name)
        yield Finding("packages", name, "ok", version or f"not installed, and not needed ({purpose})")


def requirement_names(text: str) -> list[str]:
    """Names in a requirements file."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in text.splitlines() if not line.startswith(("#", "-")))
    return [match.group().lower() for match in found if match]


def pinned_versions(text: str, python: tuple[int, ...]) -> dict[str, str]:
    """Name -> version of a constraints file, for this Python; its only markers compare python_version."""
    pins = {}
    for line in text.splitlines():
        match = re.match(r'([A-Za-z0-9._-]+)==([^;\s]+)(?:;\s*python_version\s*(<|>=)\s*"(\d+)\.(\d+)")?', line)
        if match:
            name, version, sign, *numbers = match.groups()
            bound = tuple(int(number) for number in numbers if number)
            if not sign or (python < bound) == (sign == "<"):
                pins[name.lower()] = version
    return pins


def _package(name: str, version: str | None, pin: str) -> Finding:
    essential, purpose = PURPOSES.get(name, (True, "the toolkit"))
    values = {"version": version, "tested": pin}
    if version is None:
        status: Status = "problem" if essential else "warning"
        remedy = f"run bash scripts/setup_env.sh, or: python -m pip install -c constraints.txt {name}"
        return Finding("packages", name, status, f"not installed, needed for {purpose}", remedy, values)
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if name == "torch" and numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        remedy = f"install torch {oldest} or newer: bash scripts/setup_env.sh"
        return Finding("packages", name, "problem", f"{version}, older than {oldest}", remedy, values)
    if version.split("+")[0] == pin or not pin:
        return Finding("packages", name, "ok", version, values=values)
    if version.split(".")[0] == pin.split(".")[0]:
        return Finding("packages", name, "ok", f"{version} (tested: {pin})", values=values)
    remedy = f"should it misbehave: python -m pip install -c constraints.txt {name}"
    return Finding("packages", name, "warning", f"{version}, tested is {pin}", remedy, values)


# ---- Cores and memory -----------------------------------------------------------------------------------------------


def processor(probes: Probes) -> Iterator[Finding]:
    """Model of the CPU, and how many of its cores are ours."""
    text = probes.text("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = names[0] if names else platform.processor() or platform.machine()
    present = len(names) or probes.cores()
    yield Finding("cpu", "model", "ok", name)
    usable, quota = probes.cores(), control_groups.cores(probes.text)
    values = {"usable": usable, "present": present, "quota": quota}
    told = f"{usable} of {present} usable"
    if quota is not None and quota < usable:
        remedy = f"set OMP_NUM_THREADS={max(1, int(quota))}, or ask for more cores"
        told += f", and their group may use {quota:g} cores' worth of time"
        yield Finding("cpu", "cores", "warning", told, remedy, values)
    else:
        yield Finding("cpu", "cores", "ok", told, values=values)


def memory(probes: Probes) -> Iterator[Finding]:
    """Memory that is free for programs, and what a container or a batch system leaves of it."""
    found = dict(re.findall(r"^(\w+):\s*(\d+) kB", probes.text("/proc/meminfo"), re.MULTILINE))
    left = control_groups.memory_left(probes.text)
    if "MemAvailable" not in found:
        yield Finding("memory", "available", "ok", "not told by this system", values={"group_left_bytes": left})
        return
    available, total = 1024 * int(found["MemAvailable"]), 1024 * int(found["MemTotal"])
    values = {"available_bytes": available, "total_bytes": total, "group_left_bytes": left}
    told = f"{size(available)} of {size(total)} available" + (
        "" if left is None else f", {size(left)} left in the control group"
    )
    remedy = "end other programs, use fewer --num_workers, or ask for more memory"
    usable = available if left is None else min(available, left)
    yield _graded("memory", "available", usable, MEMORY, told, remedy, values)


def shared_memory(probes: Probes) -> Iterator[Finding]:
    """/dev/shm, through which batches come from the workers."""
    try:
        free, total = probes.space("/dev/shm")  # noqa: S108 - not a temporary file
    except OSError:
        told = "not there"
        yield Finding("memory", "/dev/shm", "problem", told, "mount it (mount -t tmpfs), or use --num_workers 0")
        return
    remedy = "start the container with --ipc=host or --shm-size=8g, or use --num_workers 0"
    told = f"{size(free)} of {size(total)} free"
    values = {"free_bytes": free, "total_bytes": total}
    yield _graded("memory", "/dev/shm", free, SHARED_MEMORY, told, remedy, values)


# ---- Disk -----------------------------------------------------------------------------------------------------------


def disk(probes: Probes, output_dir: Path) -> Iterator[Finding]:
    """Room for checkpoints, and whether a lock there keeps a second run out."""
    folder = output_dir.resolve()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        yield Finding("disk", "folder", "problem", f"{folder} is no folder", "choose another --output_dir")
        return
    try:
        free, total = probes.space(str(folder))
    except OSError as error:
        yield Finding("disk", "space", "problem", f"{folder}: {error.strerror}", "choose another --output_dir")
        return
    told = f"{size(free)} of {size(total)} free in {folder}"
    remedy = "make room, or choose another --output_dir; a checkpoint of Base takes 1.1 GB, and a run keeps several"
    yield _graded("disk", "space", free, DISK, told, remedy, {"free_bytes": free, "total_bytes": total})
    yield _lock(probes, folder)


def _lock(probes: Probes, folder: Path) -> Finding:
    try:
        excludes = probes.locks(folder)
    except (OSError, ImportError, subprocess.TimeoutExpired) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            remedy = "change its permissions, or choose another --output_dir"
            return Finding("disk", "writing", "problem", f"{folder}: cannot be written ({error.strerror})", remedy)
        return Finding("disk", "lock", "warning", f"{folder}: files cannot be locked ({error})", NO_LOCK_REMEDY)
    if not excludes:
        return Finding("disk", "lock", "warning", f"{folder}: a lock does not keep another process out", NO_LOCK_REMEDY)
    return Finding("disk", "lock", "ok", "a locked file keeps another process out")


# ---- Ports ----------------------------------------------------------------------------------------------------------


def network(probes: Probes) -> Iterator[Finding]:
    """What several processes on one machine need to meet."""
    host = probes.hostname()
    for name, remedy in (
        ("localhost", "add the line `127.0.0.1 localhost` to /etc/hosts"),
        (host, f"add the line `127.0.0.1 {host}` to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo on a single machine"),
    ):
        try:
            address = probes.resolve(name)
        except OSError as error:
            status: Status = "problem" if name == "localhost" else "warning"
            yield Finding("network", "name", status, f"{name} has no address ({error})", remedy)
        else:
            yield Finding("network", "name", "ok", f"{name} is {address}")
    try:
        probes.bind(0)
    except OSError as error:
        remedy = "allow this user to open ports; without them only a single process can train"
        yield Finding("network", "free port", "problem", f"no port can be opened ({error.strerror})", remedy)
        return
    yield Finding("network", "free port", "ok", "a port can be opened")
    yield _default_port(probes)


def _default_port(probes: Probes) -> Finding:
    name = f"port {TORCHRUN_PORT}"
    try:
        probes.bind(TORCHRUN_PORT)
    except OSError as error:
        remedy = "another run may be going on; give yours another: MASTER_PORT, or torchrun --master_port"
        return Finding("network", name, "warning", f"torchrun's default is taken ({error.strerror})", remedy)
    return Finding("network", name, "ok", "torchrun's default is free")


def _graded(
    section: str,
    name: str,
    value: float,
    limits: tuple[int, int],
    told: str,
    remedy: str,
    values: dict[str, Any],
) -> Finding:
    """A problem below the first limit, a warning below the second."""
    if value >= limits[1]:
        return Finding(section, name, "ok", told, values=values)
    return Finding(section, name, "problem" if value < limits[0] else "warning", told, remedy, values)
