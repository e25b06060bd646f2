"""Stopping when asked to: signals, and the one update after which all processes stop.

A Python handler runs only when the interpreter gets its turn, which a process that waits inside a collective does not
give it. So the signals arrive through a pipe, in a thread of their own.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from common import distributed
from common.errors import tell

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 130
# A terminal and a launcher may both pass on the same Ctrl-C; a person takes longer for the second one.
_ONE_KEYSTROKE = 0.5


class Preemption:
    """Notes SIGTERM, SIGINT and SIGUSR1 while it is entered; a second Ctrl-C ends the process at once.

    To be entered in the main thread.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None  # what asked this process to stop
        self._asked_at = 0.0
        self._handlers: dict[signal.Signals, object] = {}
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._pipe = (-1, -1)
        self._former_pipe = -1

    def __enter__(self) -> Preemption:
        """Take over the signals."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        self._former_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _leave_to_the_pipe) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._former_pipe)
        os.close(self._pipe[1])  # which ends the thread

    def agreed(self, device: torch.device) -> bool:
        """Whether all processes stop now: the same answer in all of them; called once per update by each.

        On GPUs the answer is that of the call before, so that no process waits for what it has just queued there.
        """
        asked = self.asked is not None
        if distributed.world_size() == 1:
            return asked
        total = distributed.sum_across_ranks(float(asked), device)
        if device.type != "cuda":
            return bool(total)
        answer = torch.empty((), dtype=total.dtype, pin_memory=True)
        answer.copy_(total, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self._pending = self._pending, (answer, event)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._note(signal.Signals(number))
        os.close(pipe)

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._asked_at = number, now
        elif number == signal.SIGINT and now - self._asked_at > _ONE_KEYSTROKE:
            tell("interrupted")
            os._exit(INTERRUPTED)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold the signals back from this thread, and from the processes that it starts meanwhile."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker() -> None:
    """Let a worker process outlive the signals that ask a whole job to stop, so that its parent can finish an update.

    Ctrl-C and SIGUSR1 are left to the parent. A SIGTERM counts only if the parent has sent it, which Linux tells;
    elsewhere nothing is changed.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), name="signals", daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # the parent ends, and nobody is to take that for an accident


def _leave_to_the_pipe(number: int, frame: object) -> None:
    """Something must be registered for a signal to reach the pipe."""
