"""Transcribe speech with a fine-tuned model: texts, WER and CER, log-probabilities, latencies.

The result goes to standard output and the messages to standard error. With labels the last line is the word error rate
(`WER: 12.34 %`); without them the output is the transcripts.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from common import distributed, flags
from common.data.manifest import find_list
from common.entry import run_program
from common.logger import RunLogger, progress, setup_console
from wav2vec2 import latency, transcribe
from wav2vec2.arg_parser import parse_inference
from wav2vec2.config import PrecisionConfig
from wav2vec2.inference_config import InferenceConfig
from wav2vec2.latency import Stopwatch
from wav2vec2.logging import INFERENCE_METRICS
from wav2vec2.transcribe import Recognizer, Speech, Transcript

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Transcribe as the command line says."""
    config = parse_inference(argv)
    with distributed.session(config.device) as device:
        setup_console(is_main=distributed.is_main(), stream=sys.stderr)
        infer(config, device, open_log(config, argv))


def infer(config: InferenceConfig, device: torch.device, logger: RunLogger | None) -> None:
    """Load, pass over the speech as often as asked, and tell process 0's user the result."""
    recognizer = open_recognizer(config, device)
    speech = open_speech(config, recognizer, pin_memory=device.type == "cuda")
    for _ in range(config.num_warmup_repeats):
        recognize(recognizer, speech, Stopwatch(device), keep_log_probs=False)
    watch = Stopwatch(device)
    for _ in range(config.num_repeats):
        share = recognize(recognizer, speech, watch, keep_log_probs=bool(config.save_logits))
    found = transcribe.gather(share)
    values = latency.timing(watch, warmup_steps=config.warmup_steps, hours=config.num_repeats * speech.hours)
    if distributed.is_main():
        save(config, found, recognizer)
        report(config, found, speech, values, logger)


@torch.inference_mode()
def recognize(recognizer: Recognizer, speech: Speech, watch: Stopwatch, *, keep_log_probs: bool) -> list[Transcript]:
    """One pass over this process's share: batches -> log-probabilities -> best paths -> texts."""
    found: list[Transcript] = []
    watch.start()
    for batch, places in watch.fetch(progress(speech, desc="inference", total=len(speech), unit="batch")):
        log_probs_BTK = watch.run(recognizer.log_probs, batch)
        texts = recognizer.texts(log_probs_BTK, batch.frame_lengths)
        found += transcribe.transcripts(batch, places, texts, log_probs_BTK if keep_log_probs else None)
    watch.stop()
    return found


def open_log(config: InferenceConfig, argv: Sequence[str]) -> RunLogger | None:
    """The log in --output_dir, if there is one; results that could not be written are refused before the work."""
    if not distributed.is_main():
        return None
    for flag in ("save_predictions", "save_logits"):
        if getattr(config, flag):
            transcribe.check_writable(flag, output_path(config, getattr(config, flag)))
    if not config.output_dir:
        return None
    logger = RunLogger(config.output_dir, metrics=INFERENCE_METRICS, enabled=True, tensorboard=False)
    logger.parameters({"command": ["inference.py", *argv], "config": flags.to_dict(config)})
    return logger


def open_recognizer(config: InferenceConfig, device: torch.device) -> Recognizer:
    """The model of --w2v_path."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    return transcribe.load_recognizer(
        config.w2v_path,
        device=device,
        precision=PrecisionConfig(fp16=config.fp16, bf16=config.bf16),
        use_ema=config.ema,
        reference_padding=config.reference_padding,
        dictionary=config.dictionary,
    )


def open_speech(config: InferenceConfig, recognizer: Recognizer, *, pin_memory: bool) -> Speech:
    """What --valid_subset, --transcribe_filelist or --transcribe_wav names."""
    if config.transcribe_wav:
        return transcribe.SingleFile(config.transcribe_wav, recognizer)
    if config.transcribe_filelist:
        path, labels = Path(config.transcribe_filelist), None
    else:
        path = find_list(Path(config.data), config.valid_subset)
        labels = Path(config.data) / f"{config.valid_subset}.{config.labels}"  # a name may have dots of its own
    return transcribe.open_list(
        path,
        labels,
        recognizer,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
    )


def output_path(config: InferenceConfig, name: str) -> Path:
    """Where a result is written: a bare file name means --output_dir."""
    return Path(config.output_dir, name) if Path(name).name == name else Path(name)


def save(config: InferenceConfig, found: Sequence[Transcript], recognizer: Recognizer) -> None:
    """Write the files that are asked for."""
    if config.save_predictions:
        transcribe.save_predictions(output_path(config, config.save_predictions), found)
    if config.save_logits:
        transcribe.save_logits(output_path(config, config.save_logits), found, recognizer.dictionary)


def report(
    config: InferenceConfig,
    found: Sequence[Transcript],
    speech: Speech,
    values: dict[str, float],
    logger: RunLogger | None,
) -> None:
    """Print scores or transcripts, and log all numbers; without labels transcripts are printed or in their file."""
    values |= {"utterances": float(len(found)), "hours": speech.hours}
    score = transcribe.score(found) if speech.scored else None
    if score:
        values |= {"cer": score.cer, "wer": score.wer}
    for line in latency.latency_table(values):
        log.info("%s", line)
    if logger:
        logger.log("inference", (), values, console=False)
        logger.close()
    if score:
        print(f"utterances: {len(found)}")
        print(f"hours: {speech.hours:.4f}, at {values['speech_rate']:.1f} hours of speech per hour")
        print(
            f"CER: {score.cer:.2f} % ({score.character_errors} errors in {score.characters} characters of the "
            "transcripts, spaces included; greedy decoding)"
        )
        print(f"WER: {score.wer:.2f} %")
    elif config.transcribe_wav:
        print(found[0].text)
    elif not config.save_predictions:
        for transcript in found:
            print(f"{transcript.id}\t{transcript.text}")


if __name__ == "__main__":
    run_program(main, sys.argv[1:], rank=distributed.launched_rank(), local_rank=distributed.local_rank())
