"""The processes of a run: start and end of the group, who am I, sums and objects across ranks, DDP.

The only reader of the launcher's environment (torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and so on).
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import inspect
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import ConfigError, Stopped
from common.host_memory import keep_freed_memory

log = logging.getLogger(__name__)

DEVICES = ("auto", "cuda", "cpu")
# How long a rank waits for the others: rank 0 may be writing a checkpoint to a slow disk meanwhile.
TIMEOUT = timedelta(minutes=30)
# The option that sends the buffers around before every forward pass got another name in torch 2.13.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}

Object = TypeVar("Object")


@contextmanager
def session(device: str = "auto") -> Iterator[torch.device]:
    """Join the process group that the launcher describes (if any) and give this process its device.

    NCCL on CUDA, gloo on the CPU; a run without a launcher has no group and needs none.

    Args:
        device: "auto" (CUDA where there is a GPU, else the CPU), "cuda" or "cpu".

    Raises:
        ConfigError: no such device, fewer GPUs than processes, or an incomplete launcher environment.
    """
    place = _choose_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    set_threads(place)
    if place.type == "cpu":
        keep_freed_memory()
    grouped = _environment_number("WORLD_SIZE", 1) > 1
    if grouped:
        _join_group(place)
    stopped = None
    try:
        yield place
    except Stopped as asked:  # by all ranks, after the same update
        stopped = asked
    # Not in a `finally`: after an error the other ranks may be inside a collective that this one never joins,
    # and leaving in an orderly way would wait for them. The process ends, and the others see to it that they do, too.
    if grouped:
        _leave_group()
    if stopped is not None:
        raise stopped


def rank() -> int:
    """Number of this process in the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """The same as the launcher gave it, outside the session too."""
    return _environment_number("RANK", 0)


def launched_processes() -> int:
    """Number of processes as the launcher gave it, outside the session too."""
    return _environment_number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return _environment_number("LOCAL_RANK", 0)


def is_main() -> bool:
    """Whether this is the process that writes files and the console."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def sum_across_ranks(value: float | Tensor, device: torch.device | str) -> Tensor:
    """Sum of `value` over all processes as a new float64 tensor on `device`, with the shape of `value`.

    Does not wait for the device. The tensor handed in is left as it is.
    """
    if isinstance(value, Tensor):
        total = value.detach().to(device=device, dtype=torch.float64, copy=True)
    else:
        # full() fills on the device; tensor() would copy from the host.
        total = torch.full((), value, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_objects(item: Object) -> list[Object]:
    """The objects of all ranks, in order of rank, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: Object, src: int = 0) -> Object:
    """The object of rank `src`, on every rank; what the other ranks hand in is ignored."""
    if world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=src)
    return items[0]


class SingleProcess(nn.Module):
    """What wrap() gives when there is one process: `module` and `no_sync()` as DistributedDataParallel has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """There is nothing to synchronise."""
        yield


def wrap(
    module: nn.Module, device: torch.device, *, bucket_cap_mb: float = 25
) -> DistributedDataParallel | SingleProcess:
    """Make backward average the gradients over the ranks; `.module` is the module, `.no_sync()` postpones.

    Every parameter that requires a gradient must take part in every forward pass (with 0 * its sum if need
    be). Buffers are constants here, so they are not sent around.
    """
    if world_size() == 1:
        return SingleProcess(module)
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_cap_mb,
        **_NO_BUFFERS,
    )


def machine() -> str:
    """This machine among those of the run: its name, and what tells containers of one name apart."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def open_store(name: str, timeout: timedelta) -> dist.Store:
    """A connection of its own to the store of the process group, with keys of its own.

    A store serves one caller at a time, so a thread cannot use the group's.
    """
    host, port = os.environ["MASTER_ADDR"], _environment_number("MASTER_PORT", 0)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(name, store)


def store_host() -> str:
    """The machine that has the store of the process group."""
    return os.environ.get("MASTER_ADDR", "")


def is_elastic() -> bool:
    """Whether the launcher starts the processes again after one has failed."""
    return _environment_number("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def set_threads(device: torch.device) -> None:
    """Share the cores of a machine among its CPU processes, unless OMP_NUM_THREADS says how.

    Several processes that each use every core are many times slower than one thread each.
    """
    if device.type == "cpu" and local_processes() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // local_processes()))


def local_processes() -> int:
    """Training processes on this machine."""
    return _environment_number("LOCAL_WORLD_SIZE", 1)


def omp_threads() -> str:
    """OMP_NUM_THREADS as it is set, else nothing."""
    return os.environ.get("OMP_NUM_THREADS", "")


def usable_cores() -> int:
    """Cores this process may run on (fewer than the machine has in a container or under a scheduler)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _choose_device(device: str) -> torch.device:
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: unknown device; choose one of {', '.join(DEVICES)}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device; check the driver and that torch is a CUDA build, "
            "or use --device cpu"
        )
    index, available = local_rank(), torch.cuda.device_count()
    if index >= available:
        error = ConfigError(
            f"--device {device}: process {index} of this machine (LOCAL_RANK, from 0) has no GPU, {available} visible; "
            f"start at most {available} per machine (NUM_GPUS={available}), or use --device cpu"
        )
        error.by_all = False
        raise error
    return torch.device("cuda", index)


def _join_group(device: torch.device) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}: {', '.join(missing)} not set; "
            "start several processes with torchrun (the scripts do), or unset WORLD_SIZE"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    log.info("process %d of %d, %s, %s", rank(), world_size(), backend, device)


def _leave_group() -> None:
    # A gloo thread that still holds a finished piece of work when the interpreter ends aborts the process. The
    # barrier lets the threads finish, and collecting what is left of DDP lets the group end them.
    barrier()
    gc.collect()
    dist.destroy_process_group()


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(f"{name} {text}: must be a whole number from 0; start the program with torchrun, or unset it")
    return int(text)
