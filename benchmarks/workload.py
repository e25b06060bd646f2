"""What a step benchmark runs: model sizes, the settings of the recipe, and a batch of synthetic audio."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from common import rng
from common.data.collate import Batch, Collator, present
from common.data.dataset import Sample
from common.data.masking import SpanMasking
from common.data.sampler import PlannedSubBatch
from common.errors import ConfigError
from wav2vec2.config import (
    Config,
    DropoutConfig,
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
)
from wav2vec2.criterion import sample_negatives
from wav2vec2.model import num_frames

SIZES = {
    "tiny": ModelConfig(
        conv_feature_layers="[(16,10,5)]+[(16,3,2)]*4+[(16,2,2)]*2",
        encoder_layers=2,
        encoder_embed_dim=24,
        encoder_ffn_embed_dim=48,
        encoder_attention_heads=4,
        conv_pos=8,
        conv_pos_groups=4,
        final_dim=12,
        latent_vars=10,
    ),
    "small": ModelConfig(
        conv_feature_layers="[(128,10,5)]+[(128,3,2)]*4+[(128,2,2)]*2",
        encoder_layers=4,
        encoder_embed_dim=256,
        encoder_ffn_embed_dim=1024,
        encoder_attention_heads=4,
        final_dim=128,
    ),
    "base": ModelConfig(),
    "large": ModelConfig(
        extractor_mode="layer_norm",
        conv_bias=True,
        encoder_layers=24,
        encoder_embed_dim=1024,
        encoder_ffn_embed_dim=4096,
        encoder_attention_heads=16,
        layer_norm_first=True,
        final_dim=768,
        normalize=True,
    ),
}
PRECISIONS = ("fp32", "bf16", "fp16")
SEED = 1


def make_recipe(size: str, hourglass: str = "", precision: str = "fp32") -> Config:
    """The recipe of pre-training at one of SIZES.

    Left out of the recipe is what other implementations do not do alike: LayerDrop and clipping. Raises ConfigError
    for an Hourglass that cannot be built.
    """
    if hourglass and SIZES[size].layer_norm_first:
        raise ConfigError(
            f"--hourglass {hourglass}: needs a post-LN transformer, and --size {size} is pre-LN; choose another size"
        )
    return Config(
        mode="pretrain",
        model=replace(SIZES[size], hourglass_transformer=hourglass),
        dropout=DropoutConfig(
            dropout=0.1,
            attention_dropout=0.1,
            dropout_input=0.1,
            dropout_features=0.1,
            feature_grad_mult=0.1,
        ),
        mask=MaskConfig(mask_prob=0.65, mask_length=10),
        objective=ObjectiveConfig(num_negatives=100, loss_weights=(0.1, 10.0)),
        optim=OptimConfig(lr=0.0005, weight_decay=0.01),
        precision=make_precision(precision),
        run=RunConfig(seed=SEED),
    )


def make_precision(name: str) -> PrecisionConfig:
    """One of PRECISIONS; half precision is O2."""
    return PrecisionConfig(fp16=name == "fp16", bf16=name == "bf16")


@dataclass(frozen=True, eq=False)
class SyntheticBatch(Batch):
    """A batch for every implementation: one sub-batch, with negatives for those that do not draw them in their step.

    `negatives_BTN`: for every masked frame the places row * T + t of its negatives, which are other masked frames of
    its row; row * T for frames that are not masked.
    """

    negatives_BTN: Tensor | None = None


@dataclass(frozen=True)
class Workload:
    """What every implementation is built from, and measured on.

    `recipe`: the options of the toolkit by section, see docs/parameters.md; `rows` utterances of `samples` each;
    `checkout`: the folder of another implementation, for its runner.
    """

    recipe: Config
    device: torch.device
    rows: int
    samples: int
    checkout: Path | None = None

    def batch(self) -> SyntheticBatch:
        """The batch, on the device: noise, and masks of the toolkit's own, equally many frames in every row."""
        recipe = self.recipe
        noise = rng.numpy_rng(recipe.run.seed, "audio")
        audio = [noise.normal(0, 0.1, self.samples).astype("float32") for _ in range(self.rows)]
        collate = Collator(
            num_frames=partial(num_frames, conv_layers=recipe.model.conv_layers()),
            seed=recipe.run.seed,
            time_mask=SpanMasking(**recipe.mask.of_time()),
        )
        samples = [Sample(id=str(row), audio_S=audio_S, text=None, labels=None) for row, audio_S in enumerate(audio)]
        batch = collate([PlannedSubBatch(epoch_pass=1, sub_batch=0, index=0)], [samples])
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        made = SyntheticBatch(**values, negatives_BTN=draw_negatives(batch, recipe.objective, recipe.run.seed))
        return cast(SyntheticBatch, made.to(self.device))


def draw_negatives(batch: Batch, objective: ObjectiveConfig, seed: int) -> Tensor:
    """Negatives [B, T, N] of a batch of one sub-batch, as SyntheticBatch has them."""
    mask_BT, rows = present(batch.mask_BT), batch.num_rows
    frames, masked = mask_BT.shape[1], batch.sub_batches[0].masked
    drawn = sample_negatives(
        objective,
        torch.arange(masked).expand(rows, masked),
        torch.full((rows,), masked),
        masked,
        rng.torch_rng("cpu", seed, "negatives"),
    )
    places_BM = present(batch.masked_R).view(rows, masked)
    negatives_BTN = (torch.arange(rows) * frames)[:, None, None].repeat(1, frames, objective.num_negatives)
    negatives_BTN[mask_BT] = places_BM.gather(1, drawn.frames_bMN.flatten(1)).view(rows * masked, -1)
    return negatives_BTN
