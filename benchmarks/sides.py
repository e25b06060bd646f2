"""The sides of a comparison, each in a process of its own that is set up and builds its step as its program would.

The processes live as long as the comparison. One measures while the others wait for their next order, which takes no
processor time, and what a program sets for its whole process (memory allocator, patches) stays its own.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from benchmarks.our_step import OurParts, OurStep
from benchmarks.peers import Stepper
from benchmarks.stopwatch import MatrixRate, Stopwatch, peak_memory
from benchmarks.workload import Workload
from common.errors import TrainingError, UserError
from wav2vec2.build import HALF

Program = Callable[[Workload], AbstractContextManager[Stepper]]

PAUSE = 0.05  # seconds: GNU OpenMP's threads wait actively for some milliseconds after they have worked


class Bench:
    """What can be asked of a side; it lives in the side's process."""

    def __init__(self, stepper: Stepper, workload: Workload) -> None:
        self._stepper, self._batch = stepper, workload.batch()
        self._stopwatch = Stopwatch(workload.device)

    def start(self, steps: int) -> dict[str, Any]:
        """The first steps.

        `memory_bytes` that they need, `first_step_s` (what is compiled, chosen or allocated once is in it), and
        `parameters` (None: not told).
        """
        seconds: list[float] = []
        memory = peak_memory(lambda: seconds.append(self._stopwatch.time(self._step, 1)), steps, self._stopwatch.device)
        parameters = getattr(self._stepper, "num_parameters", None)
        return {"memory_bytes": memory, "first_step_s": seconds[0], "parameters": parameters}

    def time(self, steps: int) -> float:
        """Mean seconds of a step."""
        time.sleep(PAUSE)
        return self._stopwatch.time(self._step, steps)

    def _step(self) -> None:
        self._stepper.step(self._batch)


class OurBench(Bench):
    """The toolkit's own side, which also tells about its parts and about the device."""

    def __init__(self, stepper: Stepper, workload: Workload) -> None:
        super().__init__(stepper, workload)
        self._ours = cast(OurStep, stepper)
        self._dtype = HALF.get(workload.recipe.precision.name, torch.float32)

    def start(self, steps: int) -> dict[str, Any]:
        """The same; only then come the parts, whose inputs and gradients are no memory of a step."""
        found = super().start(steps)
        self._parts = OurParts(self._ours, self._batch)
        self._parts.time(self._stopwatch, 1)
        self._matrix = MatrixRate(self._stopwatch, self._dtype)
        return found

    def time_parts(self, steps: int) -> dict[str, float]:
        """Mean seconds of every part; measures the matrix products, too."""
        seconds = self._parts.time(self._stopwatch, steps)
        self._matrix.measure(steps)
        return seconds

    def finish(self) -> dict[str, Any]:
        """`matrix_rate` of all rounds, and `skipped_updates` of all steps."""
        return {"matrix_rate": self._matrix.result(), "skipped_updates": self._ours.optimizer.num_skipped}


@dataclass(frozen=True)
class Side:
    """One implementation: its name in messages, what its process runs, and what can be asked of it."""

    name: str
    program: Program
    bench: type[Bench] = Bench


class SideProcess:
    """A side at work in its process; the first thing to ask is start()."""

    def __init__(self, side: Side, workload: Workload, threads: int) -> None:
        self._name = side.name
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, side, workload, threads))
        self._process.start()
        other_end.close()

    def start(self, steps: int) -> dict[str, Any]:
        """See Bench.start."""
        return self.ask("start", steps)

    def time(self, steps: int) -> float:
        """See Bench.time."""
        return self.ask("time", steps)

    def ask(self, question: str, *arguments: Any) -> Any:
        """Call a method of the side's bench.

        Raises:
            UserError: what the side raised, with its name.
            TrainingError: its process has ended; it has said why, or the system has stopped it.
        """
        with suppress(ConnectionError):  # it has ended, and may have left word
            self._connection.send((question, arguments))
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            raise TrainingError(
                f"the process of {self._name} ended with status {status}; if it told no error, there was too little "
                "memory: lower --batch or --seconds, or name fewer --plain"
            ) from None
        if isinstance(answer, UserError):
            raise type(answer)(f"{answer} (told by {self._name})")
        return answer

    def end(self) -> None:
        """Stop the process, whatever it does."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


@contextmanager
def at_work(side: Side, workload: Workload, threads: int) -> Iterator[SideProcess]:
    """The process of a side, which ends with this context; `threads` of the CPU, 0 for torch's own number."""
    process = SideProcess(side, workload, threads)
    try:
        yield process
    finally:
        process.end()


def _serve(connection: Connection, side: Side, workload: Workload, threads: int) -> None:
    """Answer until nobody asks any more; the last answer may be the error of a user."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this process
    if threads:
        torch.set_num_threads(threads)
    # for all sides alike
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = workload.recipe.precision.allow_tf32
    if workload.device.type == "cuda":
        torch.cuda.set_device(workload.device)
    try:
        with side.program(workload) as stepper:
            bench = side.bench(stepper, workload)
            for question, arguments in iter(partial(_next, connection), None):
                connection.send(getattr(bench, question)(*arguments))
    except UserError as error:
        connection.send(error)


def _next(connection: Connection) -> tuple[str, tuple[Any, ...]] | None:
    """What is asked next; None at the end."""
    try:
        return connection.recv()
    except EOFError:
        return None
