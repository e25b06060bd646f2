"""Weights under the names of the original implementation, for tests against its numbers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from wav2vec2.config import DropoutConfig, ModelConfig
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model

RENAMED = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.blocks.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?", r"feature_extractor.blocks.\1.norm."),
    (r"encoder\.pos_conv\.0\.", "encoder.pos_conv."),
    (r"encoder\.(down|up)sample_layer\.", r"encoder.\1sample."),
    (r"^w2v_encoder\.w2v_model\.", "w2v."),
    (r"^w2v_encoder\.proj\.", "proj."),
)


def native(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the toolkit's names, q, k and v stacked."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        found[name] = value.float()
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    return found


def model_config(settings: dict[str, Any], normalize: bool = False) -> ModelConfig:
    """The architecture of a golden model; names of fields are those of the original."""
    renamed = {"hourglass_transformer": settings.get("hourglass_transformer") or ""}
    known = {key: value for key, value in settings.items() if key in ModelConfig.__dataclass_fields__}
    return ModelConfig(**{**known, **renamed, "normalize": normalize})


def load(path: str, settings: dict[str, Any]) -> Wav2Vec2Model | Wav2Vec2Ctc:
    """A golden model in eval mode, its feature_grad_mult as given in the settings."""
    state = native(torch.load(path, weights_only=True)["model"])
    dropout = DropoutConfig(dropout=0, attention_dropout=0, feature_grad_mult=settings.get("feature_grad_mult", 1.0))
    config = model_config(settings)
    if "proj.weight" in state:
        model = Wav2Vec2Ctc(config, dropout, num_symbols=len(state["proj.weight"]))
    else:
        model = Wav2Vec2Model(config, dropout)
    model.load_state_dict(state)
    return model.eval()
