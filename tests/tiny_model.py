"""Tiny models and batches for tests; nothing but torch is needed."""

from __future__ import annotations

from dataclasses import replace

import torch

from common.data.collate import Batch, SubBatch
from wav2vec2.config import DropoutConfig, ModelConfig

MODEL = ModelConfig(
    conv_feature_layers="[(16,10,5)]+[(16,3,2)]*4+[(16,2,2)]*2",
    encoder_layers=2,
    encoder_embed_dim=24,
    encoder_ffn_embed_dim=48,
    encoder_attention_heads=4,
    conv_pos=8,
    conv_pos_groups=4,
    final_dim=12,
    latent_vars=10,
    latent_groups=2,
)
HOURGLASS = replace(MODEL, hourglass_transformer="[1,(1,3),1]")
LARGE = replace(MODEL, extractor_mode="layer_norm", layer_norm_first=True, conv_bias=True, normalize=True)
NO_DROPOUT = DropoutConfig(dropout=0.0, attention_dropout=0.0)


def batch(model: torch.nn.Module, sizes: list[list[int]], mask_every: int = 3, seed: int = 0) -> Batch:
    """A batch of sub-batches with rows of the given samples; every so many frames are masked."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [size for part in sizes for size in part]
    audio = torch.zeros(len(lengths), max(lengths))
    for row, size in zip(audio, lengths, strict=True):
        row[:size] = torch.randn(size, generator=generator) * 0.1
    frames = model.num_frames(max(lengths))
    mask = torch.zeros(len(lengths), frames, dtype=torch.bool)
    subs, first = [], 0
    for index, part in enumerate(sizes):
        least = min(model.num_frames(size) for size in part)
        mask[first : first + len(part), :least:mask_every] = True
        masked = int(mask[first].sum())
        subs.append(SubBatch(len(part), max(part), masked, index, model.num_frames(max(part))))
        first += len(part)
    return Batch(
        ids=tuple(map(str, range(len(lengths)))),
        audio_BS=audio,
        lengths_B=torch.tensor(lengths),
        padded=len(set(lengths)) > 1,
        sub_batches=tuple(subs),
        num_samples=sum(lengths),
        frame_lengths=tuple(model.num_frames(size) for size in lengths),
        mask_BT=mask,
        masked_R=mask.flatten().nonzero().flatten(),
    )
