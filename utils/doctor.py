"""Looks whether this machine can train: packages, devices, precision, threads, memory, disk, ports, and tiny steps.

    python utils/doctor.py [--output_dir DIR] [--no_steps] [--json OUT]

One line per finding: ok, warning or problem, what was found, and what to do. The exit status is 0 without a problem,
1 with one, 2 for wrong usage. Nothing is installed or changed. It takes half a minute; missing packages, torch
included, are findings like others.

The JSON file is one object: `schema` (1), `problems` and `warnings` (their numbers), and `findings`, a list of
{section, name, status, text, remedy, values}; `values` holds the figures behind the text, and is empty for most.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import one_line
from utils import machine_checks, program
from utils.findings import Finding, as_json, count, table

CHECKS = Path(__file__).resolve().parent / "device_checks.py"
DEADLINE = 300  # seconds; on a slow network disk the import of torch alone takes a minute
MEETING_DEADLINE = 120
REINSTALL = "install the tested versions: bash scripts/setup_env.sh"
MEETING = {
    "gloo": "check that the host's name resolves (/etc/hosts), or set GLOO_SOCKET_IFNAME=lo on a single machine",
    "nccl": "run again with NCCL_DEBUG=INFO; in a container --ipc=host, on some boards NCCL_P2P_DISABLE=1",
}


@dataclass(frozen=True)
class Child:
    """What a process of device_checks.py told before it ended.

    trying: what it was at; failure: why it did not end well, in one line, or nothing.
    """

    findings: list[Finding]
    trying: str
    failure: str


class ChildProcess:
    """A process of device_checks.py."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, str(CHECKS), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def result(self, deadline: float) -> Child:
        """Wait for its end; after `deadline` seconds it is killed."""
        failure = ""
        try:
            out, errors = self._process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, errors = self._process.communicate()
            failure = f"no answer within {deadline:g} s"
        status = self._process.returncode
        if status and not failure:
            last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
            failure = f"ended by signal {-status}" if status < 0 else one_line(last) or f"ended with status {status}"
        return read_child(out, failure)


def read_child(out: str, failure: str) -> Child:
    """The lines that a process of device_checks.py printed; what others print among them is left out."""
    findings, trying = [], "start"
    for line in out.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a library's own words, or a line that was cut off
        if isinstance(entry, dict) and "trying" in entry:
            trying = entry["trying"]
        elif isinstance(entry, dict) and "status" in entry:
            findings.append(Finding(**entry))
    return Child(findings, trying, failure)


def examine(output_dir: Path, *, steps: bool, probes: machine_checks.Probes | None = None) -> Iterator[Finding]:
    """All findings, in the order of the table."""
    probes = probes or machine_checks.Probes()
    yield from machine_checks.python_version()
    packages = list(machine_checks.packages(probes))
    yield from packages
    yield from machine_checks.processor(probes)
    yield from machine_checks.memory(probes)
    yield from machine_checks.shared_memory(probes)
    yield from machine_checks.disk(probes, output_dir)
    yield from machine_checks.network(probes)
    missing = sorted({"torch", "numpy"} - machine_checks.installed(packages))
    if missing:
        told = f"devices and steps are not looked at without {' and '.join(missing)}"
        yield Finding("gpu", "devices", "problem", told, "install what is missing first: bash scripts/setup_env.sh")
        return
    child = ChildProcess("devices").result(DEADLINE)
    yield from child.findings
    if child.failure:
        yield Finding("gpu", "devices", "problem", child.failure, REINSTALL)
        return
    gpus = [finding.name for finding in child.findings if finding.section == "gpu" and finding.name.startswith("cuda:")]
    if steps:
        for device in ("cpu", *gpus):
            yield from try_steps(device)
        yield from try_meetings(len(gpus), probes)


def try_steps(device: str) -> Iterator[Finding]:
    """One step of every kind on this device."""
    child = ChildProcess("steps", device).result(DEADLINE)
    yield from child.findings
    if child.failure:
        told = f"{child.trying}: {child.failure}; what comes after it was not tried"
        yield Finding("step", device, "problem", told, REINSTALL)


def try_meetings(num_gpus: int, probes: machine_checks.Probes) -> Iterator[Finding]:
    """Two processes that add a number up, on the CPU and on two GPUs."""
    for backend in ("gloo", "nccl") if num_gpus > 1 else ("gloo",):
        try:
            port = probes.bind(0)
        except OSError:
            continue  # told already
        children = [ChildProcess("meet", backend, str(rank), str(port)) for rank in range(2)]
        results = [child.result(MEETING_DEADLINE) for child in children]
        failures = [result.failure for result in results if result.failure]
        if failures:
            told = f"two processes do not meet: {failures[0]}"
            yield Finding("processes", backend, "problem", told, MEETING[backend])
        else:
            yield from results[0].findings


def main(argv: Sequence[str] | None = None) -> None:
    """Print the findings; exit status 1 where one is a problem."""
    parser = program.Parser((__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--output_dir", metavar="DIR", type=Path, default=Path(), help="where a run would write")
    parser.add_argument("--no_steps", action="store_true", help="leave out training steps and processes that meet")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the findings to this file, too")
    args = parser.parse(None if argv is None else list(argv))
    findings = list(examine(args.output_dir, steps=not args.no_steps))
    print("\n".join(table(findings)))
    problems, warnings = count(findings, "problem"), count(findings, "warning")
    print(f"problems: {problems}, warnings: {warnings}")
    if args.json:
        program.write_lines(args.json, [json.dumps(as_json(findings), indent=2)])
    sys.stdout.flush()
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    program.run(main)
