"""Every option of the rules that watch over a run."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

from common.flags import flag
from wav2vec2.data_config import FINETUNE, PRETRAIN


@dataclass(frozen=True)
class HealthConfig:
    """When a run is sick, and what follows."""

    health: str = flag(
        "stop",
        "when the figures say that training has failed: warn and then end the run, only warn, or do not look",
        choices=("stop", "warn", "off"),
    )
    on_nan: str = flag(
        "stop",
        "when a loss, gradient or weight is not finite: end the run, or go back to the newest checkpoint once and "
        "leave out the update that did it",
        choices=("stop", "rollback"),
    )
    health_grace: int | None = flag(
        None,
        "updates at the start in which no rule looks (default: a quarter of --warmup_updates, or "
        "--freeze_finetune_updates where that is more)",
        minimum=0,
    )
    health_patience: int | None = flag(
        None,
        "updates in a row that the loss may stay at chance, or the output blank; codes and gradients have a quarter "
        "of it (default: 2 % of --max_update, from 2000 to 10000)",
        minimum=0,
    )
    min_code_share: float = flag(
        0.0125,
        "codebook collapse: code_perplexity nearer to one code per group than this share of the way to all codes",
        modes=PRETRAIN,
        minimum=0.0,
        maximum=1.0,
    )
    max_accuracy: float = flag(
        0.95,
        "trivial task: accuracy from here on, with --min_contrastive_loss",
        modes=PRETRAIN,
        minimum=0.0,
        maximum=1.0,
    )
    min_contrastive_loss: float = flag(
        0.1, "trivial task: loss_0 below this many bits, with --max_accuracy", modes=PRETRAIN, minimum=0.0
    )
    chance_margin: float = flag(
        0.001, "no learning: loss_0 within this many bits of log2(1 + negatives)", modes=PRETRAIN, minimum=0.0
    )
    min_grad_norm: float = flag(1e-6, "vanishing gradients: grad_norm below this", minimum=0.0)
    max_grad_norm_ratio: float = flag(
        100.0, "exploding gradients: grad_norm from this multiple of its median on", minimum=1.0
    )
    max_overflows: int = flag(12, "fp16 overflows in a row that end the run; a few are normal", minimum=1)
    max_blank_share: float = flag(
        0.95,
        "blank plateau: blank_share of the validation from here on, with --min_length_ratio",
        modes=FINETUNE,
        minimum=0.0,
        maximum=1.0,
    )
    min_length_ratio: float = flag(
        0.1,
        "blank plateau: length_ratio of the validation below this, with --max_blank_share",
        modes=FINETUNE,
        minimum=0.0,
    )
