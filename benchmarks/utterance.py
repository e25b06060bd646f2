"""Measure how long a fine-tuned model takes for one utterance, as inference.py transcribes it.

    python benchmarks/utterance.py --device cuda --seconds 6.54 --precision bf16 --json OUT

The model has random weights and 32 symbols, and the audio is noise, so the text is longer than that of speech. The
clock waits for the device at both ends of every stage. The file --json is one object:

    latency_ms                  {avg, 90, 95, 99: so many per cent of the repeats are below} from a batch on the host to
                                its texts
    stages_ms                   the same of data: until the batch is on the device; model: from there to its
                                log-probabilities; text: from these to texts
    setting                     sizes, precision, device, repeats, frames of a row
    hardware, versions, commit, command
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np
import torch

from benchmarks.provenance import provenance
from benchmarks.step import check_writable
from benchmarks.workload import PRECISIONS, SEED, SIZES
from common import distributed, flags, rng
from common.data.audio import normalize
from common.data.collate import Batch, Collator
from common.data.dataset import Sample
from common.data.sampler import PlannedSubBatch
from common.entry import run_program
from common.flags import flag
from common.labels import SPECIAL_SYMBOLS, WORD_BOUNDARY, Dictionary
from common.precision import to_half
from utils.program import write_lines
from wav2vec2.build import HALF, build_model, fp32_modules
from wav2vec2.config import Config, PrecisionConfig, RunConfig
from wav2vec2.latency import STATISTICS, Stopwatch
from wav2vec2.logging import LATENCY_PERCENTILES
from wav2vec2.model import Wav2Vec2Ctc
from wav2vec2.task import FinetuneTask
from wav2vec2.transcribe import Recognizer

SYMBOLS = (*SPECIAL_SYMBOLS, WORD_BOUNDARY, *"ETAONIHSRDLUMWCFGYPBVKXJQZ'")  # 32, as for LibriSpeech


@dataclass(frozen=True)
class UtteranceFlags:
    """The command line."""

    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    size: str = flag("base", "size of the model", choices=tuple(SIZES))
    precision: str = flag("fp32", "number format", choices=PRECISIONS)
    batch: int = flag(1, "utterances at a time", minimum=1)
    seconds: float = flag(6.54, "length of an utterance, in seconds of audio", minimum=0.5)
    repeats: int = flag(100, "repetitions that count", minimum=1)
    warmup: int = flag(10, "repetitions ahead of them", minimum=0)
    threads: int = flag(0, "threads of the CPU; 0: torch's own number", minimum=0)
    json: str = flag("", "file for the results", required=True, metavar="OUT")
    debug: bool = flag(False, "show tracebacks of errors")


def parse(argv: Sequence[str]) -> UtteranceFlags:
    """The command line."""
    parser = flags.Parser(
        prog="benchmarks/utterance.py",
        usage="benchmarks/utterance.py --json OUT [FLAG ...]",
        description="Measure how long a fine-tuned model takes for one utterance.",
    )
    flags.add_flags(parser, UtteranceFlags, "finetune", "what is measured")
    return flags.from_namespace(UtteranceFlags, parser.parse_args(list(argv)))


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, and write the results."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with distributed.session(options.device) as device:
        check_writable(Path(options.json))
        result = measure(options, device) | provenance(device) | {"command": list(argv)}
        print(describe(result))
        write_lines(Path(options.json), [json.dumps(result, indent=2)])


def make_recognizer(size: str, precision: PrecisionConfig, device: torch.device) -> Recognizer:
    """A recogniser as load_recognizer() makes it, with random weights in place of a checkpoint's."""
    config = Config(mode="finetune", model=SIZES[size], precision=precision, run=RunConfig(seed=SEED))
    dictionary = Dictionary(SYMBOLS)
    model = cast(Wav2Vec2Ctc, build_model(config, dictionary))
    if precision.name in HALF:
        to_half(model, HALF[precision.name], fp32_modules(model, precision.kept_in_fp32()))
    task = FinetuneTask(model.requires_grad_(False), seed=SEED).to(device).eval()
    model.w2v.encoder.pos_conv.fold()
    return Recognizer(task, dictionary, config.model)


def make_batch(recognizer: Recognizer, rows: int, samples: int) -> Batch:
    """A batch of noise on the host."""
    noise = rng.numpy_rng(SEED, "audio").normal(0, 0.1, (rows, samples)).astype("float32")
    wanted = [normalize(wave_S) if recognizer.model.normalize else wave_S for wave_S in noise]
    utterances = [Sample(str(row), wave_S, text=None, labels=None) for row, wave_S in enumerate(wanted)]
    return Collator(recognizer.num_frames, seed=SEED)([PlannedSubBatch(0, 0, 0)], [utterances])


@torch.inference_mode()
def time_stages(recognizer: Recognizer, batch: Batch, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every stage in every repetition, in the order of inference.py; see the head of this file."""
    watch, text = Stopwatch(device), []
    for on_device, _ in watch.fetch((batch, [0]) for _ in range(repeats)):
        log_probs_BTK = watch.run(recognizer.log_probs, on_device)
        begin = time.perf_counter()
        recognizer.texts(log_probs_BTK, on_device.frame_lengths)  # reads the device, so it waits
        text.append(time.perf_counter() - begin)
    return {"data": watch.data, "model": watch.model, "text": text}


def measure(options: UtteranceFlags, device: torch.device) -> dict[str, Any]:
    """All repetitions, and what follows from them."""
    precision = PrecisionConfig(fp16=options.precision == "fp16", bf16=options.precision == "bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.allow_tf32
    recognizer = make_recognizer(options.size, precision, device)
    batch = make_batch(recognizer, options.batch, round(options.seconds * recognizer.model.sample_rate))
    if device.type == "cuda":
        batch = batch.pin_memory()  # as the workers do
    time_stages(recognizer, batch, device, options.warmup)
    stages = time_stages(recognizer, batch, device, options.repeats)
    taken = {name: value for name, value in flags.to_dict(options).items() if name not in ("json", "debug")}
    return {
        "latency_ms": statistics(np.sum(list(stages.values()), axis=0)),
        "stages_ms": {name: statistics(seconds) for name, seconds in stages.items()},
        "setting": {**taken, "frames": batch.frame_lengths[0]},
    }


def statistics(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Average and percentiles of seconds, in ms."""
    milliseconds = 1000 * np.asarray(seconds)
    numbers = milliseconds.mean(), *np.percentile(milliseconds, LATENCY_PERCENTILES)
    return {name: float(number) for name, number in zip(STATISTICS, numbers, strict=True)}


def describe(result: dict[str, Any]) -> str:
    """A table for the console."""
    rows = {"latency": result["latency_ms"], **{f"  {name}": row for name, row in result["stages_ms"].items()}}
    lines = [f"{'ms':9}" + "".join(f"{name if name == 'avg' else name + ' %':>10}" for name in STATISTICS)]
    for name, row in rows.items():
        lines.append(f"{name:9}" + "".join(f"{row[key]:10.3f}" for key in STATISTICS))
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
