"""The processes that read audio: how they start, and how it is told that one has died."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.data.collate import Batch, FileNews
from common.data.sampler import PlannedSubBatch
from common.data.watch import BadFiles
from common.errors import DataError, UserError
from common.host_memory import give_back_freed_memory
from common.preemption import held_back, shield_worker

PREFETCH_PER_WORKER = 2
TIDY_EVERY = 256  # batches of a worker


def read_batches(
    source: Dataset,
    keys: Iterable[list[PlannedSubBatch]] | None,
    num_workers: int,
    pin_memory: bool,
    bad_files: BadFiles,
) -> Iterator[Batch]:
    """Batches in the order of the keys (None: of the source); errors that were returned are raised."""
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # a private one: starting to iterate must not draw from the global one
        **_worker_options(num_workers),
    )
    for batch in living(loader):
        if isinstance(batch, UserError):
            raise batch
        if isinstance(batch, FileNews):
            bad_files.add(batch.bad)
        else:
            yield batch


def living(loader: DataLoader) -> Iterator[Any]:
    """What the workers of a loader give. DataError where one was killed, which torch tells as a RuntimeError."""
    try:
        with held_back():  # a worker that has not come to shield_worker() yet would die of them
            batches = iter(loader)
        _deaths.take_over()
        while True:
            with _deaths.told_here():
                batch = next(batches, _NO_MORE)
            if batch is _NO_MORE:
                return
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"--num_workers {loader.num_workers}: a process that reads audio was killed, most often because memory or "
            "/dev/shm was full; use fewer, or smaller batches"
        ) from None


class _Deaths:
    """Tells of dead workers where a batch is waited for.

    torch tells of them in a signal handler, so anywhere: in the middle of an update, which could not be saved then.
    """

    def __init__(self) -> None:
        self._tell: Callable[[int, FrameType | None], Any] | None = None
        self._waiting = False
        self._untold: RuntimeError | None = None

    def take_over(self) -> None:
        """Come between the signal and torch's handler, when workers have been started; what came before is past."""
        self._untold = None  # of workers still waited for torch tells once more, a little later
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return  # torch has none
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._note:
            self._tell = handler
            signal.signal(signal.SIGCHLD, self._note)

    @contextmanager
    def told_here(self) -> Iterator[None]:
        """Raise torch's RuntimeError in here, at once or when the death comes."""
        self._waiting = True
        try:
            error, self._untold = self._untold, None
            if error is not None:
                raise error
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._tell is None:
            return
        try:
            self._tell(number, frame)
        except RuntimeError as error:
            if self._waiting:
                raise
            self._untold = error


_deaths = _Deaths()  # there is one handler per process
_NO_MORE = object()


def _worker_options(num_workers: int) -> dict[str, Any]:
    """How workers start.

    Forked on Linux: the arrays of a manifest are shared instead of copied, and no worker imports torch again.
    It is safe although the parent may hold a GPU and threads, because workers only use NumPy, libsndfile and
    single-threaded tensors on the CPU. Elsewhere forking is unsafe or unknown, so the platform's default is used.
    """
    if num_workers == 0:
        return {}
    options: dict[str, Any] = {"prefetch_factor": PREFETCH_PER_WORKER, "worker_init_fn": _start_worker}
    if sys.platform == "linux":
        options["multiprocessing_context"] = "fork"
    return options


def tidy_worker(batches: int) -> None:
    """Once in a while give memory back: clips of all lengths leave holes, which add up over days."""
    if batches % TIDY_EVERY == 0 and get_worker_info() is not None:
        give_back_freed_memory()


def _start_worker(_: int) -> None:
    """Leave signals to the main process, which ends the workers.

    What was inherited is kept out of garbage collections, which would write to its pages and so copy them.
    """
    shield_worker()
    gc.freeze()
