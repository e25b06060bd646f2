"""The rules of this toolkit's figures: when pre-training has collapsed, when fine-tuning is stuck, what to do then.

Figures that rules look at and that are not logged as they are:

    code_share          (code_perplexity - G) / (G V - G): 0 with one code per group, 1 with all, for any codebook
    distance_to_chance  |loss_0 - log2(1 + negatives)| in bits
    val_*               of the validation
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.health import SKIPPED, Health, Limit, Rule
from wav2vec2.config import Config

_SMALLER_LR = "a lower --lr (a fifth) and a longer --warmup_updates"
_LARGER_BATCH = "more sub-batches per update (--update_freq)"
_FROM_BEFORE = (
    "going on from the last healthy checkpoint: remove the later ones, then --resume, with one of the changes before"
)


def make_health(config: Config) -> Health:
    """The rules that can judge a run with this configuration."""
    return Health(make_rules(config), config.health.health, config.run.output_dir)


def make_rules(config: Config) -> list[Rule]:
    """The rules with their thresholds, for one mode of training."""
    return [*_gradient_rules(config), *(_pretraining_rules if config.mode == "pretrain" else _ctc_rules)(config)]


def training_figures(config: Config, values: Mapping[str, float]) -> dict[str, float]:
    """What the rules look at in a line of training."""
    figures = dict(values)
    groups, codes = config.model.latent_groups, config.model.latent_vars
    if "code_perplexity" in values and codes > 1:
        figures["code_share"] = (values["code_perplexity"] - groups) / (groups * codes - groups)
    if "loss_0" in values:
        figures["distance_to_chance"] = abs(values["loss_0"] - chance(config))
    return figures


def validation_figures(values: Mapping[str, float]) -> dict[str, float]:
    """What the rules look at in a line of validation."""
    return {f"val_{name}": value for name, value in values.items()}


def chance(config: Config) -> float:
    """The contrastive loss in bits of a model that cannot tell the candidates from each other."""
    objective = config.objective
    negatives = objective.num_negatives + objective.cross_sample_negatives + objective.codebook_negatives
    return math.log2(1 + negatives)


def grace(config: Config) -> int:
    """Updates in which no rule looks: while the learning rate is small or the encoder is frozen nothing is typical."""
    if config.health.health_grace is not None:
        return config.health.health_grace
    frozen = config.ctc.freeze_finetune_updates if config.mode == "finetune" else 0
    return max(config.optim.warmup_updates // 4, frozen)


def patience(config: Config) -> int:
    """Updates that the slow rules wait.

    A sound Base run keeps to chance for the first thousands of its 400,000 updates, a tiny one for a third of its 500,
    so the wait grows with the length of the run, but a short run is never ended by it.
    """
    if config.health.health_patience is not None:
        return config.health.health_patience
    return min(max(config.optim.max_update // 50, 2000), 10000)


def _gradient_rules(config: Config) -> list[Rule]:
    health = config.health
    lasting: dict[str, Any] = {"patience": patience(config) // 4, "grace": grace(config)}
    rules = [
        Rule(
            "vanishing gradients",
            (Limit("grad_norm", "below", health.min_grad_norm, "min_grad_norm"),),
            (
                "--bf16 or fp32 instead of --fp16, where small gradients become 0",
                "a higher --feature_grad_mult, and no --lr or loss weight of 0",
                _FROM_BEFORE,
            ),
            **lasting,
        ),
        Rule(
            "exploding gradients",
            (Limit("grad_norm", "above", health.max_grad_norm_ratio, "max_grad_norm_ratio", relative=True),),
            ("--clip_norm, of the size of the median", _SMALLER_LR, _FROM_BEFORE),
            **lasting,
        ),
    ]
    if config.precision.fp16:
        overflows = Rule(
            "too many fp16 overflows (a few are normal)",
            (Limit(SKIPPED, "above", health.max_overflows, "max_overflows", warned_at=0.5),),
            ("--bf16", _SMALLER_LR, "more --fp32_ops, or --amp", _FROM_BEFORE),
        )
        rules.append(overflows)
    return rules


def _pretraining_rules(config: Config) -> list[Rule]:
    health = config.health
    slow: dict[str, Any] = {"patience": patience(config), "grace": grace(config)}
    quick: dict[str, Any] = {"patience": patience(config) // 4, "grace": grace(config)}
    shown = ("accuracy", "loss_0", "code_perplexity", "prob_perplexity", "temperature")
    diversity = "a larger diversity weight (the first of --loss_weights)"
    return [
        Rule(
            "codebook collapse",
            (Limit("code_share", "below", health.min_code_share, "min_code_share"),),
            (_SMALLER_LR, diversity, _LARGER_BATCH, _FROM_BEFORE),
            shown=shown,
            **quick,
        ),
        Rule(
            "trivial contrastive task: all targets have become alike",
            (
                Limit("accuracy", "above", health.max_accuracy, "max_accuracy"),
                Limit("loss_0", "below", health.min_contrastive_loss, "min_contrastive_loss"),
            ),
            (_SMALLER_LR, diversity, "longer utterances or a shorter --mask_length, for more negatives", _FROM_BEFORE),
            shown=shown,
            **quick,
        ),
        Rule(
            "contrastive loss pinned at chance",
            (Limit("distance_to_chance", "below", health.chance_margin, "chance_margin"),),
            (_SMALLER_LR, _LARGER_BATCH, "a slower fall of --latent_temp", "another --seed"),
            shown=shown,
            **slow,
        ),
    ]


def _ctc_rules(config: Config) -> list[Rule]:
    health = config.health
    return [
        Rule(
            "blank plateau: almost nothing but blanks is written",
            (
                Limit("val_blank_share", "above", health.max_blank_share, "max_blank_share"),
                Limit("val_length_ratio", "below", health.min_length_ratio, "min_length_ratio"),
            ),
            (
                "--w2v_path of a model whose pre-training has worked, and labels that belong to the audio",
                "fewer --freeze_finetune_updates, or more updates behind them",
                "another --lr (3e-5 for large corpora, 1e-4 for small ones) or --seed",
            ),
            shown=("val_loss", "val_wer"),
            patience=patience(config),
            grace=grace(config),
        )
    ]
