"""One pass over a validation set, shared by train.py and inference.py."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable

import torch

from common.data.collate import Batch, present
from common.labels import Dictionary
from common.metrics import Metrics
from common.sharding import in_step
from wav2vec2 import decoding
from wav2vec2.logging import REDUCTIONS, summarize
from wav2vec2.task import FinetuneTask, PretrainTask


@torch.no_grad()
def evaluate(
    task: PretrainTask | FinetuneTask, batches: Iterable[Batch], device: torch.device, dictionary: Dictionary | None
) -> dict[str, float]:
    """Logged values over all batches of all ranks; every rank must call it, also with no batches of its own.

    Pre-training: the losses with masks, negatives and arg-max codes that are the same in every validation.
    Fine-tuning: the CTC loss and, by greedy decoding, the error rates.
    """
    metrics = Metrics(REDUCTIONS)
    training = task.training
    task.eval()
    count = torch.ones((), device=device)
    for batch, counts in in_step(task, batches):
        moved = batch.to(device)
        if isinstance(task, PretrainTask):
            _, stats = task(moved, count)
        else:
            _, stats, logits_BTK = task.losses(moved)
            ids, blanks = decoding.greedy(logits_BTK, batch.frame_lengths)
            stats |= {"blank_frames": float(blanks), **score(batch, ids, present(dictionary))}
        if counts:
            metrics.add(stats)
    task.train(training)
    sums = metrics.reduce(device)
    return summarize(
        {"ntokens": 0.0, "nsentences": 0.0, "nframes": 0.0, "loss": 0.0, "correct": 0.0} | sums, _mode(task)
    )


def score(batch: Batch, ids: list[list[int]], dictionary: Dictionary) -> dict[str, float]:
    """Letter and word errors of one batch, and how many letters were written."""
    labels = [
        row[:length]
        for row, length in zip(present(batch.labels_BL).tolist(), present(batch.label_lengths), strict=True)
    ]
    c_errors, c_total = decoding.symbol_errors(labels, ids)
    references, hypotheses = ([dictionary.decode(row) for row in rows] for rows in (labels, ids))
    w_errors, w_total = decoding.word_errors(references, hypotheses)
    return {
        "c_errors": float(c_errors),
        "c_total": float(c_total),
        "w_errors": float(w_errors),
        "w_total": float(w_total),
        "emitted": float(sum(map(len, ids))),
    }


def _mode(task: PretrainTask | FinetuneTask) -> str:
    return "pretrain" if isinstance(task, PretrainTask) else "finetune"
