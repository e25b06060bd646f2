"""Measure how long a GPU has nothing to do in training: a profile of steps with real loading.

    python benchmarks/idle.py --device cuda --hourglass "[2,(8,4),2]" --precision bf16 --json OUT

Training is that of the Base recipe on one process: workers, page-locked memory, copies ahead of their step. The
utterances are as long as LibriSpeech's, and a worker draws noise where it would read a file. Nothing is logged in
between. The file --json is one object:

    idle                        share of the profiled steps in which the device computes nothing; copies between host
                                and device do not count as work. null on the CPU, which has no such profile
    busy_s, profiled_s          seconds in which it computes, and those of all profiled steps; busy_s is null on the CPU
    unprofiled_s                seconds of as many steps before them, without the profiler
    data_wait_s                 seconds of the profiled steps in which the host waits for data
    frames_per_s                frames of the unprofiled steps per second
    setting                     sizes, precision, device, workers, steps
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.our_step import bare_run
from benchmarks.provenance import provenance
from benchmarks.step import check_writable
from benchmarks.workload import PRECISIONS, SIZES, make_recipe
from common import distributed, flags, rng
from common.data.batching import plan_sub_batches
from common.data.collate import Collator
from common.data.dataset import Sample
from common.data.loader import BatchMaker, TrainLoader
from common.data.masking import SpanMasking
from common.data.sampler import UpdateSampler
from common.data.watch import BadFiles
from common.entry import run_program
from common.flags import flag
from utils import librispeech_lengths
from utils.program import write_lines
from wav2vec2.config import Config
from wav2vec2.model import num_frames
from wav2vec2.run import Run

UTTERANCES = 4000
MIN_SAMPLE_SIZE = 32000  # of the Base recipe, which leaves out shorter ones
HOST_COPIES = ("Memcpy HtoD", "Memcpy DtoH")  # the names that the profiler gives them


@dataclass(frozen=True)
class IdleFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=tuple(SIZES))
    hourglass_transformer: str = flag(
        "", 'Hourglass "[n_pre,(n_mid,factor),n_post]" in place of the layers of --size', aliases=("hourglass",)
    )
    precision: str = flag("fp32", "number format", choices=PRECISIONS)
    max_tokens: int = flag(1400000, "samples per sub-batch", minimum=1)
    max_sample_size: int = flag(250000, "longer utterances are cropped to this length, in samples", minimum=1)
    num_concat_batches: int = flag(8, "sub-batches of a step, joined for one pass", minimum=1)
    num_workers: int = flag(8, "processes that make audio; 0 makes it in the process itself", minimum=0)
    steps: int = flag(20, "steps that are profiled", minimum=1)
    warmup: int = flag(10, "steps ahead of all that are timed", minimum=1)
    threads: int = flag(0, "threads of the CPU; 0: torch's own number", minimum=0)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> IdleFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/idle.py",
        usage="benchmarks/idle.py --json OUT [FLAG ...]",
        description="Measure how long a GPU has nothing to do in training.",
    )
    flags.add_flags(parser, IdleFlags, "pretrain", "what is measured")
    return flags.from_namespace(IdleFlags, parser.parse_args(list(argv)))


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with distributed.session(options.device) as device:
        recipe = make_recipe(options.size, options.hourglass_transformer, options.precision)
        check_writable(Path(options.json))
        result = measure(options, recipe, device) | provenance(device) | {"command": list(argv)}
        print(describe(result))
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


# ---- The data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseDataset:
    """Stands for common.data.dataset.SpeechDataset: utterances of noise with these numbers of samples."""

    sizes: np.ndarray
    seed: int

    def sample(self, index: int, *, longest: int, epoch_pass: int) -> Sample:
        """Utterance `index`, of `longest` samples at most."""
        noise = rng.numpy_rng(self.seed, "audio", epoch_pass, index)
        wave = noise.standard_normal(min(int(self.sizes[index]), longest), dtype=np.float32)
        return Sample(str(index), 0.1 * wave, text=None, labels=None)


def noise_loader(options: IdleFlags, recipe: Config) -> TrainLoader:
    """A loader as train_loader() makes it for pre-training, without a manifest."""
    seed = recipe.run.seed
    shares = rng.numpy_rng(seed, "lengths").random(UTTERANCES)
    sizes = (librispeech_lengths.seconds_at(shares) * recipe.model.sample_rate).astype(np.int64)
    sizes = sizes[sizes >= MIN_SAMPLE_SIZE]
    plan = plan_sub_batches(
        sizes,
        max_tokens=options.max_tokens,
        max_sentences=None,
        multiple=recipe.data.required_batch_size_multiple,
        crop=True,
        max_sample_size=options.max_sample_size,
        rng=rng.numpy_rng(seed, "length_order"),
    )
    frames = partial(num_frames, conv_layers=recipe.model.conv_layers())
    collate = Collator(frames, seed, time_mask=SpanMasking(**recipe.mask.of_time()))
    return TrainLoader(
        BatchMaker(cast(Any, NoiseDataset(sizes, seed)), plan, collate),
        UpdateSampler(lengths=plan.samples, sub_batches_per_update=options.num_concat_batches, seed=seed),
        rank=0,
        world=1,
        concat=options.num_concat_batches,
        update_freq=1,
        num_workers=options.num_workers,
        pin_memory=options.device == "cuda",
        sample_rate=recipe.model.sample_rate,
        bad_files=BadFiles(None, utterances=len(sizes), max_share=0.0),
    )


# ---- The measurement ------------------------------------------------------------------------------------------------


def measure(options: IdleFlags, recipe: Config, device: torch.device) -> dict[str, Any]:
    """Steps to warm up, steps without and with the profiler, and what follows from them."""
    torch.backends.cuda.matmul.allow_tf32 = recipe.precision.allow_tf32
    torch.backends.cudnn.allow_tf32 = recipe.precision.allow_tf32
    loader = noise_loader(options, recipe)
    run = bare_run(recipe, device, loader)
    time_steps(run, options.warmup)
    unprofiled, frames = time_steps(run, options.steps)
    loader.take_work()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        profiled, _ = time_steps(run, options.steps)
    waited = loader.take_work().waited
    loader.close()
    busy = union_length(work_intervals(profiler.events() or ())) / 1e6 if on_gpu else None
    taken = {name: value for name, value in flags.to_dict(options).items() if name not in ("json", "debug")}
    return {
        "idle": None if busy is None else 1 - busy / profiled,
        "busy_s": busy,
        "profiled_s": profiled,
        "unprofiled_s": unprofiled,
        "data_wait_s": waited,
        "frames_per_s": frames / unprofiled,
        "setting": taken,
    }


def time_steps(run: Run, steps: int) -> tuple[float, int]:
    """Seconds of so many updates, as train.train makes them, and the frames of their batches."""
    frames, begin = 0, _now(run.device)
    for _ in range(steps):
        batches = run.train_loader.next_update(run.device)
        run.progress.step += train.train_step(run, batches, run.progress.step)
        frames += sum(batch.num_frames for batch in batches)
        del batches  # before the next ones come, as in train.train
    return _now(run.device) - begin, frames


def _now(device: torch.device) -> float:
    """The time when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def work_intervals(events: Iterable[Any]) -> list[tuple[float, float]]:
    """Begin and end, in microseconds, of all that a device computed: no copies from and to the host, no annotations."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(HOST_COPIES)
    ]


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what the intervals cover together; streams run at the same time."""
    total, reached = 0.0, -float("inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def describe(result: dict[str, Any]) -> str:
    """Two lines for the console."""
    steps = result["setting"]["steps"]
    idle = "not measured on the CPU" if result["idle"] is None else f"{result['idle']:.2%}"
    return (
        f"idle: {idle}; waiting for data: {result['data_wait_s'] / result['profiled_s']:.2%}\n"
        f"{1000 * result['unprofiled_s'] / steps:.1f} ms per step, {1000 * result['profiled_s'] / steps:.1f} ms with "
        f"the profiler; {result['frames_per_s']:,.0f} frames/s"
    )


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
