"""The launcher: signals, statuses, lost processes, and several machines of which some are lost and come back.

Machines are launchers on this one, or network namespaces with a link between them.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import MODEL_FLAGS, corpus
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from common import checkpoint
from utils.launch import first_cause

LAUNCH = [sys.executable, str(ROOT / "utils/launch.py")]
SCRIPT = [sys.executable, "-c"]
TRAINING = (
    *("--device", "cpu", "--num_workers", "0", "--log_frequency", "1", "--validate_frequency", "1000", "--resume"),
    *("--max_tokens", "40000", "--num_negatives", "10", "--mask_length", "3", "--lr", "0.002", "--dropout", "0"),
    *("--attention_dropout", "0", "--save_interval_updates", "5", "--encoder_layerdrop", "0.3"),
)
MILESTONES = [str(update) for update in range(20, 2000, 20)]
# Lost machines are found and made do without within 11 s instead of 35, which another test waits for.
QUICK = ("--rdzv_conf", "keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=5")
ENDLESS = ("--max_update", "100000", "--keep_milestones", *MILESTONES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


class Launched:
    """A launcher with its output in a file; it leads a process group, its processes lead others."""

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        """The processes that it has started, in order of their start."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[1]) == self.process.pid and fields[0] != "Z":
                found.append((int(fields[19]), int(stat.parent.name)))
        return [pid for _, pid in sorted(found)]

    def update(self) -> int:
        """The last update in the log."""
        found = re.findall(r"\| update +(\d+)|update (\d+) \|", self.output)
        return max((int(one or other) for one, other in found), default=0)

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-4000:]}") from None

    def kill(self) -> None:
        """As if the machine were switched off."""
        for pid in [*self.workers(), self.process.pid]:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers, and ends what is left of them."""
    started: list[Launched] = []

    def start(command: list[str], **variables: str) -> Launched:
        started.append(Launched(command, tmp_path / f"log{len(started)}", **variables))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def until(reached: Callable[[], object], *launched: Launched, seconds: float = 90) -> None:
    """Wait for an event; a launcher that ends before it, or a deadline, is a failure."""
    deadline = time.monotonic() + seconds
    while not reached():
        text = "\n".join(one.output[-3000:] for one in launched)
        assert all(one.process.poll() is None for one in launched), f"ended too early:\n{text}"
        assert time.monotonic() < deadline, f"not reached in {seconds} s:\n{text}"
        time.sleep(0.05)


def training(data: Path, output: Path, *flags: str) -> list[str]:
    command = ["pretrain", "--data", str(data), "--output_dir", str(output), *MODEL_FLAGS, *TRAINING, *flags]
    return [str(ROOT / "train.py"), *command]


def on_one_machine(number: int = 2) -> list[str]:
    return [*LAUNCH, "--standalone", "--nproc_per_node", str(number)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def machine(nodes: str, endpoint: str, *flags: str) -> list[str]:
    """One machine of a run, with one process."""
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "test"]
    return [*LAUNCH, "--nnodes", nodes, "--nproc_per_node", "1", "--max_restarts", "5", *rendezvous, *flags]


def weights(output: Path, update: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.update_path(output, update))["model"]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to the rounding of sums over processes, far below what an update changes."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
        except OSError:
            continue
    return found


# ---- One machine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_same_command_finishes(data, tmp_path, launch):
    output = tmp_path / "out"
    run = launch([*on_one_machine(), *training(data, output, *ENDLESS, "--preempt_exit_code", "77")])
    until(lambda: run.update() > 1, run)
    run.process.send_signal(signal.SIGUSR1)
    assert run.wait(60) == 77, run.output[-3000:]
    stopped = re.findall(r"^stopped: SIGUSR1, after update (\d+) of", run.output, re.MULTILINE)
    assert len(stopped) == 1, run.output[-3000:]
    assert "Traceback" not in run.output
    last = int(stopped[0])
    assert checkpoint.update_path(output, last).exists()
    run = launch([*on_one_machine(), *training(data, output, "--max_update", str(last + 3))])
    assert run.wait(90) == 0, run.output[-3000:]
    assert f"resumed {checkpoint.update_path(output, last)}" in run.output
    assert checkpoint.update_path(output, last + 3).exists()


@pytest.mark.slow
def test_a_killed_process_is_named_in_one_line(data, tmp_path, launch):
    run = launch([*on_one_machine(), *training(data, tmp_path / "out", *ENDLESS)])
    until(lambda: run.update() > 1, run)
    workers = run.workers()
    os.kill(workers[1], signal.SIGKILL)
    assert run.wait(60) == 128 + signal.SIGKILL
    told = [line for line in run.output.splitlines() if line.startswith("launcher: ")]
    assert told == [
        f"launcher: process 1 (host {socket.gethostname()}, pid {workers[1]}) was killed by SIGKILL",
    ]
    assert "FAILED" not in run.output  # of torch's table
    assert alive(workers) == []


@pytest.mark.slow
def test_a_killed_process_is_started_again_where_restarts_are_allowed(data, tmp_path, launch):
    output = tmp_path / "out"
    run = launch([*on_one_machine(), "--max_restarts", "1", *training(data, output, "--max_update", "40")])
    until(lambda: list(output.glob("*update*.pt")), run)
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.wait(120) == 0, run.output[-3000:]
    assert "launcher: starting again; 0 restarts are left after this one" in run.output
    assert run.output.count("resumed ") == 1
    assert checkpoint.update_path(output, 40).exists()


@pytest.mark.slow
def test_a_wrong_flag_is_told_once_and_never_tried_again(data, tmp_path, launch):
    run = launch([*on_one_machine(), "--max_restarts", "3", *training(data, tmp_path / "out", "--max_updates", "40")])
    assert run.wait(60) == 2
    assert len(run.output.splitlines()) == 1, run.output
    assert "--max_updates" in run.output


STUBBORN = """
import signal, sys, time
from pathlib import Path
def note(number, frame):
    with Path(sys.argv[1], "asked").open("a") as file:
        file.write(f"{signal.Signals(number).name} ")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
Path(sys.argv[1], "ready").touch()
while True:
    time.sleep(1)
"""


def test_a_second_interrupt_ends_all_at_once_and_nohup_is_respected(tmp_path, launch):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    run = launch(["nohup", *on_one_machine(), str(script), str(tmp_path)])
    until(lambda: (tmp_path / "ready").exists() and len(run.workers()) == 2, run)
    workers = run.workers()
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(signal.SIGINT)
    until(lambda: (tmp_path / "asked").exists() and (tmp_path / "asked").read_text(), run)
    assert set((tmp_path / "asked").read_text().split()) == {"SIGINT"}
    run.process.send_signal(signal.SIGINT)
    assert run.wait(20) == 130
    assert alive(workers) == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; sys.exit(75)", 75),
        ("import os, time; os.abort() if os.environ['RANK'] == '1' else time.sleep(100)", 128 + signal.SIGABRT),
    ],
)
def test_the_status_is_that_of_the_process_that_failed(code, status, launch):
    run = launch([*on_one_machine(), "--no_python", *SCRIPT, code])
    assert run.wait(60) == status, run.output
    assert "Traceback" not in run.output


def test_the_status_does_not_depend_on_whether_the_log_can_be_written():
    code = "import os, time; os.abort() if os.environ['RANK'] == '1' else time.sleep(100)"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([*on_one_machine(), "--no_python", *SCRIPT, code], stderr=full, timeout=60, check=False)
    assert ended.returncode == 128 + signal.SIGABRT


@pytest.mark.parametrize(
    ("endings", "cause"),
    [
        ([(0, 1), (0, -9)], 1),  # killed, and another that lost its peer in the same second
        ([(0, -9), (31, -9)], 0),  # the launcher killed what did not go
        ([(0, -15), (0, 5)], 1),
        ([(0, 75), (1, 5)], 1),
        ([(0, 75), (0, -15)], 0),  # it had saved, and was slow to end
        ([(0, 2), (0, 2)], 0),
        ([(3, 1), (0, 4)], 1),
        ([(0, -15), (0, -11), (0, 1)], 1),
    ],
)
def test_the_cause_is_what_came_first_and_not_what_the_launcher_did(endings, cause):
    failures = {}
    for rank, (second, code) in enumerate(endings):
        failures[rank] = ProcessFailure(rank, 100 + rank, code, error_file="")
        failures[rank].timestamp = second
    assert first_cause(failures, 75) == cause


@pytest.mark.parametrize(
    "arguments", [["--nnodes", "two"], ["--nnodes", "2", "--rdzv_endpoint", "no.such.host.invalid:1"]]
)
def test_flags_that_cannot_be_are_told_in_one_line(arguments, launch):
    run = launch([*LAUNCH, "--rdzv_backend", "c10d", *arguments, "train.py"])
    assert run.wait(60) == 2
    assert len(run.output.splitlines()) == 1, run.output
    assert arguments[-2] in run.output


# ---- Several machines -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lost_machine_is_replaced_and_no_update_is_lost(data, tmp_path, launch):
    output, updates, port = tmp_path / "out", 40, free_port()
    endpoint = f"127.0.0.1:{port}"
    flags = training(data, output, "--max_update", str(updates))
    stays = launch([*machine("2", endpoint, "--local_addr", "127.0.0.2"), *flags])
    until(lambda: listens(port), stays)  # it is the one that has the rendezvous
    goes = launch([*machine("2", endpoint, "--local_addr", "127.0.0.3"), *flags])
    until(lambda: list(output.glob("*update*.pt")), stays, goes)
    goes.kill()
    until(lambda: "starting again" in stays.output, stays)
    # its address sorts before the other's: the processes are numbered anew
    comes = launch([*machine("2", endpoint, "--local_addr", "127.0.0.1"), *flags])
    assert stays.wait(150) == 0, stays.output[-3000:]
    assert comes.wait(30) == 0, comes.output[-3000:]
    resumed = re.findall(r"resumed .*: update (\d+)", comes.output)
    assert len(resumed) == 1
    assert 0 < int(resumed[0]) < updates
    alone = tmp_path / "alone"
    run = launch([sys.executable, *training(data, alone, "--max_update", str(updates), "--update_freq", "2")])
    assert run.wait(90) == 0, run.output
    assert_close(weights(output, updates), weights(alone, updates))


@pytest.mark.slow
def test_a_run_goes_on_without_a_lost_machine_and_with_it_again(data, tmp_path, launch):
    output, port = tmp_path / "out", free_port()
    flags = training(data, output, "--world_batches", "2", *ENDLESS)

    def start(address: str) -> Launched:
        return launch([*machine("1:2", f"127.0.0.1:{port}", "--local_addr", address, *QUICK), *flags])

    stays = start("127.0.0.2")
    until(lambda: listens(port), stays)  # it is the one that has the rendezvous
    goes = start("127.0.0.3")
    until(lambda: list(output.glob("*update*.pt")), stays, goes)
    goes.kill()
    until(lambda: "1 of 2 machines are together" in stays.output, stays)
    until(lambda: stays.output.count("resumed ") == 1, stays)
    comes = start("127.0.0.1")
    until(lambda: comes.update() > 0, stays, comes)
    assert "2 of 2 machines are together; processes 0 to 0 of 2 run here" in comes.output
    mark = (comes.update() // 20 + 1) * 20
    until(lambda: checkpoint.update_path(output, mark).exists(), stays, comes)
    for run in (comes, stays):  # the second one while it waits for others
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75, run.output[-3000:]
    alone = tmp_path / "alone"
    reference = launch([sys.executable, *training(data, alone, "--update_freq", "2", *ENDLESS)])
    until(lambda: checkpoint.update_path(alone, mark).exists(), reference, seconds=150)
    assert_close(weights(output, mark), weights(alone, mark))


IMPATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from utils import launch
launch.SECONDS_AFTER_CLOSING = 1.0
launch.main(sys.argv[1:])
"""


def test_a_machine_does_not_wait_for_one_that_has_ended_for_good(launch, tmp_path):
    """Its program would wait for ever for the other's, which was refused before they met."""
    port, mark = free_port(), tmp_path / "waits"
    flags = [*machine("2", f"127.0.0.1:{port}", "--no_python")[len(LAUNCH) :], "bash", "-c"]
    one = launch([*SCRIPT, IMPATIENT, *flags, f"touch {mark} && exec sleep 1000"])
    until(lambda: listens(port), one)  # it is the one that has the rendezvous
    other = launch([*LAUNCH, *flags, f"until [ -e {mark} ]; do sleep 0.1; done; exit 2"])
    assert other.wait(60) == 2, other.output
    assert one.wait(60) == 1, one.output
    assert "the launcher of another machine has ended with an error, which it tells" in one.output
    assert "Traceback" not in one.output


def may_make_namespaces() -> bool:
    """Whether links between network namespaces may be made here."""
    try:
        made = subprocess.run(
            ["unshare", "-n", "ip", "link", "add", "name", "wire0", "type", "veth", "peer", "name", "wire1"],
            check=False,
        )
    except OSError:
        return False
    return made.returncode == 0


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.231.7.1 and 10.231.7.2 on a link named `wire`."""
    if not may_make_namespaces():
        pytest.skip("network namespaces are not permitted here")
    names = tuple(f"wav2vec2-{os.getpid()}-{side}" for side in "ab")

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"-n {names[0]} link add name wire type veth peer name wire netns {names[1]}")
        for number, name in enumerate(names, start=1):
            ip(f"-n {name} addr add 10.231.7.{number}/24 dev wire")
            ip(f"-n {name} link set wire up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_cut_link_ends_one_side_and_the_other_goes_on(data, tmp_path, launch, namespaces):
    """The side that has the rendezvous goes on alone."""
    output = tmp_path / "out"
    flags = training(data, output, "--update_freq", "2", *ENDLESS)
    near, far = (
        launch(
            ["ip", "netns", "exec", name, *machine("1:2", "10.231.7.1:29500", *QUICK), *flags],
            GLOO_SOCKET_IFNAME="wire",
        )
        for name in namespaces
    )
    until(lambda: list(output.glob("*update*.pt")), near, far)
    subprocess.run(["ip", "-n", namespaces[0], "link", "set", "wire", "down"], check=True)
    cut = time.monotonic()
    assert far.wait(90) == 1, far.output[-3000:]
    assert "launcher: 10.231.7.1:29500, where the machines meet, does not answer" in far.output
    until(lambda: "resumed " in near.output, near, seconds=cut + 90 - time.monotonic())
    near.process.send_signal(signal.SIGTERM)
    assert near.wait(60) == 75, near.output[-3000:]
