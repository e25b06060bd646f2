"""Names of weights: this toolkit's against those of fairseq and NVIDIA (which agree) and of Hugging Face.

One table per program, read in both directions. This toolkit stacks the projections of queries, keys and values into
one matrix; the others keep three.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError
from wav2vec2.config import ModelConfig
from wav2vec2.convert.contents import listed

# Weight norm as torch's newer parametrization spells it: the length, and the direction.
_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@dataclass(frozen=True)
class NameTable:
    """How another program spells this toolkit's names: rules (pattern, replacement), of which every match counts."""

    rules: tuple[tuple[str, str], ...]

    def foreign(self, name: str) -> list[str]:
        """The other program's name; three of them (q, k, v) for a stacked matrix."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        if "qkv_proj" in name:
            return [name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"]
        return [name]

    def to_foreign(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the other program's names, each with memory of its own."""
        found = {}
        for name, tensor in weights.items():
            names = self.foreign(name)
            for part, piece in zip(names, tensor.chunk(len(names)), strict=True):
                found[part] = piece.detach().clone()
        return found

    def to_native(self, where: str, found: Mapping[str, Tensor], native_names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by this toolkit's names, of those of `native_names` that are there.

        Raises CheckpointError that lists the keys without a place, and stacks of which a part is missing.
        """
        left = {_one_spelling(name): tensor for name, tensor in found.items()}
        weights = {}
        twice = [name for name in found if _one_spelling(name) != name and _one_spelling(name) in found]
        broken = [f"{name} is there in another spelling too" for name in twice]
        for name in native_names:
            names = self.foreign(name)
            absent = [part for part in names if part not in left]
            parts = [left.pop(part) for part in names if part in left]
            if len({part.shape for part in parts}) > 1 or (len(parts) > 1 and not parts[0].ndim):
                broken.append(f"shapes that do not go together: {', '.join(names)}")
            elif len(parts) == len(names):
                weights[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
            elif parts:
                broken += [f"{part} is missing" for part in absent]
        broken += [f"{name} has no place" for name in left]
        if broken:
            raise CheckpointError(f"{where}: has not the weights of its architecture: {listed(broken)}")
        return weights


def _one_spelling(name: str) -> str:
    for long, short in _WEIGHT_NORM.items():
        name = name.replace(long, short)
    return name


def original_names(model: ModelConfig) -> NameTable:
    """The names of fairseq and NVIDIA."""
    norm = "2.1" if model.extractor_mode == "layer_norm" else "2"
    return NameTable(
        (
            (r"feature_extractor\.blocks\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
            (r"feature_extractor\.blocks\.(\d+)\.norm\.", rf"feature_extractor.conv_layers.\1.{norm}."),
            (r"encoder\.pos_conv\.", "encoder.pos_conv.0."),
            (r"encoder\.(down|up)sample\.", r"encoder.\1sample_layer."),
            (r"^w2v\.", "w2v_encoder.w2v_model."),
            (r"^proj\.", "w2v_encoder.proj."),
        )
    )


def huggingface_names() -> NameTable:
    """The names of transformers: Wav2Vec2ForPreTraining, Wav2Vec2ForCTC, and the trunk inside them."""
    return NameTable(
        (
            (r"^(w2v\.|(?=feature_extractor|layer_norm|post_extract_proj|mask_emb|encoder))", "wav2vec2."),
            (r"feature_extractor\.blocks\.(\d+)\.norm\.", r"feature_extractor.conv_layers.\1.layer_norm."),
            (r"feature_extractor\.blocks\.", "feature_extractor.conv_layers."),
            (r"^wav2vec2\.layer_norm\.", "wav2vec2.feature_projection.layer_norm."),
            (r"\.post_extract_proj\.", ".feature_projection.projection."),
            (r"\.mask_emb$", ".masked_spec_embed"),
            (r"\.encoder\.pos_conv\.", ".encoder.pos_conv_embed.conv."),
            (r"\.self_attn_layer_norm\.", ".layer_norm."),
            (r"\.self_attn\.", ".attention."),
            (r"\.fc1\.", ".feed_forward.intermediate_dense."),
            (r"\.fc2\.", ".feed_forward.output_dense."),
            (r"^quantizer\.vars$", "quantizer.codevectors"),
            (r"^final_proj\.", "project_hid."),
            (r"^proj\.", "lm_head."),
        )
    )


# The order of parameters in the original's modules, which is that of its optimizer state.
_ORIGINAL_ORDER = (
    *("mask_emb", "feature_extractor.", "post_extract_proj.", "quantizer.vars", "quantizer.", "project_q."),
    *("encoder.pos_conv.0.bias", "encoder.pos_conv.0.weight_g", "encoder.pos_conv."),
    *("encoder.layers.", "encoder.hourglass_layers.", "encoder.post_layers."),
    *("encoder.upsample_layer.", "encoder.downsample_layer.", "encoder.layer_norm.", "layer_norm.", "final_proj."),
)
_LAYER_ORDER = ("self_attn.k_", "self_attn.v_", "self_attn.q_", "self_attn.out_", "self_attn_layer_norm", "fc1", "fc2")


def original_order(names: Iterable[str]) -> list[str]:
    """Original names in the order in which the original's modules hold them."""

    def place(name: str) -> tuple[Any, ...]:
        trunk = name.removeprefix("w2v_encoder.w2v_model.")
        head = trunk.startswith("w2v_encoder.")
        rank = next((i for i, start in enumerate(_ORIGINAL_ORDER) if trunk.startswith(start)), len(_ORIGINAL_ORDER))
        number = re.search(r"layers\.(\d+)\.", trunk)
        part = next((i for i, start in enumerate(_LAYER_ORDER) if f".{start}" in trunk), len(_LAYER_ORDER))
        layer = (int(number[1]), part if "encoder." in trunk else 0) if number else (0, 0)
        module, _, kind = trunk.rpartition(".")
        return head, rank, *layer, module, kind == "bias"

    return sorted(names, key=place)


def optimizer_groups(names: Iterable[str], *, stacked: bool = False) -> list[list[str]]:
    """Original names in the order of the optimizer, q, k and v in one group where they are one parameter there.

    The stacked matrix stands where the first of the three would stand, its biases behind it.
    """
    groups: dict[str, list[str]] = {}
    for name in original_order(names):
        match = re.search(r"self_attn\.[qkv]_proj\.", name) if stacked else None
        if match is None:
            groups[name] = [name]
            continue
        start = name[: match.start()]
        for kind in ("weight", "bias"):
            groups[f"{start}{kind}"] = [f"{start}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
    return list(groups.values())
