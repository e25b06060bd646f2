"""What needs torch to be told: devices, number formats, threads, one training step of each kind, processes that meet.

`utils/doctor.py` starts this file in processes of its own, since a broken driver or library can end a process or hold
it for ever. It prints one JSON object per line: {"trying": WHAT} before something that may go wrong, and findings.

    python utils/device_checks.py devices | steps DEVICE | meet BACKEND RANK PORT
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch
import torch.distributed as dist

from common import control_groups, distributed
from common.errors import UserError, one_line, size
from utils.findings import Finding
from utils.machine_checks import Probes

MODES = ("pretrain", "finetune")
# --fp16, --bf16, --amp
PRECISIONS = {
    "fp32": (False, False, False),
    "bf16 O2": (False, True, False),
    "fp16 O2": (True, False, False),
    "bf16 amp": (False, True, True),
    "fp16 amp": (True, False, True),
}
UPDATES = 3  # of every kind: the first warms up, the last is timed
MAX_SKIPPED = 8  # updates that fp16 may lose to its loss scale before the first good one
TOLERANCE = 0.1  # of the loss against that in fp32; noise and dropout are the same
RANKS = 2
# NVIDIA's compute capability from which hardware has them
TENSOR_CORES, AMPERE = (7, 0), (8, 0)
FLAGS = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "asimdhp")}


# ---- Devices --------------------------------------------------------------------------------------------------------


def devices(probes: Probes) -> Iterator[Finding]:
    """GPUs and their formats, the CPU's formats, threads."""
    yield from gpus(probes)
    yield cpu_formats(probes)
    quota = control_groups.cores(probes.text)
    yield threads(torch.get_num_threads(), distributed.omp_threads(), distributed.usable_cores(), quota)


def gpus(probes: Probes) -> Iterator[Finding]:
    """Every CUDA device that torch sees, or why it sees none."""
    driver = re.search(r"Module\s+([\d.]+)", probes.text("/proc/driver/nvidia/version"))
    values = {"cuda": torch.version.cuda, "driver": driver.group(1) if driver else None}
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            text = f"driver {driver.group(1)}, but torch {torch.__version__} is built without CUDA"
            yield Finding("gpu", "cuda", "problem", text, "install a CUDA build of torch (pytorch.org)", values)
        elif driver:
            text = f"driver {driver.group(1)}, torch for CUDA {torch.version.cuda}, but torch finds no device"
            remedy = "check nvidia-smi and CUDA_VISIBLE_DEVICES; a new torch needs a new driver"
            yield Finding("gpu", "cuda", "problem", text, remedy, values)
        else:
            yield Finding("gpu", "cuda", "ok", "no NVIDIA GPU; training runs on the CPU", values=values)
        return
    text = f"CUDA {torch.version.cuda}, driver {values['driver'] or 'not told'}, {torch.cuda.device_count()} devices"
    yield Finding("gpu", "cuda", "ok", text, values=values)
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index)


def _gpu(index: int) -> Iterator[Finding]:
    name = f"cuda:{index}"
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    free, total = torch.cuda.mem_get_info(index)
    text = f"{properties.name}, {size(free)} of {size(total)} free"
    values = {"free_bytes": free, "total_bytes": total, "capability": list(capability)}
    if free < total / 2:
        remedy = "another program uses it (nvidia-smi); wait, or choose devices with CUDA_VISIBLE_DEVICES"
        yield Finding("gpu", name, "warning", text, remedy, values)
    else:
        yield Finding("gpu", name, "ok", text, values=values)
    yield gpu_formats(name, capability)


def gpu_formats(name: str, capability: tuple[int, int]) -> Finding:
    """Which formats a GPU of this compute capability computes quickly."""
    told = "compute capability {}.{}: ".format(*capability)
    if capability >= AMPERE:
        return Finding("formats", name, "ok", told + "TF32, bf16 and fp16; --bf16 is the best choice")
    if capability >= TENSOR_CORES:
        return Finding("formats", name, "ok", told + "fp16, no TF32, bf16 only emulated; --fp16 is the best choice")
    remedy = "train in fp32, or on a newer GPU"
    return Finding("formats", name, "warning", told + "no tensor cores, half precision gains little", remedy)


def cpu_formats(probes: Probes) -> Finding:
    """Whether the CPU has instructions for half precision; it computes in it in any case."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", probes.text("/proc/cpuinfo"), re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    found = [name for name, wanted in FLAGS.items() if flags & set(wanted)]
    told = f"fp32 and, by instructions of its own, {' and '.join(found)}" if found else "fp32 is the best choice"
    slow = [name for name in FLAGS if name not in found]
    return Finding(
        "formats", "cpu", "ok", told + (f"; {' and '.join(slow)} only by conversion, which is slow" if slow else "")
    )


def threads(number: int, omp: str, cores: int, quota: float | None) -> Finding:
    """Threads of torch in one process against the cores that it has; `omp` is OMP_NUM_THREADS, empty if not set."""
    limit = max(1, min(cores, math.floor(quota) if quota else cores))
    told = f"torch uses {number} for {limit} {'core' if limit == 1 else 'cores'}, "
    told += f"OMP_NUM_THREADS is {omp}" if omp else "OMP_NUM_THREADS is not set"
    values = {"torch_threads": number, "omp_num_threads": omp or None, "usable_cores": cores, "quota": quota}
    if number > limit:
        remedy = f"set OMP_NUM_THREADS={limit}, or with several CPU processes the cores divided by them"
        return Finding("cpu", "threads", "warning", told, remedy, values)
    return Finding("cpu", "threads", "ok", told, values=values)


# ---- Steps ----------------------------------------------------------------------------------------------------------


def steps(device: torch.device) -> Iterator[Finding]:
    """A few updates of a tiny model in every mode and precision, fp32 first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for mode in MODES:
        right = None
        for precision in PRECISIONS:
            print(json.dumps({"trying": f"{mode} {precision}"}), flush=True)
            finding = step(device, mode, precision, right)
            right = finding.values.get("loss_bits") if right is None else right
            yield finding


def step(device: torch.device, mode: str, precision: str, right: float | None = None) -> Finding:
    """What became of a few updates of one kind; `right`: the loss in fp32, where it is known."""
    name = f"{device} {precision}"
    try:
        loss, seconds, skipped = train(device, mode, precision)
    except (UserError, RuntimeError, ValueError, ImportError, OSError) as error:
        return Finding("step", name, "problem", f"{mode}: {one_line(error)}", step_remedy(device, precision))
    values = {"mode": mode, "loss_bits": loss, "seconds": seconds, "skipped": skipped}
    if not math.isfinite(loss) or (right is not None and abs(loss / right - 1) > TOLERANCE):
        told = f"{mode}: the loss is {loss:.2f} bits" + (f", in fp32 {right:.2f}" if right is not None else "")
        return Finding("step", name, "problem", told, step_remedy(device, precision), values)
    told = f"{mode}: loss {loss:.2f} bits, {1000 * seconds:.0f} ms" + (f", {skipped} skipped" if skipped else "")
    return Finding("step", name, "ok", told, values=values)


def step_remedy(device: torch.device, precision: str) -> str:
    """What to do when an update fails."""
    if precision != "fp32":
        return "train in another precision (--fp16, --bf16, --amp, or none of them)"
    if device.type == "cuda":
        return "update the driver, or install the torch that fits it (bash scripts/setup_env.sh), or use --device cpu"
    return "install the tested versions: bash scripts/setup_env.sh"


def train(device: torch.device, mode: str, precision: str) -> tuple[float, float, int]:
    """Train a tiny model on noise -> loss in bits, seconds of the last update, updates that fp16 skipped."""
    # only here: with a package missing the devices can still be told
    from benchmarks.our_step import bare_run
    from benchmarks.workload import Workload, make_recipe
    from common.labels import SPECIAL_SYMBOLS, Dictionary
    from train import train_step
    from wav2vec2.config import PrecisionConfig
    from wav2vec2.logging import summarize

    fp16, bf16, amp = PRECISIONS[precision]
    recipe = make_recipe("tiny", "[1,(1,2),1]")
    recipe = replace(recipe, mode=mode, precision=PrecisionConfig(fp16=fp16, bf16=bf16, amp=amp))
    batch = Workload(recipe, device, rows=2, samples=16000).batch()
    dictionary = None
    if mode == "finetune":
        dictionary = Dictionary([*SPECIAL_SYMBOLS, *"|ABC"])
        labels_BL = torch.tensor([[5, 6, 4], [7, 5, 4]], device=device)
        batch = replace(batch, labels_BL=labels_BL, label_lengths=(3, 3))
    run = bare_run(recipe, device, dictionary=dictionary)
    done = skipped = 0
    while done < UPDATES:
        start = time.perf_counter()
        if train_step(run, [batch], done):
            done += 1
        elif (skipped := skipped + 1) > MAX_SKIPPED:
            raise RuntimeError(f"the gradients overflow in each of {skipped} updates")
        sums = run.metrics.reduce(device)  # waits for the device
    return summarize(sums, mode)["loss"], time.perf_counter() - start, skipped


# ---- Processes ------------------------------------------------------------------------------------------------------


def meet(backend: str, rank: int, port: int) -> Iterator[Finding]:
    """Add one number up over two processes."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start = time.perf_counter()
    dist.init_process_group(
        backend,
        init_method=f"tcp://localhost:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
        device_id=device if backend == "nccl" else None,
    )
    numbers = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    right, seconds = bool((numbers == sum(range(1, RANKS + 1))).all()), time.perf_counter() - start
    dist.destroy_process_group()
    values = {"backend": backend, "seconds": seconds}
    if right:
        yield Finding("processes", backend, "ok", f"{RANKS} processes met, {seconds:.1f} s", values=values)
    else:
        remedy = (
            "set NCCL_P2P_DISABLE=1" if backend == "nccl" else "install the tested torch: bash scripts/setup_env.sh"
        )
        yield Finding("processes", backend, "problem", "the sum over two processes is wrong", remedy, values)


def main(argv: list[str]) -> None:
    """Look at what the arguments name, and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("devices", "steps", "meet"), help="what to look at")
    parser.add_argument("rest", nargs="*", help="DEVICE of steps; BACKEND RANK PORT of meet")
    arguments = parser.parse_args(argv)
    what, rest = arguments.what, arguments.rest
    if what == "devices":
        found = devices(Probes())
    elif what == "steps":
        found = steps(torch.device(rest[0]))
    else:
        found = meet(rest[0], int(rest[1]), int(rest[2]))
    print(json.dumps({"trying": what, "python": platform.python_version()}), flush=True)
    for finding in found:
        print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
