"""The measurements of benchmarks/data.py. Each is made in a process of its own: `in_fresh_process` runs one there.

A measurement is a function of plain values that returns plain values. Memory is the *unique set size*: the pages of a
process that no other process has. Times are those of one core with one thread.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np
import soundfile
import torch

from benchmarks.data_made import SAMPLE_RATE
from benchmarks.startup import run, with_settings
from benchmarks.stopwatch import summary
from common.data.batching import SubBatches, plan_sub_batches
from common.data.loader import TrainLoader
from common.data.manifest import Manifest, read_manifest
from common.data.masking import SpanMasking
from common.data.prepare import train_loader
from common.data.sampler import UpdateSampler
from common.data.selection import LengthLimits
from common.rng import numpy_rng
from wav2vec2.config import MaskConfig, ModelConfig
from wav2vec2.model import num_frames

SEED = 1
MAX_TOKENS, MIN_SAMPLE_SIZE, MAX_SAMPLE_SIZE, MULTIPLE = 1_400_000, 32_000, 250_000, 8  # scripts/pretrain_base.sh
CONCAT, UPDATE_FREQ = 8, 8
WORKERS = 4
SHORT_ROW = 1000  # samples that stand in for a file where the list is measured, and not the audio
EXECUTABLE = str(Path(sys.executable).resolve())
LOOKS = 100  # at workers that are filling their queues
# Memory that is not needed goes back to the system at once, so that what is left can be counted.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": 0, "MALLOC_MMAP_THRESHOLD_": 65536, "MALLOC_ARENA_MAX": 1}


def in_fresh_process(measurement: Callable[..., dict[str, Any]], **given: Any) -> dict[str, Any]:  # noqa: ANN401 - plain
    """What a measurement of this file returns for plain values; TrainingError, with what it said, when it fails."""
    settings = {"OMP_NUM_THREADS": 1} | (ALLOCATOR if measurement in (held_memory, worker_memory) else {})
    command = [sys.executable, str(Path(__file__).resolve()), measurement.__name__, json.dumps(given)]
    return json.loads(run(with_settings(settings, command))[1])


def base_loader(manifest: Manifest, **changed: Any) -> TrainLoader:  # noqa: ANN401 - options of train_loader
    """The loader of the Base recipe in pre-training, where nothing is `changed`."""
    options: dict[str, Any] = {
        "sample_rate": SAMPLE_RATE,
        "normalize": False,
        "num_frames": partial(num_frames, conv_layers=ModelConfig().conv_layers()),
        "seed": SEED,
        "max_tokens": MAX_TOKENS,
        "crop": True,
        "required_batch_size_multiple": MULTIPLE,
        "max_sample_size": MAX_SAMPLE_SIZE,
        "limits": LengthLimits(MIN_SAMPLE_SIZE),
        "time_mask": SpanMasking(**MaskConfig().of_time()),
        "concat": CONCAT,
        "update_freq": UPDATE_FREQ,
    }
    return train_loader(manifest, **options | changed)


def on_one_core() -> None:
    """Keep this process on one core, with one thread."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# ---- Start ----------------------------------------------------------------------------------------------------------


def start(listed: str) -> dict[str, float]:
    """Seconds to read a list, and from there until the first update is planned."""
    on_one_core()
    times = [time.perf_counter()]
    manifest = read_manifest(Path(listed))
    times.append(time.perf_counter())
    base_loader(manifest)
    times.append(time.perf_counter())
    read, plan = np.diff(times).tolist()
    return {"seconds": read + plan, "read": read, "plan": plan}


# ---- Memory ---------------------------------------------------------------------------------------------------------


def unique_bytes(process: int | str = "self") -> int:
    """Unique set size of a process.

    Without the clean pages of its libraries: whether another process has them too depends on what else runs.
    """
    kilobytes, library = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the head of a mapping: addresses, permissions, ..., path
            library = ".so" in rest[-1] or rest[-1] == EXECUTABLE
        elif name in ("Private_Dirty:", "Private_Hugetlb:") or (name == "Private_Clean:" and not library):
            kilobytes += int(rest[0])
    return kilobytes * 1024


def trimmed_bytes() -> int:
    """Unique set size of this process, without memory that it has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return unique_bytes()


def status_bytes(name: str) -> int:
    """What Linux tells of this process in bytes: VmRSS, its resident memory, or VmHWM, the highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def held_memory(listed: str, warm_up: str) -> dict[str, int]:
    """Bytes by which a process grows that reads a list and plans: `list`, `list_and_plan`, and its `peak` meanwhile."""
    base_loader(read_manifest(Path(warm_up)))  # what is imported and kept at the first call is not the list's
    before, resident = trimmed_bytes(), status_bytes("VmRSS")
    manifest = read_manifest(Path(listed))
    with_list = trimmed_bytes()
    loader = base_loader(manifest)
    del manifest  # the loader holds what it needs of it
    with_plan = trimmed_bytes()
    loader.close()
    return {"list": with_list - before, "list_and_plan": with_plan - before, "peak": status_bytes("VmHWM") - resident}


def silent_rows(*_: object, **__: object) -> np.ndarray:
    """In the place of `read_audio`, where the files of a list do not exist."""
    return np.zeros(SHORT_ROW, np.float32)


def worker_memory(listed: str, utterances: int) -> dict[str, int]:
    """Unique set sizes of all workers together, after so many `utterances` at random places of the list were asked for.

    The workers are those of training; only the files are stood in for, with short rows.
    """
    # Whole batches are of one length; what is asked of the list is the same.
    loader = base_loader(read_manifest(Path(listed)), num_workers=WORKERS)
    with patch("common.data.dataset.read_audio", silent_rows):
        asked = 0
        while asked < utterances:
            asked += sum(batch.num_rows for batch in loader.next_update())
        found = sum(settled_bytes(workers()))
    loader.close()
    return {"workers": found, "asked": asked}


def workers() -> list[int]:
    """Process numbers of the workers of this process."""
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def settled_bytes(processes: Sequence[int]) -> list[int]:
    """Unique set sizes of processes, once they have finished what they were asked for."""
    before: list[int] = []
    for _ in range(LOOKS):
        found = [unique_bytes(process) for process in processes]
        if found == before:
            break
        before = found
        time.sleep(0.3)
    return before


# ---- Decoding -------------------------------------------------------------------------------------------------------


def decode(files: str, shards: str, rounds: int) -> dict[str, Any]:
    """Seconds of one core for a corpus: by soundfile alone, and as batches from files, from shards, and cropped.

    All read the same files whole, but "cropped", which reads them as pre-training does. `hours`: what each has read.
    """
    on_one_core()
    whole: dict[str, Any] = {"crop": False, "max_sample_size": None, "limits": LengthLimits()}
    every_one: dict[str, Any] = {"concat": 1, "update_freq": 1}  # nothing is left over
    manifest, tar = read_manifest(Path(files)), read_manifest(Path(shards))
    sides: dict[str, Callable[[], int]] = {
        "soundfile": partial(_bare, [path for path, _ in listed_files(Path(files))]),
        "files": partial(_epoch, lambda: base_loader(manifest, **whole, **every_one)),
        "shards": partial(_epoch, lambda: base_loader(tar, **whole, **every_one)),
        "cropped": partial(_epoch, lambda: base_loader(manifest, **every_one)),
    }
    hours = {name: side() / SAMPLE_RATE / 3600 for name, side in sides.items()}  # all files are in memory now
    seconds: list[dict[str, float]] = []
    for number in range(rounds):
        taken = {}
        for name in list(sides)[:: -1 if number % 2 else 1]:  # no side is always the first
            begin = time.perf_counter()
            sides[name]()
            taken[name] = time.perf_counter() - begin
        seconds.append(taken)
    return {"hours": hours, "rounds": seconds} | compared(hours, seconds)


def compared(hours: dict[str, float], rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Hours of speech per hour of a core, and medians of the rounds' ratios; above 1 is slower than the other."""
    return {
        "hours_per_hour": {
            name: hours[name] * 3600 / summary([one[name] for one in rounds])["median"] for name in hours
        },
        "files_over_soundfile": summary([one["files"] / one["soundfile"] for one in rounds]),
        "shards_over_files": summary([one["shards"] / one["files"] for one in rounds]),
    }


def listed_files(listed: Path) -> list[tuple[Path, int]]:
    """Files of a list, and their samples."""
    root, *lines = listed.read_text().splitlines()
    pairs = [line.split("\t") for line in lines]
    return [(listed.parent / root / path, int(samples)) for path, samples in pairs]


def _bare(paths: Sequence[Path]) -> int:
    """Decode all files with soundfile alone; returns the samples."""
    return sum(len(soundfile.read(path, dtype="float32")[0]) for path in paths)


def _epoch(make: Callable[[], TrainLoader]) -> int:
    """All batches of an epoch, read in this process; returns the samples."""
    loader = make()
    return sum(batch.num_samples for _ in range(loader.updates_per_epoch) for batch in loader.next_update())


# ---- Waste ----------------------------------------------------------------------------------------------------------


def waste(lengths: np.ndarray, *, crop: bool, concat: int, update_freq: int) -> dict[str, float]:
    """Shares of an epoch of the Base recipe that are lost, for utterances of these lengths in samples.

    padded: of the numbers in the batches, those that are padding; cropped: of the speech, what cropping cuts off;
    left_over: of the sub-batches, those that sit out; too_short: of the speech, what is below the minimum.
    """
    kept = lengths[lengths >= MIN_SAMPLE_SIZE]
    plan = plan_sub_batches(
        kept,
        max_tokens=MAX_TOKENS,
        max_sentences=None,
        multiple=MULTIPLE,
        crop=crop,
        max_sample_size=MAX_SAMPLE_SIZE,
        rng=numpy_rng(SEED, "length_order"),
    )
    sampler = UpdateSampler(lengths=plan.samples, sub_batches_per_update=concat * update_freq, seed=SEED)
    used = samples_of_sub_batches(kept, plan)
    joined = np.array(
        [
            [part.sub_batch for part in micro]
            for position in range(sampler.updates_per_epoch)
            for micro in sampler.micro_batches(1, position, rank=0, world=1, concat=concat, update_freq=update_freq)
        ]
    )  # (batches, concat)
    computed = (plan.samples[joined].max(axis=1) * plan.rows[joined].sum(axis=1)).sum()
    return {
        "padded": 1 - float(used[joined].sum() / computed),
        "cropped": 1 - float(used.sum() / kept.sum()),
        "left_over": sampler.left_over_share,
        "too_short": 1 - float(kept.sum() / lengths.sum()),
    }


def samples_of_sub_batches(lengths: np.ndarray, plan: SubBatches) -> np.ndarray:
    """Samples of speech in every sub-batch, without padding."""
    used = np.minimum(lengths[plan.order], np.repeat(plan.samples, plan.rows))
    return np.add.reduceat(used, plan.offsets[:-1])


# ---- Soak -----------------------------------------------------------------------------------------------------------


def soak(listed: str, epochs: int, max_tokens: int) -> dict[str, Any]:
    """Unique set sizes of the main process and of the workers together at the end of every epoch, in bytes."""
    changed = {"max_tokens": max_tokens, "limits": LengthLimits(), "concat": 1, "update_freq": 1}
    loader = base_loader(read_manifest(Path(listed)), num_workers=WORKERS, **changed)
    found = []
    for _ in range(epochs):
        for _ in range(loader.updates_per_epoch):
            loader.next_update()
        waiting = sum(settled_bytes(workers()))
        found.append({"main": trimmed_bytes(), "workers": waiting})
    loader.close()
    return {"epochs": found}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    measurement.__name__: measurement for measurement in (start, held_memory, worker_memory, decode, soak)
}

if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]](**json.loads(sys.argv[2]))))
