"""Floating-point operations of a pre-training step, from the sizes of the model: a multiplication with addition is 2.

Counted are products of matrices and convolutions, as the model is written in the paper; a program that saves some of
them, or recomputes some, has the same count. Elementwise work counts nothing.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from wav2vec2.config import ModelConfig


def forward_flops(config: ModelConfig, rows: int, samples: int, masked: int) -> dict[str, int]:
    """Operations of a forward pass by part, for `rows` of `samples` with `masked` masked frames in each.

    `extractor` is without its first block, which stands alone because no gradient of its input is needed; `projection`
    leads from the extractor to the transformer; `quantizer_logits` holds the output projections too.
    """
    blocks, frames = _conv_blocks(config, samples)
    channels, dim = config.conv_layers()[-1][0], config.encoder_embed_dim
    projects = channels != dim or config.feature_projection == "always"
    parts = {
        "first_block": blocks[0],
        "extractor": sum(blocks[1:]),
        "projection": 2 * frames * channels * dim if projects else 0,
        "encoder": _encoder(config, frames),
        "quantizer_logits": _head(config, masked),
    }
    return {name: rows * number for name, number in parts.items()}


def training_flops(config: ModelConfig, rows: int, samples: int, masked: int) -> dict[str, int]:
    """Operations of forward and backward pass by part; the arguments are those of forward_flops().

    Backward makes two products for every one of forward: the gradients of its two factors.
    """
    forward = forward_flops(config, rows, samples, masked)
    first = forward.pop("first_block")
    training = {name: 3 * number for name, number in forward.items()}
    training["extractor"] += 2 * first
    return training


def _conv_blocks(config: ModelConfig, samples: int) -> tuple[list[int], int]:
    """Operations of every block of the extractor for one row, and the frames that come out."""
    blocks, length, inputs = [], samples, 1
    for outputs, kernel, stride in config.conv_layers():
        length = (length - kernel) // stride + 1
        blocks.append(2 * length * outputs * inputs * kernel)
        inputs = outputs
    return blocks, length


def _encoder(config: ModelConfig, frames: int) -> int:
    """Positional convolution, transformer layers, and learned resampling of the Hourglass."""
    dim = config.encoder_embed_dim
    positions = 2 * frames * dim * (dim // config.conv_pos_groups) * config.conv_pos
    hourglass = config.hourglass()
    if hourglass is None:
        return positions + config.encoder_layers * _layer(config, frames)
    before, middle, factor, after = hourglass
    pooled = -(-frames // factor)
    resampling = 2 * (2 * pooled * factor * dim * dim) if config.hourglass_resample == "linear" else 0
    return positions + (before + after) * _layer(config, frames) + middle * _layer(config, pooled) + resampling


def _layer(config: ModelConfig, frames: int) -> int:
    """Four square projections, similarities and weighted sums of the attention, and the feed-forward block."""
    dim = config.encoder_embed_dim
    return 2 * frames * (4 * dim * dim + 2 * frames * dim + 2 * dim * config.encoder_ffn_embed_dim)


def _head(config: ModelConfig, masked: int) -> int:
    """Choice of codes, their vectors as a product, both projections, similarities of all masked frames of a row."""
    channels, codes = config.conv_layers()[-1][0], config.latent_vars
    quantizer = codes * (channels * config.latent_groups + config.target_dim)
    projections = config.final_dim * (config.target_dim + config.encoder_embed_dim)
    return 2 * masked * (quantizer + projections + masked * config.final_dim)
