"""What benchmarks/faults.py trains: a corpus of noise, recipes, and the runs that nothing interrupts."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fault_runs import ROOT, Training, WrongError
from benchmarks.startup import write_noise
from common import checkpoint
from common.errors import CheckpointError
from utils import make_shards
from utils.program import write_lines

CLIPS = {"train": 20, "valid": 4}
LETTERS = "ABCD"
SHARDS = 3
UPDATES = 18
SAVE_EVERY = 3  # updates; and at the end of every epoch
RESULT = ("model", "optimizer", "scaler", "ema", "loader", "progress")  # what a run that goes on must come to

_COMMON = (
    *("--device", "cpu", "--max_tokens", "64000", "--mask_length", "3", "--lr", "0.002", "--clip_norm", "5"),
    *("--validate_frequency", "1", "--log_frequency", "1", "--save_interval_updates", str(SAVE_EVERY), "--resume"),
)
# small, but with checkpoints of some megabytes, which take a while to write
_MODEL = (
    *("--conv_feature_layers", "[(16,10,5)]+[(16,3,2)]*4+[(16,2,2)]*2", "--encoder_layers", "2"),
    *("--encoder_embed_dim", "32", "--encoder_ffn_embed_dim", "1024", "--encoder_attention_heads", "4"),
    *("--conv_pos", "8", "--conv_pos_groups", "4", "--final_dim", "16", "--latent_vars", "20"),
    *("--num_negatives", "10", "--encoder_layerdrop", "0.1"),
)
_FINETUNE = ("--mask_prob", "0.2", "--mask_channel_prob", "0.1", "--mask_channel_length", "2", "--final_dropout", "0.1")


@dataclass(frozen=True)
class Recipe:
    """A way to train: what it is called, its mode, what differs from the others, and in how many processes."""

    name: str
    mode: str
    flags: tuple[str, ...]
    shards: bool = False
    processes: int = 1


PRETRAIN = Recipe(
    "pre-training, files, no workers, accumulation, EMA",
    "pretrain",
    ("--num_workers", "0", "--update_freq", "2", "--ema", "0.9"),
)
RECIPES = (
    PRETRAIN,
    Recipe("pre-training, files, 2 workers, bf16", "pretrain", ("--num_workers", "2", "--bf16")),
    Recipe(
        "pre-training, shards, 2 workers, fp16, joined, EMA",
        "pretrain",
        ("--num_workers", "2", "--fp16", "--num_concat_batches", "2", "--ema", "0.9"),
        shards=True,
    ),
    Recipe(
        "fine-tuning, files, 2 workers, bf16, EMA",
        "finetune",
        ("--num_workers", "2", "--bf16", "--ema", "0.9", "--freeze_finetune_updates", "4"),
    ),
    Recipe(
        "fine-tuning, shards, no workers, fp16, accumulation",
        "finetune",
        ("--num_workers", "0", "--fp16", "--update_freq", "2"),
        shards=True,
    ),
    Recipe("fine-tuning, files, no workers", "finetune", ("--num_workers", "0", "--freeze_finetune_updates", "4")),
)
# the seconds of silence are few, so that faults take little time
GROUP = Recipe(
    "pre-training, 2 processes",
    "pretrain",
    ("--num_workers", "0", "--update_freq", "2", "--heartbeat_timeout", "5"),
    processes=2,
)
ALL = (*RECIPES, GROUP)
TORCHRUN = ("-m", "torch.distributed.run")
LAUNCH = (str(ROOT / "utils" / "launch.py"),)
MEETING = "--rdzv_backend=c10d"  # of several launchers


# ---- Corpus ---------------------------------------------------------------------------------------------------------


def make_corpus(folder: Path) -> None:
    """Clips of 1 to 2 s with letters drawn by chance: as files in `files`, the training list as tar in `shards`."""
    files, shards = folder / "files", folder / "shards"
    files.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for name, clips in CLIPS.items():
        write_noise(files, name, clips)
        words = ["".join(draws.choice(list(LETTERS), draws.integers(1, 5))) for _ in range(clips)]
        write_lines(files / f"{name}.ltr", [" ".join(f"{word}|") for word in words])
    write_lines(files / "dict.ltr.txt", [f"{symbol} 1" for symbol in f"|{LETTERS}"])
    with redirect_stdout(io.StringIO()):
        make_shards.main([str(files / "train.tsv"), str(shards), "--num_shards", str(SHARDS)])
    for name in ("valid.tsv", "valid.ltr", "dict.ltr.txt"):
        shutil.copy(files / name, shards)
    shutil.copytree(files / "valid", shards / "valid")  # a list names its audio relative to itself


# ---- Runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """A run that nothing interrupted, with its checkpoints of every update."""

    folder: Path
    phases: Mapping[str, float]  # seconds that the parts of a save cycle take, see durations()
    size: int  # bytes of a checkpoint
    _states: dict[int, dict[str, Any]] = field(default_factory=dict)

    def state(self, update: int) -> dict[str, Any]:
        """What there is after so many updates."""
        if update not in self._states:
            self._states[update] = result_of(checkpoint.update_path(self.folder, update))
        return self._states[update]

    def differs(self, path: Path) -> str:
        """Where a checkpoint differs from this run's of the same update; empty if it is the same bit for bit."""
        found, expected = result_of(path), self.state(checkpoint.update_number(path) or 0)
        if found["progress"].get("validation_due"):  # a signal came before it, which is as it should be
            found, expected = (state | {"progress": state["progress"]["step"]} for state in (found, expected))
        return difference(found, expected)

    def wrong_at_end(self, folder: Path) -> str:
        """What is wrong with the last checkpoint of a folder; empty if it is the same as this run's."""
        try:
            where = self.differs(checkpoint.update_path(folder, UPDATES))
        except CheckpointError as error:
            return str(error)
        return f"the result differs in {where}" if where else ""

    def reached(self, folder: Path) -> int:
        """The highest update of a folder's checkpoints that are whole and the same as this run's; 0 without one."""
        for path in checkpoint.update_paths(folder):
            try:
                if not self.differs(path):
                    return checkpoint.update_number(path) or 0
            except CheckpointError:
                continue
        return 0


class Bench:
    """Where everything is made: the corpus, and the reference of every recipe when it is first asked for."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self._references: dict[Recipe, Reference] = {}
        self._locks = {recipe: threading.Lock() for recipe in ALL}
        self._numbers = iter(range(10**6))
        make_corpus(folder / "data")

    def new_folder(self) -> Path:
        """An empty folder for a run."""
        folder = self.folder / f"run{next(self._numbers)}"
        folder.mkdir()
        return folder

    def files_of_its_own(self) -> Path:
        """A copy of the corpus as files, to be spoiled."""
        return Path(shutil.copytree(self.folder / "data" / "files", self.new_folder() / "files"))

    def arguments(self, recipe: Recipe, output: Path, *more: str, data: Path | None = None) -> list[str]:
        """The arguments of train.py; the same ones start a run and go on with it."""
        data = data or self.folder / "data" / ("shards" if recipe.shards else "files")
        arguments = [recipe.mode, "--data", str(data), "--output_dir", str(output), *_COMMON]
        if recipe.mode == "pretrain":
            arguments += _MODEL
        else:
            pretrained = checkpoint.update_path(self.reference(PRETRAIN).folder, UPDATES)
            arguments += ["--w2v_path", str(pretrained), *_FINETUNE]
        if recipe.shards:
            pattern = f"train-{{000000..{SHARDS - 1:06d}}}.tar"
            arguments += ["--is_tarred", "--tarred_filepaths", str(data / pattern)]
        return [*arguments, "--max_update", str(UPDATES), *recipe.flags, *more]

    def training(
        self,
        recipe: Recipe,
        output: Path,
        *more: str,
        data: Path | None = None,
        launcher: tuple[str, ...] = TORCHRUN,
    ) -> Training:
        """A run. `launcher`: of several processes, with its flags; `data`: a corpus of its own."""
        program = [str(ROOT / "train.py"), *self.arguments(recipe, output, *more, data=data)]
        if recipe.processes > 1:
            alone = ("--standalone", f"--nproc_per_node={recipe.processes}")
            program = [*launcher, *(() if MEETING in launcher else alone), *program]
        return Training([sys.executable, *program], output)

    def reference(self, recipe: Recipe) -> Reference:
        """The run of a recipe that nothing interrupts. WrongError if it fails."""
        with self._locks[recipe]:
            if recipe not in self._references:
                self._references[recipe] = self._uninterrupted(recipe)
            return self._references[recipe]

    def _uninterrupted(self, recipe: Recipe) -> Reference:
        output = self.new_folder()
        every = ["--save_interval_updates", "1", "--keep_milestones", *map(str, range(1, UPDATES + 1))]
        with self.training(recipe, output, *every) as run:
            times = [(time.monotonic(), event.kind, event.text) for event in run.events()]
            if run.end():
                raise WrongError(f"{recipe.name}, uninterrupted: {run.last_words}")
        newest = checkpoint.update_path(output, UPDATES)
        return Reference(output, durations(times), newest.stat().st_size)


# The parts of a save cycle: what begins and what ends each of them, as an event and a pattern of its text
UPDATE_LINE = r"^train +\|.*update +(\d+)/"
TEMPORARY = r"^\.wav2vec2_update(\d+)\.pt\.tmp$"
SAVED = r"^wav2vec2_update(\d+)\.pt$"
PHASES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "updates": (("line", UPDATE_LINE), ("line", UPDATE_LINE)),
    "copy": (("line", UPDATE_LINE), ("create", TEMPORARY)),
    "write": (("create", TEMPORARY), ("close", TEMPORARY)),
    "rename": (("close", TEMPORARY), ("rename", SAVED)),
    "prune": (("rename", SAVED), ("line", UPDATE_LINE)),
    "validation": (("line", r"^train_avg +\|.*update +(\d+)/"), ("line", r"^val +\|.*update +(\d+)/")),
}


def durations(times: list[tuple[float, str, str]]) -> dict[str, float]:
    """The median seconds of every phase, from (time, kind, text) of all events of a run."""
    found: dict[str, float] = {}
    for phase, (first, last) in PHASES.items():
        began: float | None = None
        taken: list[float] = []
        for moment, *event in times:
            if began is not None and _is(event, last):
                taken.append(moment - began)
                began = None
            if _is(event, first):
                began = moment
        found[phase] = float(np.median(taken)) if taken else 0.0
    return found


def _is(event: list[str], wanted: tuple[str, str]) -> bool:
    return event[0] == wanted[0] and re.search(wanted[1], event[1]) is not None


# ---- Comparing ------------------------------------------------------------------------------------------------------


def result_of(path: Path) -> dict[str, Any]:
    """What a run has come to, from its checkpoint. CheckpointError if it is damaged."""
    state = checkpoint.load(path)
    return {name: state[name] for name in RESULT}


def difference(found: Any, expected: Any, where: str = "") -> str:
    """The first place where two nested containers differ; empty if they are the same bit for bit."""
    if isinstance(expected, torch.Tensor):
        return "" if _same_bits(found, expected) else where
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            return where or "the parts"
        return next(filter(None, (difference(found[key], expected[key], f"{where}/{key}") for key in expected)), "")
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return where
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (difference(one, other, f"{where}/{n}") for n, (one, other) in pairs)), "")
    return "" if type(found) is type(expected) and found == expected else where


def _same_bits(found: object, expected: torch.Tensor) -> bool:
    """NaN equals NaN, and 0 is not -0."""
    if not isinstance(found, torch.Tensor) or (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    one, other = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (found, expected))
    return torch.equal(one, other)
