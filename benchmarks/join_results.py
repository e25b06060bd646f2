"""Join what the parts of benchmarks/gpu_suite.sh left in a folder to one file.

    python benchmarks/join_results.py FOLDER OUT

FOLDER has outcomes.tsv with a line for every part: name, exit status (or why it was left out), seconds; and for a part
its messages NAME.log and its results NAME.json, as far as it came. OUT is one object:

    complete                    whether every part worked; parts that were left out do not count
    parts                       by name {outcome: "ok", "failed", "timed out" or "left out: ...", exit_status, seconds,
                                messages: its last lines, result: its own file without what follows; null where there
                                is none}
    hardware, versions, commit  of the first part that tells; null without one

The exit status is 1 when a part failed.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError, TrainingError
from utils import program

SHARED = ("hardware", "versions", "commit")
TIMED_OUT = (124, 137)  # what coreutils' timeout gives: ended, and killed
LAST_LINES = 20


def main(argv: list[str]) -> None:
    """Join, write, and tell how every part ended.

    Raises:
        TrainingError: a part failed; the file is written all the same.
    """
    parser = program.Parser(description="Join the results of benchmarks/gpu_suite.sh.")
    parser.add_argument("folder", type=Path, help="what the parts left")
    parser.add_argument("out", type=Path, help="file for the joined results")
    options = parser.parse(argv)
    joined = join(options.folder)
    program.write_lines(options.out, [json.dumps(joined, indent=2)])
    for name, part in joined["parts"].items():
        print(f"{name:17}{part['seconds']:6.0f} s  {part['outcome']}")
    print(f"results: {options.out}")
    if not joined["complete"]:
        failed = [name for name, part in joined["parts"].items() if part["outcome"] in ("failed", "timed out")]
        raise TrainingError(f"{', '.join(failed)}: did not work; their messages are in {options.out}")


def join(folder: Path) -> dict[str, Any]:
    """All parts in one object.

    Raises:
        ConfigError: the folder has no outcomes.tsv.
    """
    table = folder / "outcomes.tsv"
    if not table.is_file():
        raise ConfigError(f"{table}: no such file; name the folder in which benchmarks/gpu_suite.sh works")
    parts: dict[str, Any] = {}
    shared: dict[str, Any] = dict.fromkeys(SHARED)
    for line in table.read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split("\t")
        parts[name] = {**outcome(status), "seconds": float(seconds), "messages": last_lines(folder / f"{name}.log")}
        result = read_result(folder / f"{name}.json")
        if result is not None:
            own = {key: result.pop(key, None) for key in SHARED}
            shared = {key: value if shared[key] is None else shared[key] for key, value in own.items()}
        elif name != "tests" and parts[name]["outcome"] == "ok":
            parts[name]["outcome"] = "failed"  # a program that says all is well, and leaves nothing
        parts[name]["result"] = result
    complete = all(part["outcome"] not in ("failed", "timed out") for part in parts.values())
    return {"complete": complete, "parts": parts, **shared}


def outcome(status: str) -> dict[str, Any]:
    """What an exit status means; any other text is why the part was left out."""
    if not status.isdecimal():
        return {"outcome": status, "exit_status": None}
    number = int(status)
    word = "ok" if number == 0 else "timed out" if number in TIMED_OUT else "failed"
    return {"outcome": word, "exit_status": number}


def last_lines(path: Path) -> list[str]:
    """The end of a log; nothing where there is none."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if path.is_file() else []


def read_result(path: Path) -> dict[str, Any] | None:
    """The results of a part, if it came so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    program.run(main)
