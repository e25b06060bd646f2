"""What the doctor says about machines that are described to it, and that its steps and processes really run."""

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils import device_checks, doctor, machine_checks, program
from utils.findings import Finding, as_json, table
from utils.machine_checks import GIB, MIB, Probes

ROOT = Path(doctor.__file__).resolve().parent.parent
FILES = {
    "/proc/cpuinfo": "".join(
        f"processor : {n}\nmodel name\t: Fast CPU\nflags\t\t: fpu avx512_bf16\n" for n in range(8)
    ),
    "/proc/meminfo": "MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   16777216 kB\n",
    "/proc/self/cgroup": "0::/job/step\n",
    str(ROOT / "requirements.txt"): "torch\nnumpy\nsoundfile\nmatplotlib\n",
    str(ROOT / "constraints.txt"): 'torch==2.13.0\nnumpy==2.4.6; python_version >= "3.1"\nsoundfile==0.14.0\n',
}
VERSIONS = {"torch": "2.13.0+cu130", "numpy": "2.4.6", "soundfile": "0.14.0", "matplotlib": "3.11.2"}


def machine(files=(), versions=VERSIONS, **changes):
    """Probes of a machine on which all is well, but for what is given."""
    texts = {**FILES, **dict(files)}
    probes = Probes(
        version=versions.get,
        text=lambda path: texts.get(path, ""),
        space=lambda path: (100 * GIB, 200 * GIB),
        bind=lambda port: port or 4711,
        resolve=lambda name: "127.0.0.1",
        hostname=lambda: "node7",
        locks=lambda folder: True,
        cores=lambda: 8,
    )
    return replace(probes, **changes)


def look(check, *arguments, name=None):
    """Findings by status; with a name the one of that name."""
    findings = list(check(*arguments))
    if name is None:
        return {(finding.name, finding.status) for finding in findings}
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def refuse(number):
    def raising(*_):
        raise OSError(number, os.strerror(number))

    return raising


def test_a_healthy_machine_has_no_warning():
    probes = machine()
    checks = [
        *machine_checks.python_version((3, 12, 1)),
        *machine_checks.packages(probes),
        *machine_checks.processor(probes),
        *machine_checks.memory(probes),
        *machine_checks.shared_memory(probes),
        *machine_checks.disk(probes, Path.cwd()),
        *machine_checks.network(probes),
    ]
    assert {finding.status for finding in checks} == {"ok"}
    assert all(not finding.remedy for finding in checks)


def test_missing_packages_are_named_with_what_they_are_for_and_how_to_get_them():
    probes = machine(versions={"torch": "2.13.0", "numpy": "2.4.6"})
    assert look(machine_checks.packages, probes) >= {("soundfile", "problem"), ("matplotlib", "warning")}
    finding = look(machine_checks.packages, probes, name="soundfile")
    assert "audio" in finding.text
    assert "pip install" in finding.remedy
    assert "soundfile" in finding.remedy
    assert look(machine_checks.packages, probes, name="webdataset").status == "ok"


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.13.0", "ok"), ("2.11.0a0+nv26", "ok"), ("2.10.1", "problem"), ("1.13.1", "problem"), ("3.0.0", "warning")],
)
def test_versions_of_torch(version, status):
    probes = machine(versions={**VERSIONS, "torch": version})
    assert look(machine_checks.packages, probes, name="torch").status == status


def test_every_requirement_has_a_purpose_and_an_optional_package_is_no_requirement():
    names = set(machine_checks.requirement_names((ROOT / "requirements.txt").read_text()))
    assert names == set(machine_checks.PURPOSES)
    assert not names & set(machine_checks.OPTIONAL)
    for python in ((3, 10), (3, 12)):
        pins = machine_checks.pinned_versions((ROOT / "constraints.txt").read_text(), python)
        assert names <= set(pins)
        assert pins["numpy"].startswith("2.2." if python < (3, 11) else "2.4.")


def test_old_python():
    assert look(machine_checks.python_version, (3, 9, 18)) == {("python", "problem")}


@pytest.mark.parametrize(
    ("files", "quota", "left"),
    [
        ({}, None, None),
        ({"/sys/fs/cgroup/job/step/cpu.max": "max 100000"}, None, None),
        ({"/sys/fs/cgroup/job/step/cpu.max": "400000 100000", "/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5, None),
        (
            {
                "/sys/fs/cgroup/job/memory.max": str(9 * GIB),
                "/sys/fs/cgroup/job/memory.current": str(8 * GIB),
                "/sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 0\n",
                "/sys/fs/cgroup/memory.max": "max",
            },
            None,
            2 * GIB,
        ),
        (
            {
                "/proc/self/cgroup": "4:cpu,cpuacct:/docker/a\n3:memory:/docker/a\n",
                "/sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": "50000",
                "/sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": "20000",
                "/sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": str(GIB),
                "/sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": str(GIB // 2),
            },
            2.5,
            GIB // 2,
        ),
        (
            {
                "/proc/self/cgroup": "4:cpu,cpuacct:/\n3:memory:/\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            },
            None,
            None,
        ),
    ],
)
def test_limits_of_both_kinds_of_groups(files, quota, left):
    probes = machine(files)
    cores = look(machine_checks.processor, probes, name="cores")
    assert cores.status == ("ok" if quota is None else "warning")
    assert quota is None or f"OMP_NUM_THREADS={int(quota)}" in cores.remedy
    assert cores.values["quota"] == quota
    memory = look(machine_checks.memory, probes, name="available")
    assert memory.values["group_left_bytes"] == left
    assert memory.status == {None: "ok", 2 * GIB: "warning", GIB // 2: "problem"}[left]


@pytest.mark.parametrize(("free", "status"), [(64 * MIB, "problem"), (512 * MIB, "warning"), (8 * GIB, "ok")])
def test_shared_memory(free, status):
    finding = look(machine_checks.shared_memory, machine(space=lambda path: (free, free)), name="/dev/shm")
    assert finding.status == status
    assert ("--ipc=host" in finding.remedy) == (status != "ok")
    assert look(machine_checks.shared_memory, machine(space=refuse(errno.ENOENT))) == {("/dev/shm", "problem")}


def test_disk(tmp_path):
    tight = machine(space=lambda path: (GIB // 2, 10 * GIB))
    assert look(machine_checks.disk, tight, tmp_path / "not" / "yet", name="space").status == "problem"
    assert not (tmp_path / "not").exists()
    cases = [(lambda folder: False, "lock", "warning"), (refuse(errno.ENOLCK), "lock", "warning")]
    cases += [(refuse(number), "writing", "problem") for number in (errno.EACCES, errno.EROFS, errno.ENOSPC)]
    for locks, name, status in cases:
        finding = look(machine_checks.disk, machine(locks=locks), tmp_path, name=name)
        assert (finding.status, bool(finding.remedy)) == (status, True)
    (tmp_path / "file").touch()
    assert look(machine_checks.disk, machine(), tmp_path / "file") == {("folder", "problem")}


def test_a_real_lock_excludes_another_process_and_leaves_nothing(tmp_path):
    assert machine_checks.lock_excludes(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_excludes_nobody_is_found(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)  # as on a file system that only pretends
    assert not machine_checks.lock_excludes(tmp_path)


def test_ports_and_names():
    assert look(machine_checks.network, machine(bind=refuse(errno.EPERM))) >= {("free port", "problem")}

    def taken(port):
        if port:
            refuse(errno.EADDRINUSE)()
        return 1

    finding = look(machine_checks.network, machine(bind=taken), name="port 29500")
    assert finding.status == "warning"
    assert "MASTER_PORT" in finding.remedy

    def resolve(known):
        return lambda name: "127.0.0.1" if name == known else refuse(errno.ENOENT)()

    def statuses(known):
        return [f.status for f in machine_checks.network(machine(resolve=resolve(known))) if f.name == "name"]

    assert statuses("node7") == ["problem", "ok"]
    assert statuses("localhost") == ["ok", "warning"]


def test_a_port_that_is_listened_on_is_taken():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(1)
        with pytest.raises(OSError, match="in use"):
            machine_checks.bind_port(listener.getsockname()[1])
    assert machine_checks.bind_port(0) > 0


@pytest.mark.parametrize(
    ("number", "cores", "quota", "status"),
    [(8, 8, None, "ok"), (1, 8, None, "ok"), (9, 8, None, "warning"), (8, 8, 3.5, "warning"), (1, 8, 0.5, "ok")],
)
def test_threads_against_cores(number, cores, quota, status):
    finding = device_checks.threads(number, "", cores, quota)
    assert finding.status == status
    assert ("OMP_NUM_THREADS=" in finding.remedy) == (status == "warning")


def test_threads_are_those_of_the_environment():
    command = [sys.executable, device_checks.__file__, "devices"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    found = doctor.read_child(done.stdout, "").findings
    (threads,) = [finding for finding in found if finding.name == "threads"]
    assert (threads.values["omp_num_threads"], threads.values["torch_threads"]) == ("1", 1)


def test_formats():
    assert "bf16" in device_checks.cpu_formats(machine()).text.split(";")[0]
    assert "fp16" in device_checks.cpu_formats(machine()).text.split(";")[1]
    best = {(9, 0): "--bf16", (8, 0): "--bf16", (7, 0): "--fp16", (7, 5): "--fp16"}
    for capability, flag in best.items():
        assert f"{flag} is the best" in device_checks.gpu_formats("cuda:0", capability).text
    assert device_checks.gpu_formats("cuda:0", (6, 1)).status == "warning"


def test_a_driver_without_a_torch_for_it_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    version = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08  Sat May"}
    assert look(device_checks.gpus, machine()) == {("cuda", "ok")}
    for build, word in ((None, "without CUDA"), ("13.0", "finds no device")):
        monkeypatch.setattr(torch.version, "cuda", build)
        finding = look(device_checks.gpus, machine(version), name="cuda")
        assert finding.status == "problem"
        assert word in finding.text
        assert "575.57.08" in finding.text


def test_gpus_are_told_with_their_memory(monkeypatch):
    """A described machine with two GPUs, one of which another program has filled."""
    devices = [SimpleNamespace(name=f"GPU {n}", major=9 - 2 * n, minor=0) for n in range(2)]
    free = [70 * GIB, 3 * GIB]
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": devices.__getitem__,
        "mem_get_info": lambda index: (free[index], 80 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = [(f.section, f.name, f.status) for f in device_checks.gpus(machine())]
    assert found == [
        ("gpu", "cuda", "ok"),
        ("gpu", "cuda:0", "ok"),
        ("formats", "cuda:0", "ok"),
        ("gpu", "cuda:1", "warning"),
        ("formats", "cuda:1", "ok"),
    ]


def test_every_gpu_gets_its_steps_and_two_meet(monkeypatch):
    """Which processes are started, by the devices that were found; here none is."""
    asked = []

    class Silent:
        def __init__(self, *arguments):
            asked.append(arguments)

        def result(self, deadline):
            gpus = [Finding("gpu", f"cuda:{n}", "ok", "") for n in range(2)]
            return doctor.Child(gpus if asked[-1] == ("devices",) else [], "start", "")

    monkeypatch.setattr(doctor, "ChildProcess", Silent)
    list(doctor.examine(Path.cwd(), steps=True, probes=machine()))
    meetings = [("meet", backend, str(rank), "4711") for backend in ("gloo", "nccl") for rank in range(2)]
    assert asked == [("devices",), ("steps", "cpu"), ("steps", "cuda:0"), ("steps", "cuda:1"), *meetings]
    asked.clear()
    list(doctor.examine(Path.cwd(), steps=False, probes=machine()))
    assert asked == [("devices",)]


def test_steps_run_in_every_mode_and_precision_and_agree():
    findings = list(device_checks.steps(torch.device("cpu")))
    assert {finding.status for finding in findings} == {"ok"}
    assert len(findings) == len(device_checks.MODES) * len(device_checks.PRECISIONS)
    for mode in device_checks.MODES:
        losses = [finding.values["loss_bits"] for finding in findings if finding.values["mode"] == mode]
        assert losses == pytest.approx([losses[0]] * 5, rel=0.02)
        assert len(set(losses)) > 3  # another number format is another number


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (RuntimeError("no kernel image\nis available"), "no kernel image is available"),
        ((math.nan, 0.1, 0), "the loss is nan"),
        ((12.0, 0.1, 0), "in fp32 9.00"),
    ],
)
def test_a_step_that_fails_is_a_line(monkeypatch, outcome, words):
    def train(*_):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(device_checks, "train", train)
    finding = device_checks.step(torch.device("cpu"), "pretrain", "bf16 O2", right=9.0)
    assert finding.status == "problem"
    assert words in finding.text
    assert "\n" not in finding.text
    assert "precision" in finding.remedy


def test_an_fp16_step_that_always_overflows_is_a_line(monkeypatch):
    import train

    monkeypatch.setattr(train, "train_step", lambda run, batches, step: False)
    finding = device_checks.step(torch.device("cpu"), "pretrain", "fp16 O2")
    assert finding.status == "problem"
    assert "overflow" in finding.text


def test_two_processes_meet():
    (finding,) = doctor.try_meetings(0, Probes())
    assert (finding.name, finding.status) == ("gloo", "ok")


def test_processes_that_do_not_meet_are_one_line(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('connection refused')\n")
    monkeypatch.setattr(doctor, "CHECKS", broken)
    findings = list(doctor.try_meetings(2, machine()))
    assert [(f.name, f.status) for f in findings] == [("gloo", "problem"), ("nccl", "problem")]
    assert all("connection refused" in f.text and "\n" not in f.text for f in findings)


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", f"signal {int(signal.SIGSEGV)}"),
        ("raise ImportError('libcudart.so.13: cannot open')", "libcudart.so.13"),
        ("sys.exit(7)", "status 7"),
        ("time.sleep(600)", "no answer"),
    ],
)
def test_a_process_that_dies_tells_where_and_keeps_what_it_found(monkeypatch, tmp_path, ending, words):
    finding = json.dumps({"section": "step", "name": "cpu fp32", "status": "ok", "text": "pretrain"})
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"print({finding!r}, flush=True)\n"
        "print('words of a library {\"trying\": ', flush=True)\n"
        'print(\'{"trying": "pretrain bf16 O2"}\', flush=True)\n'
        f"{ending}\n"
    )
    monkeypatch.setattr(doctor, "CHECKS", script)
    monkeypatch.setattr(doctor, "DEADLINE", 5)
    good, bad = doctor.try_steps("cpu")
    assert good == Finding("step", "cpu fp32", "ok", "pretrain")
    assert bad.status == "problem"
    assert "pretrain bf16 O2" in bad.text
    assert words in bad.text


def test_without_torch_the_rest_is_told_all_the_same():
    probes = machine(versions={"numpy": "2.4.6"})
    findings = list(doctor.examine(Path.cwd(), steps=True, probes=probes))
    assert {f.section for f in findings} == {"packages", "cpu", "memory", "disk", "network", "gpu"}
    (gpu,) = [f for f in findings if f.section == "gpu"]
    assert gpu.status == "problem"
    assert "torch" in gpu.text


def test_a_bare_python_gets_a_table_and_not_a_traceback(tmp_path):
    """-S: no package of the environment can be imported, not even tqdm."""
    command = [sys.executable, "-S", str(ROOT / "utils" / "doctor.py"), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "problem  packages  torch " in done.stdout
    assert "bash scripts/setup_env.sh" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["problems"] >= 5


def test_program_prints_one_line_per_finding_and_writes_the_schema(tmp_path, capsys):
    out = tmp_path / "out.json"
    status = 0
    try:
        doctor.main(["--no_steps", "--output_dir", str(tmp_path), "--json", str(out)])
    except SystemExit as end:
        status = end.code
    written = json.loads(out.read_text())
    assert set(written) == {"schema", "problems", "warnings", "findings"}
    assert written["schema"] == 1
    for finding in written["findings"]:
        assert set(finding) == {"section", "name", "status", "text", "remedy", "values"}
        assert finding["status"] in ("ok", "warning", "problem")
        assert finding["status"] == "ok" or finding["remedy"]
    statuses = [finding["status"] for finding in written["findings"]]
    assert written["problems"] == statuses.count("problem")
    assert status == (1 if written["problems"] else 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(written["findings"]) + 1
    assert {"cuda", "threads"} <= {finding["name"] for finding in written["findings"]}


def test_exit_status_follows_problems_and_not_warnings(monkeypatch, capsys):
    finding = Finding("disk", "space", "warning", "little", "make room")
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: iter([finding]))
    doctor.main([])
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: iter([replace(finding, status="problem")]))
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    assert end.value.code == 1
    assert "little; make room" in capsys.readouterr().out


def test_table_is_aligned():
    rows = list(table([Finding("a", "long name", "ok", "X"), Finding("longer", "b", "problem", "X", "do it")]))
    assert [row.index("X") for row in rows] == [rows[0].index("X")] * 2
    assert rows[1].endswith("X; do it")
    assert list(table([])) == []
    assert as_json([])["problems"] == 0


def test_bars_need_tqdm_only_when_there_is_one():
    code = "import sys; sys.modules['tqdm'] = None; from utils import program; program.Parser('x').parse([])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert list(program.bar([1, 2])) == [1, 2]
