"""No run hangs: every process tells where it stands, and all end when one is gone, stuck or has failed.

Two threads per process. One brings this process's standing to the store of the process group and fetches the others'.
The other one judges. It never touches the network, so a cut link cannot silence it; and it counts its own ticks instead
of time, so a process that was suspended does not take that for the silence of others.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from common import distributed
from common.errors import Stopped, TrainingError, UserError, one_line, tell
from common.memory import is_allocation_failure

log = logging.getLogger(__name__)

TICK = 1.0  # seconds
FAILED = 1  # exit status
_SHOWN_IDS = 4
# What errors of torch (2.11 to 2.13) say when another process cannot be reached.
_OUT_OF_TOUCH = ("gloo", "NCCL", "Connection", "Broken pipe", "recvValue", "sendBytes", "Timed out", "timed out")


@dataclass(frozen=True)
class Standing:
    """Where a process is."""

    rank: int
    machine: str
    pid: int
    phase: str = "starting"
    update: int = 0
    ids: tuple[str, ...] = ()  # utterances
    beat: int = 0  # grows as long as the process lives
    ended: bool = False  # in order
    failure: str = ""  # why it ends
    at_fault: bool = False  # and not because another process has failed
    tells: bool = True  # its message itself
    asked: bool = False  # to stop

    @property
    def process(self) -> str:
        """Which process."""
        return f"process {self.rank} (host {self.machine.split()[0]}, pid {self.pid})"

    @property
    def place(self) -> str:
        """What it does."""
        text = f"{self.phase}, update {self.update}"
        if not self.ids:
            return text
        more = f" and {len(self.ids) - _SHOWN_IDS} more" if len(self.ids) > _SHOWN_IDS else ""
        return f"{text}, utterances {', '.join(self.ids[:_SHOWN_IDS])}{more}"

    def is_gone(self, machine: str) -> bool:
        """Whether it is on this machine, and no longer there."""
        return self.machine == machine and not _is_running(self.pid)


@dataclass
class _Peer:
    """What is known of another process."""

    standing: Standing
    silent: int = 0  # ticks since its last beat


class Watchdog:
    """Watches all processes of a run while it is entered; an error that ends this one gets its place."""

    def __init__(self, *, heartbeat_timeout: float = 20.0, hang_timeout: float = 0.0) -> None:
        """Seconds of silence of another process, and seconds in one place (0: any), until the run ends."""
        self.before_end: Callable[[], None] = lambda: None  # what must not be cut off
        self.is_asked: Callable[[], bool] = lambda: False  # whether this process has been asked to stop
        self._heartbeat_timeout, self._hang_timeout = heartbeat_timeout, hang_timeout
        self._rank, self._machine = distributed.rank(), distributed.machine()
        self._has_peers = distributed.world_size() > 1
        self._peers: dict[int, _Peer] = {}
        self._name = ""
        self._place: tuple[str, int, tuple[str, ...]] = ("starting", 0, ())
        self._failure, self._ended, self._at_fault, self._beat = "", False, False, 0
        self._tells = True
        self._ticks_in_place = self._ticks_without_store = 0
        self._closing, self._handled = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        work = [self._judge] if self._hang_timeout or self._has_peers else []
        if self._has_peers:
            work.append(self._exchange)
            self._name = distributed.broadcast_object(uuid.uuid4().hex)  # a store may outlive the processes before
        self._threads = [threading.Thread(target=part, name=f"watchdog {part.__name__}", daemon=True) for part in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how this process ends; raise what a user can understand."""
        self._handled.set()
        told, verdict = None if isinstance(error, Stopped) else error, ""
        if error is not None and is_allocation_failure(error):
            told = TrainingError(
                f"out of memory: {one_line(error, 120)}; halve --num_concat_batches (NUM_CONCAT_BATCHES) and double "
                "--update_freq, or add --checkpoint_activations"
            )
            told.where = f"{self._own().process}: {self._own().place}"
            told.by_all = False
        elif self._has_peers and isinstance(error, RuntimeError) and _is_out_of_touch(error):
            verdict = self._wait_for_verdict()
        self._ended, self._at_fault = told is None, not verdict
        self._failure = "" if told is None else one_line(verdict or told) or type(told).__name__
        self._tells = not (isinstance(told, UserError) and told.by_all and distributed.local_rank())
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * TICK)  # the last news; a thread that waits for a lost store is left behind
        if verdict:
            self._report(verdict)
            raise SystemExit(FAILED) from None
        if self._has_peers and isinstance(told, UserError):
            told.where = f"{self._own().process}: {self._own().place}"
        elif self._has_peers and told is not None:
            tell(f"error: {self._own().process}: {self._own().place}:")
        if told is not None and told is not error:
            raise told from error

    def at(self, phase: str, update: int | None = None, ids: Sequence[str] = ()) -> None:
        """Note where this process stands; costs nothing."""
        self._place = phase, self._place[1] if update is None else update, tuple(ids)
        self._ticks_in_place = 0

    def _own(self) -> Standing:
        identity = self._rank, self._machine, os.getpid()
        return Standing(
            *(*identity, *self._place, self._beat, self._ended, self._failure, self._at_fault),
            tells=self._tells,
            asked=self.is_asked(),
        )

    @property
    def others_are_asked(self) -> bool:
        """Whether another process has been asked to stop."""
        return any(peer.standing.asked for peer in list(self._peers.values()))

    # ---- The thread that speaks -------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        try:
            store = distributed.open_store(f"watchdog/{self._name}", timedelta(seconds=self._heartbeat_timeout))
            others = [rank for rank in range(distributed.world_size()) if rank != self._rank]
            met: list[int] = []
            while True:
                last = self._closing.is_set()
                self._beat += 1
                store.set(str(self._rank), json.dumps(asdict(self._own())))
                met += [rank for rank in others if rank not in met and store.check([str(rank)])]
                for rank, text in zip(met, store.multi_get([str(rank) for rank in met]) if met else [], strict=True):
                    self._hear(rank, text)
                self._ticks_without_store = 0
                if last:
                    return
                self._closing.wait(TICK)
        except RuntimeError as error:  # of the store; the judge will notice the silence
            log.debug("the store of the process group: %s", error)

    def _hear(self, rank: int, text: bytes) -> None:
        values = json.loads(text)
        standing = Standing(**{**values, "ids": tuple(values["ids"])})
        peer = self._peers.get(rank)
        if peer is None or peer.standing.beat != standing.beat:
            self._peers[rank] = _Peer(standing)

    # ---- The thread that judges -------------------------------------------------------------------------------------

    def _judge(self) -> None:
        suspected = False
        while not self._closing.wait(TICK):
            self._ticks_in_place += 1
            self._ticks_without_store += 1
            for peer in list(self._peers.values()):
                peer.silent += 1
            if self._handled.is_set():
                continue
            verdict = self._verdict() if self._has_peers else ""
            stuck = bool(self._hang_timeout) and self._ticks_in_place * TICK >= self._hang_timeout
            if stuck or (verdict and suspected):
                self._end(verdict)
            suspected = bool(verdict)  # a tick later the last words of that process are there

    def _silence(self, peer: _Peer) -> float:
        """Seconds without a sign of a process; without the store nobody is heard, which is not their fault."""
        return (peer.silent - self._ticks_without_store) * TICK

    def _verdict(self) -> str:
        """Why the run cannot go on, as far as the other processes are concerned; empty while it can."""
        peers = [peer for peer in list(self._peers.values()) if not peer.standing.ended]
        for peer in sorted(peers, key=lambda peer: not peer.standing.at_fault):
            if peer.standing.failure:
                return f"{peer.standing.process} failed ({peer.standing.place}): {peer.standing.failure}"
        for peer in peers:
            seconds, last = self._silence(peer), f"it was last seen in: {peer.standing.place}"
            if peer.standing.is_gone(self._machine):
                return f"{peer.standing.process} was killed; {last}"
            if seconds >= self._heartbeat_timeout:
                return (
                    f"{peer.standing.process} has shown no sign of life for {seconds:.0f} s (--heartbeat_timeout): "
                    f"killed, frozen or cut off; {last}"
                )
        seconds = self._ticks_without_store * TICK
        if seconds >= self._heartbeat_timeout:
            return (
                f"host {distributed.store_host()}, where the processes meet, has not answered for {seconds:.0f} s: "
                "it is gone, or the network is cut"
            )
        return ""

    def _wait_for_verdict(self) -> str:
        """What ended the connection to another process; empty if all of them live on."""
        deadline = time.monotonic() + self._heartbeat_timeout + 5 * TICK
        while not self._verdict():
            if time.monotonic() >= deadline:
                return ""
            time.sleep(TICK / 4)
        time.sleep(TICK)  # then the last words of that process are there
        return self._verdict()

    def _end(self, verdict: str) -> None:
        """End this process, whose main thread may be waiting for ever."""
        self._handled.set()
        self._failure = verdict or "no progress"
        self._report(
            verdict
            or f"no progress for {self._ticks_in_place * TICK:.0f} s (--hang_timeout); raise it if that is right"
        )
        if not verdict:
            faulthandler.dump_traceback(sys.stderr)
        time.sleep(2 * TICK)  # one that failed by itself has its own words, and its own exit status
        self._kill_frozen()
        self.before_end()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(FAILED)

    def _kill_frozen(self) -> None:
        """End the silent processes of this machine: a stopped one does not hear the launcher's SIGTERM."""
        for peer in list(self._peers.values()):
            standing = peer.standing
            frozen = self._silence(peer) >= self._heartbeat_timeout and not standing.ended
            if frozen and standing.machine == self._machine and not standing.is_gone(self._machine):
                with suppress(OSError):  # another one was quicker
                    os.kill(standing.pid, signal.SIGKILL)

    def _report(self, verdict: str) -> None:
        """Say why the run ends and where all processes stand: one process of every machine does."""
        peers = [peer.standing for peer in list(self._peers.values())]
        here = [one for one in peers if one.machine == self._machine]
        if any(one.failure and one.at_fault and one.tells for one in here):
            return  # it tells itself
        silent = {rank for rank, peer in self._peers.items() if self._silence(peer) > self._heartbeat_timeout / 2}
        able = [one.rank for one in here if one.rank not in silent and not one.is_gone(self._machine)]
        if any(rank < self._rank for rank in able):
            return
        lines = [f"error: {verdict}", "where the processes stand:"]
        standings = sorted([self._own(), *peers], key=lambda one: one.rank)
        lines += [f"  {one.process}: {one.place}" for one in standings]
        lines.append("all of them end; the same command (with --resume) goes on from the last checkpoint")
        tell("\n".join(lines))


def _is_out_of_touch(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached."""
    return any(sign in str(error) for sign in _OUT_OF_TOUCH)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine lives; one that has ended and whose parent has not asked yet does not."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or no such file system
        return True
    return status.rpartition(")")[2].split()[0] != "Z"
