"""Start the processes of a run: torch's own elastic launcher, with a status that says how the run ended.

    python utils/launch.py [FLAG OF TORCHRUN...] PROGRAM [FLAG OF THE PROGRAM...]

It takes all flags of torchrun and does what torchrun does, and besides

- a signal that asks to stop (SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGQUIT) reaches all processes, which have 60 seconds to
  finish the update, save and end; a Ctrl-C after it kills them at once;
- the exit status is 75 (--preempt_exit_code) after such a signal, 130 after the second Ctrl-C, else that of the process
  that failed first: 2 for a wrong flag, 1 for an error, 128 + n where signal n killed it;
- what a process has told is not told again; of one that was killed there is one line, with host and process id;
- of several machines each finds out by which address the others reach it, and waits until the rendezvous is there.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api as launcher_api

from common import errors
from common.errors import ConfigError, TrainingError, one_line
from common.preemption import INTERRUPTED, SIGNALS
from utils.program import run as run_tool
from wav2vec2.run_config import RunConfig

STOP_SIGNALS = (*SIGNALS, signal.SIGHUP, signal.SIGQUIT)  # of which train.py knows the former
# What processes that are asked to stop have for the update they are in and for its checkpoint.
SECONDS_TO_STOP = 60
SECONDS_AFTER_CLOSING = 40  # within which processes that have met end by themselves
# A machine is lost when it has given no sign of life for interval x attempts = 20 s. The others, whose processes have
# ended meanwhile, meet again, wait `last_call` for more machines, and start: within a minute with the defaults of
# --heartbeat_timeout. `join_timeout` is for machines that start late, and for one that replaces another.
RENDEZVOUS = {
    "keep_alive_interval": "5",
    "keep_alive_max_attempt": "4",
    "last_call_timeout": "15",
    "join_timeout": "600",
}
# A machine that is cut off ends after so many attempts to reach the rendezvous, of 5 to 10 s each.
ATTEMPTS, ATTEMPT_SECONDS = 4, 5.0


class Stop:
    """The signals that ask to stop. The first is an exception, which torch's agent waits for; the others only wait."""

    def __init__(self) -> None:
        self.agent: Agent | None = None
        self._asked = False
        self._handlers: dict[signal.Signals, Any] = dict.fromkeys(STOP_SIGNALS, self._handle)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # started by nohup
            self._handlers[signal.SIGHUP] = signal.SIG_IGN

    def listen(self) -> None:
        """Handle the signals; torch takes some of them for itself whenever it starts processes."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            if number == signal.SIGINT:
                self._end_at_once()
            return
        self._asked = True
        raise SignalException(f"signal {number}", signal.Signals(number))

    def _end_at_once(self) -> None:
        if self.agent:
            self.agent.close(signal.SIGKILL, 5)
        tell("interrupted twice: the processes were killed")
        os._exit(INTERRUPTED)


class Lifeline(threading.Thread):
    """Ends this machine when it has lost the rendezvous, for which torch's store would wait without end."""

    def __init__(self, stop: Stop, host: str, port: int) -> None:
        super().__init__(name="lifeline", daemon=True)
        self._stop_signals, self._host, self._port = stop, host, port

    def run(self) -> None:
        """Count the attempts that failed in a row."""
        failed = 0
        while failed < ATTEMPTS:
            time.sleep(ATTEMPT_SECONDS)
            failed = 0 if _listens(self._host, self._port) else failed + 1
        tell(
            f"{self._host}:{self._port}, where the machines meet, does not answer any more: it is gone, or the network "
            "is cut; this machine ends, and the same command (with --resume) goes on from the newest"
        )
        if self._stop_signals.agent:
            self._stop_signals.agent.close(signal.SIGTERM, SECONDS_TO_STOP // 2)
        os._exit(TrainingError.exit_status)


class Agent(LocalElasticAgent):
    """torch's agent of one machine, which starts the processes, watches them, and starts them again.

    Attributes:
        status: exit status for what ended the processes that ran last; 0 while nothing has.
    """

    def __init__(self, stop: Stop, stopped_status: int, machines: int, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.status = 0
        self._stop, self._stopped_status, self._machines = stop, stopped_status, machines
        self._rounds = 0
        self._closed_at: float | None = None  # when another machine was seen to have ended for good
        stop.agent = self

    def close(self, number: signal.Signals, seconds: int) -> None:
        """Send a signal to the processes and those that they have started, and kill what is left after some seconds."""
        if self._pcontext:
            self._pcontext.close(number, seconds)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch keeps the store of the first round for good: its keys are stale in the next round, and its address is
        # wrong when another machine has become the first (pytorch issue 135712).
        worker_group.spec.rdzv_handler._bootstrap_store_info = None  # type: ignore[attr-defined]
        super()._rendezvous(worker_group)
        self._rounds += 1
        if self._machines > 1:
            first, last = worker_group.workers[0], worker_group.workers[-1]
            together = f"{worker_group.group_world_size} of {self._machines} machines are together"
            tell(f"{together}; processes {first.global_rank} to {last.global_rank} of {first.world_size} run here")

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        self._stop.listen()
        self.status = 0
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            cause = first_cause(result.failures, self._stopped_status)
            for rank, failure in sorted(result.failures.items()):
                # those that the launcher ended need no word: by SIGTERM at once, by SIGKILL if they did not go
                if failure.exitcode < 0 and (
                    rank == cause or failure.exitcode not in (-signal.SIGTERM, -signal.SIGKILL)
                ):
                    tell(f"process {rank} ({_where(failure)}) was killed by {failure.signal_name()}")
            code = result.failures[cause].exitcode
            self.status = code if code >= 0 else 128 - code
            if self.status == self._stopped_status and worker_group.spec.max_restarts:
                self._remaining_restarts += 1  # stopping when asked to is no failure, and none of the restarts
            elif self.status == ConfigError.exit_status and self._rounds == 1:
                self._remaining_restarts = 0  # a wrong flag stays wrong
            if self._remaining_restarts:
                tell(f"starting again; {self._remaining_restarts - 1} restarts are left after this one")
        elif result.state is WorkerState.HEALTHY and self._machines > 1:
            self._end_if_closed(worker_group)
        return result

    def _end_if_closed(self, worker_group: WorkerGroup) -> None:
        """End processes that still wait for those of a machine that has ended for good, e.g. by a wrong flag there.

        A launcher that fails closes the rendezvous. Processes that had met end by themselves, by their watchdogs.
        """
        if not worker_group.spec.rdzv_handler.is_closed():
            return
        self._closed_at = self._closed_at or time.monotonic()
        if time.monotonic() > self._closed_at + SECONDS_AFTER_CLOSING:
            tell("the launcher of another machine has ended with an error, which it tells; this machine ends, too")
            self.close(signal.SIGKILL, 5)
            os._exit(TrainingError.exit_status)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = SECONDS_TO_STOP) -> None:
        # torch's own call before a restart gives no more than 30 seconds
        self._stop.listen()
        self.close(death_sig if death_sig in SIGNALS else signal.SIGTERM, SECONDS_TO_STOP)
        super()._shutdown(death_sig)

    def after_signal(self) -> int:
        """Exit status of a run that was asked to stop: of a process that could not, or the status of stopping."""
        result = self._pcontext.wait(0) if self._pcontext else None
        if self.status or result is None:  # they had ended before
            return self._stopped_status
        status = self._stopped_status
        for local_rank, failure in result.failures.items():
            if failure.exitcode == -signal.SIGKILL:
                rank = self._worker_group.workers[local_rank].global_rank
                tell(f"process {rank} ({_where(failure)}) did not end within {SECONDS_TO_STOP} s and was killed")
            elif failure.exitcode > 0 and failure.exitcode != self._stopped_status:
                status = failure.exitcode
        return status


def tell(message: str) -> None:
    """A line of the launcher's own, beside those of its processes."""
    errors.tell(f"launcher: {message}")


def first_cause(failures: Mapping[int, ProcessFailure], stopped_status: int) -> int:
    """The process (by rank) whose failure made the others end, as far as statuses and whole seconds tell.

    The launcher ends the others when one has failed, and they may fail before that for want of it. So of the failures
    within a second a signal that is not the launcher's is the cause, else an error, else the launcher's, else a stop.
    """
    start = min(failure.timestamp for failure in failures.values())
    weakest = (stopped_status, -signal.SIGTERM)

    def order(rank: int) -> tuple[bool, int, bool]:
        code = failures[rank].exitcode
        return failures[rank].timestamp > start + 1, weakest.index(code) + 1 if code in weakest else 0, code > 0

    return min(sorted(failures), key=order)


def _where(failure: ProcessFailure) -> str:
    return f"host {socket.gethostname()}, pid {failure.pid}"


def launch(argv: Sequence[str]) -> int:
    """Run a program in the processes that torchrun's flags describe; the exit status of the run."""
    args = run.parse_args(list(argv))
    stop = Stop()
    stop.listen()
    if "LOGLEVEL" not in os.environ:  # torch's variable: whoever sets it wants to read its log  # noqa: TID251
        logging.disable(logging.ERROR)
        # of the processes' C++ parts, too: a stack of theirs for a lost connection would bury what the watchdog says
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # noqa: TID251
    if args.log_dir is None and args.redirects == args.tee == "0":
        args.log_dir = os.devnull  # torch would leave an empty folder per run in that of temporary files
    stopped = _stopped_status(args.training_script_args)
    try:
        machines = _machines(args)
        if machines > 1 and args.rdzv_backend == "c10d":
            _meet(args, stop)
        # torch's launcher makes its agent itself, and has no other place to put another one in
        launcher_api.LocalElasticAgent = functools.partial(  # type: ignore[misc, assignment]
            Agent, stop, stopped, machines
        )
        run.run(args)
    except ChildFailedError:
        return stop.agent.status if stop.agent else 1
    except SignalException:
        return stop.agent.after_signal() if stop.agent else stopped
    except (RendezvousError, DistError) as error:
        if stop.agent and stop.agent.status == stopped:
            return stopped  # those that met here were asked to stop, and have gone
        raise TrainingError(
            f"--rdzv_endpoint {args.rdzv_endpoint}: the machines cannot meet: {one_line(error)}; when enough of them "
            "and the one of this address are there, the same command (with --resume) goes on from the newest"
        ) from error
    return 0


def _stopped_status(flags: Sequence[str]) -> int:
    """Exit status of a process that has stopped and saved, from the flags of the program."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preempt_exit_code", "--preempt-exit-code", default=str(RunConfig.preempt_exit_code))
    text = parser.parse_known_args(list(flags))[0].preempt_exit_code
    return int(text) if text.isdecimal() else RunConfig.preempt_exit_code  # the program refuses what is no number


def _machines(args: argparse.Namespace) -> int:
    """The largest number of machines."""
    try:
        return run.parse_min_max_nnodes(args.nnodes)[1]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--nnodes {args.nnodes}: must be a number, or MIN:MAX") from error


def _meet(args: argparse.Namespace, stop: Stop) -> None:
    """Complete the flags of a rendezvous of several machines, and wait until it is there."""
    given = dict(pair.split("=", 1) for pair in args.rdzv_conf.split(",") if "=" in pair)
    settings = {**RENDEZVOUS, **given}
    host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=29400)
    deadline = time.monotonic() + float(settings["join_timeout"])
    here, own = _reached_from(host, port)
    # The first of the first machine's launchers makes the store (torch finds it by name, not by every address); a
    # loopback address is for tests with several launchers, of which torch lets any be the first.
    if not here or not own.startswith("127."):
        settings.setdefault("is_host", str(here and not _listens(host, port)).lower())
    while settings.get("is_host") == "false" and not _listens(host, port):
        if time.monotonic() > deadline:
            raise TrainingError(
                f"--rdzv_endpoint {host}:{port}: nobody answers there after {settings['join_timeout']} s; "
                "check the address, the port, and that the machine of this address has been started"
            )
        time.sleep(0.5)
    args.rdzv_conf = ",".join(f"{key}={value}" for key, value in settings.items())
    # By its own name a machine may not be reached; by the address that it has towards the first it is.
    args.local_addr = args.local_addr or (host if here else own)
    if settings.get("is_host") != "true":
        Lifeline(stop, host, port).start()


def _reached_from(host: str, port: int) -> tuple[bool, str]:
    """Whether an address is this machine's, and the address this machine has towards it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"--rdzv_endpoint {host}:{port}: {error.strerror or error}; check the address") from error
    return own == address[0] or (own.startswith("127.") and str(address[0]).startswith("127.")), own


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ATTEMPT_SECONDS).close()
    except OSError:
        return False
    return True


def main(argv: Sequence[str]) -> None:
    """Start, wait, and leave with the status of the run."""
    status = launch(argv)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_tool(main)
