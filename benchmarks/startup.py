"""Measure the seconds from a command to its first finished update, and where they go.

    python benchmarks/startup.py --data quickstart/filelists --json OUT

The command is that of the quickstart, scripts/pretrain_tiny.sh, for one update: the clock stops when the line of that
update is on the console. Without --data the corpus is half an hour of noise in clips as long as the quickstart's.
Nothing is compiled. The first repetition is told apart: what it reads from the disk, the others find in memory. This
program itself imports torch only after the last, so on a machine that has just started the first is a cold start. The
file --json is one object:

    seconds                     {median, quartiles} from the command to the line, without the first repetition; with
                                --repeats 1 of that one
    first_seconds               the first repetition
    parts                       {median, quartiles} of shell: the script, which turns variables into flags; interpreter:
                                Python alone; torch: its import; toolkit: what `import train` needs after that; rest:
                                checks of the data, model, optimizer, workers and the update. In every repetition the
                                first four are timed by themselves, and the rest is what is left
    repetitions                 a list of {seconds, and those of every part}, the first one ahead
    setting                     device, data, number of repetitions
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np
import soundfile

from common import flags
from common.entry import run_program
from common.errors import ConfigError, TrainingError
from common.flags import flag
from utils.program import write_lines, writing

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "pretrain_tiny.sh"
FIRST_UPDATE = re.compile(r"train +\| epoch +1 \| update +1/")
IMPORTS = """
import json, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import train
times.append(time.perf_counter())
print(json.dumps({"torch": times[1] - times[0], "toolkit": times[2] - times[1]}))
"""
SAMPLE_RATE = 16000
CLIPS = {"train": 1200, "dev": 40}  # half an hour for training
CLIP_SECONDS = 1.0, 2.0


@dataclass(frozen=True)
class StartupFlags:
    """The command line."""

    data: str = flag("", "folder with file lists train.tsv and dev.tsv; default: made of noise", metavar="DIR")
    device: str = flag("auto", "where to train", choices=("auto", "cuda", "cpu"))
    repeats: int = flag(6, "repetitions; from 2 on the first is told apart", minimum=1)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> StartupFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/startup.py",
        usage="benchmarks/startup.py --json OUT [FLAG ...]",
        description="Measure the seconds from a command to its first finished update.",
    )
    flags.add_flags(parser, StartupFlags, "pretrain", "what is measured")
    options = flags.from_namespace(StartupFlags, parser.parse_args(list(argv)))
    for name in CLIPS if options.data else ():
        if not (Path(options.data) / f"{name}.tsv").is_file():
            raise ConfigError(
                f"--data {options.data}: has no {name}.tsv; name a folder of file lists, see docs/data.md"
            )
    return options


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    out = Path(options.json)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--json {out}: is a folder, or in one that cannot be written; choose another file")
    with corpus(options.data) as data:
        repetitions = [repetition(data, options.device) for _ in range(options.repeats)]
    result = report(options, repetitions) | {"command": list(argv)}
    print(describe(result))
    write_lines(out, [json.dumps(result, indent=2)])


@contextmanager
def corpus(data: str) -> Iterator[Path]:
    """The folder of the file lists: what was asked for, or one of noise for as long as this lasts."""
    if data:
        yield Path(data).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, clips in CLIPS.items():
            write_noise(Path(folder), name, clips)
        yield Path(folder)


def write_noise(folder: Path, name: str, clips: int) -> None:
    """A file list NAME.tsv and its clips of noise."""
    draws = np.random.default_rng(clips)
    lines = [name]  # the root, beside the list
    (folder / name).mkdir()
    for number in range(clips):
        samples = int(draws.uniform(*CLIP_SECONDS) * SAMPLE_RATE)
        noise = draws.normal(0, 1000, samples).astype(np.int16)
        soundfile.write(folder / name / f"{number}.wav", noise, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{number}.wav\t{samples}")
    write_lines(folder / f"{name}.tsv", lines)


def repetition(data: Path, device: str) -> dict[str, float]:
    """Seconds until the first update, and of the parts."""
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "PYTHON": sys.executable,
            "FILELISTS_DIR": data,
            "OUTPUT_DIR": output,
            "DEVICE": device,
            "MAX_UPDATE": 1,
            "LOG_FREQUENCY": 1,
            "SAVE": "false",
        }
        script = ["bash", str(SCRIPT)]
        seconds = seconds_to_line(with_settings(settings, script), FIRST_UPDATE)
        shell, _ = run(with_settings(settings | {"DRY_RUN": 1}, script))
    parts = {"shell": shell, "interpreter": run([sys.executable, "-c", "pass"])[0], **seconds_of_imports()}
    return {"seconds": seconds, **parts, "rest": seconds - sum(parts.values())}


def with_settings(settings: dict[str, Any], command: Sequence[str]) -> list[str]:
    """The command with more variables in its environment."""
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *command]


def seconds_to_line(command: Sequence[str], pattern: re.Pattern[str]) -> float:
    """Seconds until a command prints a line that begins with the pattern; waits for its end.

    Raises:
        TrainingError: it fails, or prints no such line; its last lines are told.
    """
    seconds, lines = None, []
    start = time.perf_counter()
    with subprocess.Popen(  # noqa: S603
        list(command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            if seconds is None and pattern.match(line):
                seconds = time.perf_counter() - start
            lines.append(line)
    if process.returncode or seconds is None:
        sys.stderr.writelines(lines[-20:])
        what = f"ended with status {process.returncode}" if process.returncode else "printed no line of an update"
        raise TrainingError(f"the training that is measured {what}; its last lines are above")
    return seconds


def seconds_of_imports() -> dict[str, float]:
    """Seconds of the imports of a training, in a fresh process."""
    return json.loads(run([sys.executable, "-c", IMPORTS])[1])


def run(command: Sequence[str]) -> tuple[float, str]:
    """Seconds that a command takes, and what it prints.

    Raises:
        TrainingError: it fails; what it said is told.
    """
    start = time.perf_counter()
    done = subprocess.run(list(command), cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise TrainingError(f"{command[0]}: ended with status {done.returncode}; what it said is above")
    return seconds, done.stdout


def report(options: StartupFlags, repetitions: list[dict[str, float]]) -> dict[str, Any]:
    """What follows from the repetitions; the first is left out where there are others."""
    from benchmarks.provenance import provenance  # these import torch, which shall not be in memory before
    from benchmarks.stopwatch import summary
    from common import distributed

    warm = repetitions[1:] or repetitions
    found = {name: summary([one[name] for one in warm]) for name in repetitions[0]}
    with distributed.session(options.device) as device:
        return {
            "seconds": found.pop("seconds"),
            "first_seconds": repetitions[0]["seconds"],
            "parts": found,
            "repetitions": repetitions,
            "setting": {"device": device.type, "data": options.data or None, "repeats": options.repeats},
            **provenance(device),
        }


def describe(result: dict[str, Any]) -> str:
    """A few lines for the console."""
    low, high = result["seconds"]["quartiles"]
    lines = [
        f"{result['seconds']['median']:.2f} s [{low:.2f}, {high:.2f}] from the command to the first update; "
        f"{result['first_seconds']:.2f} s the first time"
    ]
    lines += [f"  {name:12}{part['median']:6.2f} s" for name, part in result["parts"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
