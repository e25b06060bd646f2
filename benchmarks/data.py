"""Measure the data path beside its bars: start, memory, decoding, waste of batches, and memory over many epochs.

    python benchmarks/data.py [--quick] [--work DIR] --json OUT

It makes what it needs: file lists as long as LibriSpeech and of 10 million utterances, with lengths and paths like
LibriSpeech's; an hour of speech as FLAC files and as tar shards (utils/synthesize_corpus.py; noise shaped like speech
where eSpeak NG is not installed); 100,000 short clips. All is read and batched as scripts/pretrain_base.sh does it.
What is timed has one core and one thread; every measurement is made in a process of its own, and none of the times
includes imports. --quick takes smaller sizes, which decide less. The file --json is one object:

    start                       seconds to read a list and to plan the first update of an epoch
    memory                      bytes per utterance that a process holds, list and plan; by how much the workers
                                together have more memory of their own than with a list of 2,000, as a share of the list
    decode                      hours of speech per hour of one core: files whole as padded batches, shards, and cropped
                                as in pre-training; seconds over those of bare soundfile.read and of files
    waste                       shares of an epoch that are padding and that cropping cuts off, for the recipe, without
                                joining of sub-batches, and with rows padded instead of cropped
    soak                        growth of memory from the end of the first epoch to that of the last
    sizes, hardware, versions, commit, command

Each of the first five is {bar: {figure: text}, met, figures: a list of {figure, value, unit, bar, met}, measured: what
the figures follow from}; met is null where there is no bar. Memory is that
which a process shares with no other, without the code of its libraries.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch

from benchmarks import data_parts as parts
from benchmarks.data_made import draw_lengths, make_shards, make_speech, write_clips, write_list
from benchmarks.provenance import provenance
from benchmarks.stopwatch import summary
from common import flags
from common.entry import run_program
from common.errors import ConfigError
from common.flags import flag
from utils.program import write_lines, writing

BESIDE_PATHS = 40  # bytes per utterance
SHARE_OF_WORKERS = 0.10
HOURS_PER_HOUR, OVER_SOUNDFILE = 400, 1.3
NOT_SLOWER = 1.05  # with what one round differs from another
PADDED = 0.03
GROWTH = 0.05
FEW = 2000  # utterances of the list beside which workers are measured


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    start: utterances of a list and the seconds that its start may take; repeats: of each; asked: utterances asked of
    the workers, as many that most pages of the longest list are touched; clips, tokens, epochs: of the last part, with
    so many samples in a batch that every worker has made dozens of batches by the end of the first epoch.
    """

    start: tuple[tuple[int, float], ...]
    repeats: int
    asked: int
    hours: float
    rounds: int
    planned: int
    clips: int
    tokens: int
    epochs: int

    @property
    def longest(self) -> int:
        """Utterances of the longest list."""
        return max(utterances for utterances, _ in self.start)


FULL = Sizes(((280_000, 2.0), (10_000_000, 60.0)), 3, 250_000, 1.0, 7, 280_000, 100_000, parts.MAX_TOKENS, 10)
QUICK = Sizes(((280_000, 2.0),), 3, 14_000, 0.2, 5, 280_000, 16_000, parts.MAX_TOKENS // 4, 4)


@dataclass(frozen=True)
class Figure:
    """A number with the bar that it should not be above, or below with `at_least`; None: there is no bar."""

    figure: str
    value: float
    unit: str = ""
    bar: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is met."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def bar_text(self) -> str:
        """The bar in words."""
        if self.bar is None:
            return ""
        return f"at {'least' if self.at_least else 'most'} {self.shown(self.bar)}"

    def shown(self, value: float) -> str:
        """A value in the unit of this figure."""
        return f"{value:.2%}" if self.unit == "%" else f"{value:.4g} {self.unit}".strip()


@dataclass(frozen=True)
class DataFlags:
    """The command line."""

    quick: bool = flag(False, "smaller sizes, a minute or two instead of about ten")
    work: str = flag("", "folder for what is made, which stays there; default: a temporary one", metavar="DIR")
    parts: tuple[str, ...] = flag(
        ("start", "memory", "decode", "waste", "soak"),
        "what is measured",
        choices=("start", "memory", "decode", "waste", "soak"),
    )
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> DataFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/data.py",
        usage="benchmarks/data.py --json OUT [FLAG ...]",
        description="Measure the data path: start, memory, decoding, waste.",
    )
    flags.add_flags(parser, DataFlags, "pretrain", "what is measured")
    return flags.from_namespace(DataFlags, parser.parse_args(list(argv)))


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    if not Path("/proc/self/smaps").is_file():
        raise ConfigError("benchmarks/data.py: memory is read as Linux tells it in /proc; run it on Linux")
    out = Path(options.json)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--json {out}: is a folder, or in one that cannot be written; choose another file")
    sizes = QUICK if options.quick else FULL
    found: dict[str, Any] = {}
    with work_folder(options.work) as folder:
        for name in dict.fromkeys(options.parts):
            figures, measured = PARTS[name](sizes, folder)
            found[name] = judged(figures, measured)
            print(table(name, figures), flush=True)
    result = found | {"sizes": asdict(sizes)} | provenance(torch.device("cpu")) | {"command": list(argv)}
    write_lines(out, [json.dumps(result, indent=2)])


@contextmanager
def work_folder(work: str) -> Iterator[Path]:
    """The folder for what is made: what was asked for, or one that lasts as long as this."""
    if not work:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    kept = Path(work).resolve()
    with writing(kept):
        kept.mkdir(parents=True, exist_ok=True)
    yield kept


def judged(figures: Sequence[Figure], measured: dict[str, Any]) -> dict[str, Any]:
    """A part as the file tells it; `met` when no figure misses its bar."""
    return {
        "bar": {one.figure: one.bar_text for one in figures if one.bar is not None},
        "met": all(one.met is not False for one in figures),
        "figures": [asdict(one) | {"met": one.met} for one in figures],
        "measured": measured,
    }


def table(name: str, figures: Sequence[Figure]) -> str:
    """Lines for the console, one for each figure."""
    verdicts = {True: "met", False: "NOT MET", None: ""}
    return "\n".join(
        f"{name:8}{one.figure:54}{one.shown(one.value):>14}  {one.bar_text:22}{verdicts[one.met]}".rstrip()
        for one in figures
    )


# ---- The parts: what is made, what is measured, the figures ---------------------------------------------------------


def start(sizes: Sizes, folder: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Lists of all sizes."""
    figures, measured = [], {}
    for utterances, bar in sizes.start:
        write_list(folder / f"{utterances}.tsv", utterances)
        taken = [
            parts.in_fresh_process(parts.start, listed=str(folder / f"{utterances}.tsv")) for _ in range(sizes.repeats)
        ]
        found = {name: summary([one[name] for one in taken]) for name in taken[0]}
        figures.append(Figure(f"{utterances:,} utterances", found["seconds"]["median"], "s", bar))
        measured[str(utterances)] = found
    return figures, measured


def memory(sizes: Sizes, folder: Path) -> tuple[list[Figure], dict[str, Any]]:
    """The longest list, beside one of a few utterances."""
    long, few = folder / f"{sizes.longest}.tsv", folder / f"{FEW}.tsv"
    path_bytes = write_list(long, sizes.longest)
    write_list(few, FEW)
    held = parts.in_fresh_process(parts.held_memory, listed=str(long), warm_up=str(few))
    workers = {
        name: parts.in_fresh_process(parts.worker_memory, listed=str(listed), utterances=sizes.asked)["workers"]
        for name, listed in {"long": long, "few": few}.items()
    }
    path, each = path_bytes / sizes.longest, {name: size / sizes.longest for name, size in held.items()}
    share = (workers["long"] - workers["few"]) / held["list"]
    figures = [
        Figure(f"per utterance, {path:.1f} of them its path", each["list_and_plan"], "bytes", BESIDE_PATHS + path),
        Figure("per utterance, the list alone", each["list"], "bytes"),
        Figure("per utterance, highest while it starts", each["peak"], "bytes"),
        Figure(f"more in {parts.WORKERS} workers, of the list", share, "%", SHARE_OF_WORKERS),
    ]
    return figures, {"utterances": sizes.longest, "path_bytes": path_bytes, "bytes": held, "workers_bytes": workers}


def decode(sizes: Sizes, folder: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Speech as files and as shards."""
    files, kind = make_speech(folder, sizes.hours)
    found = parts.in_fresh_process(parts.decode, files=str(files), shards=str(make_shards(files)), rounds=sizes.rounds)
    speed = found["hours_per_hour"]
    over_soundfile, over_files = found["files_over_soundfile"]["median"], found["shards_over_files"]["median"]
    figures = [
        Figure("bare soundfile.read, hours per hour of a core", speed["soundfile"], "h"),
        Figure("files, hours per hour of a core", speed["files"], "h", HOURS_PER_HOUR, at_least=True),
        Figure("shards, hours per hour of a core", speed["shards"], "h", HOURS_PER_HOUR, at_least=True),
        Figure("files cropped, hours kept per hour of a core", speed["cropped"], "h"),
        Figure("files, seconds over those of soundfile.read", over_soundfile, "", OVER_SOUNDFILE),
        Figure("shards, seconds over those of files", over_files, "", NOT_SLOWER),
    ]
    return figures, {"corpus": kind} | found


def waste(sizes: Sizes, _: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Lengths like LibriSpeech's, planned as the recipe does and otherwise."""
    lengths = draw_lengths(sizes.planned)
    plans: dict[str, dict[str, Any]] = {
        "joined by 8, cropped (the recipe)": {"crop": True, "concat": parts.CONCAT, "update_freq": parts.UPDATE_FREQ},
        "not joined, cropped": {"crop": True, "concat": 1, "update_freq": parts.CONCAT * parts.UPDATE_FREQ},
        "joined by 8, padded": {"crop": False, "concat": parts.CONCAT, "update_freq": parts.UPDATE_FREQ},
    }
    measured = {name: parts.waste(lengths, **plan) for name, plan in plans.items()}
    figures = []
    for number, (name, found) in enumerate(measured.items()):
        figures.append(Figure(f"{name}: padding", found["padded"], "%", None if number else PADDED))
        figures.append(Figure(f"{name}: cut off", found["cropped"], "%"))
    return figures, measured


def soak(sizes: Sizes, folder: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Short clips, over and over."""
    listed = write_clips(folder / f"clips_{sizes.clips}", sizes.clips)
    found = parts.in_fresh_process(parts.soak, listed=str(listed), epochs=sizes.epochs, max_tokens=sizes.tokens)
    totals = [sum(epoch.values()) for epoch in found["epochs"]]
    figures = [
        Figure(f"after the first epoch of {sizes.clips:,} clips", totals[0] / 2**20, "MiB"),
        Figure(f"growth until the end of epoch {sizes.epochs}", totals[-1] / totals[0] - 1, "%", GROWTH),
    ]
    return figures, found


PARTS: dict[str, Callable[[Sizes, Path], tuple[list[Figure], dict[str, Any]]]] = {
    measure.__name__: measure for measure in (start, memory, decode, waste, soak)
}

if __name__ == "__main__":
    run_program(main, sys.argv[1:])
