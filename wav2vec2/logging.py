"""Every number that a run logs: its unit, its format, and what it means."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping

from common.logger import MetricInfo
from common.metrics import Reduction

METRICS: dict[str, MetricInfo] = {
    "eta": MetricInfo("s", "duration", "time left to the last update, at the speed of this interval"),
    "loss": MetricInfo("bits", ".3f", "total loss per masked frame (pre-training) or per sentence (fine-tuning)"),
    "loss_0": MetricInfo("bits", ".3f", "contrastive loss per masked frame; log2(1 + negatives) is chance"),
    "loss_1": MetricInfo("bits", ".3f", "weighted diversity term per masked frame"),
    "loss_2": MetricInfo("bits", ".3f", "weighted feature penalty per masked frame"),
    "nll_loss": MetricInfo("bits", ".3f", "CTC loss per letter"),
    "accuracy": MetricInfo(
        "", ".4f", "share of masked frames whose target is ranked first; 1 / (1 + negatives) is chance"
    ),
    "code_perplexity": MetricInfo("codes", ".1f", "codes in use: perplexity of the chosen codes, summed over groups"),
    "prob_perplexity": MetricInfo("codes", ".1f", "perplexity of the mean code probabilities, summed over groups"),
    "temperature": MetricInfo("", ".3f", "temperature of the Gumbel softmax"),
    "uer": MetricInfo("%", ".2f", "unit (letter) error rate, greedy decoding"),
    "wer": MetricInfo("%", ".2f", "word error rate, greedy decoding"),
    "blank_share": MetricInfo("", ".3f", "share of frames whose best symbol is the blank"),
    "length_ratio": MetricInfo("", ".3f", "letters written per letter of the reference, greedy decoding"),
    "lr": MetricInfo("", ".3e", "learning rate"),
    "grad_norm": MetricInfo("", ".3f", "norm of the gradient before clipping, mean over updates"),
    "loss_scale": MetricInfo("", "g", "loss scale of fp16"),
    "skipped": MetricInfo("updates", ".0f", "updates skipped since the start because fp16 overflowed"),
    "ntokens": MetricInfo("", ".0f", "predicted (masked) frames or target letters per update"),
    "ntokens/s": MetricInfo("1/s", ".0f", "predicted (masked) frames or target letters per second"),
    "frames/s": MetricInfo("1/s", ".0f", "frames of speech per second"),
    "speech_rate": MetricInfo("h/h", ".1f", "hours of speech per hour"),
    "data_wait": MetricInfo("%", ".1f", "share of the time spent waiting for data"),
    "took": MetricInfo("s", ".2f", "seconds since the last line"),
}

LATENCY_PERCENTILES = (90, 95, 99)
LATENCY_STAGES = {
    "data": "until it is on the device",
    "model": "from there to its log-probabilities",
    "data+model": "both together",
}
INFERENCE_METRICS: dict[str, MetricInfo] = {
    "utterances": MetricInfo("", ".0f", "utterances transcribed"),
    "hours": MetricInfo("h", ".4f", "their audio"),
    "speech_rate": MetricInfo("h/h", ".1f", "hours of speech per hour in the timed passes, decoding included"),
    "cer": MetricInfo("%", ".2f", "character error rate of the texts, spaces included, greedy decoding", "MINIMIZE"),
    "wer": MetricInfo("%", ".2f", "word error rate, greedy decoding", "MINIMIZE"),
} | {
    f"latency_{stage}_{name}": MetricInfo(
        "ms", ".2f", f"time of a batch {what}: {'average' if name == 'avg' else f'{name} % are below'}", "MINIMIZE"
    )
    for stage, what in LATENCY_STAGES.items()
    for name in ("avg", *LATENCY_PERCENTILES)
}

# What a task adds per micro-batch; every one is a sum over sub-batches.
SUMS: tuple[str, ...] = (
    *("loss", "loss_0", "loss_1", "loss_2", "correct", "prob_perplexity", "code_perplexity"),
    *("ntokens", "nsentences", "nframes", "nsamples"),
    *("c_errors", "c_total", "w_errors", "w_total", "emitted", "blank_frames"),
)
REDUCTIONS: dict[str, Reduction] = {
    **dict.fromkeys(SUMS, "sum"),
    "grad_norm": "mean",
    "weight_norm": "mean",
    "data_wait": "max",
    "since_save": "max",
}


def summarize(sums: Mapping[str, float], mode: str) -> dict[str, float]:
    """The logged values of summed statistics: ratios of sums, losses in bits.

    Pre-training divides by masked frames; fine-tuning by sentences (loss), letters (nll_loss) or frames (blank_share).
    """
    tokens = sums["ntokens"] or math.nan  # of nothing there is no mean
    if mode == "finetune":
        values = {
            "loss": sums["loss"] / (sums["nsentences"] or math.nan) / math.log(2),
            "nll_loss": sums["loss"] / tokens / math.log(2),
        }
        if "c_errors" in sums:
            values["uer"] = 100 * sums["c_errors"] / max(sums["c_total"], 1.0)
            values["wer"] = 100 * sums["w_errors"] / max(sums["w_total"], 1.0)
            values["blank_share"] = sums["blank_frames"] / max(sums["nframes"], 1.0)
        if "emitted" in sums:
            values["length_ratio"] = sums["emitted"] / max(sums["c_total"], 1.0)
        return values
    values = {name: sums[name] / tokens / math.log(2) for name in SUMS[:4] if name in sums}
    values["accuracy"] = sums["correct"] / tokens
    return values | {name: sums[name] / tokens for name in ("code_perplexity", "prob_perplexity") if name in sums}


def throughput(sums: Mapping[str, float], *, updates: int, seconds: float, sample_rate: int) -> dict[str, float]:
    """Speed over an interval, in both units."""
    return {
        "ntokens": sums["ntokens"] / max(updates, 1),
        "ntokens/s": sums["ntokens"] / seconds,
        "frames/s": sums["nframes"] / seconds,
        "speech_rate": sums["nsamples"] / sample_rate / seconds,
        "took": seconds,
    }
