"""One waveform through the weights of two checkpoints: how far apart are they?"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.data.audio import normalize
from wav2vec2.config import DropoutConfig
from wav2vec2.convert.adam_state import MOMENTS
from wav2vec2.convert.contents import PRETRAINING_HEADS, Contents
from wav2vec2.convert.huggingface_labels import NEVER
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model

TOLERANCE = 1e-5  # of the largest entry: rounding in float32
_SECONDS = 1.5


@torch.no_grad()
def differences(one: Contents, other: Contents) -> dict[str, float]:
    """What -> largest difference as a share of the largest entry, of all that both sides have weights for.

    Computed in float32. Outputs of different shapes are infinitely far apart.
    """
    ours, theirs = _outputs(one), _outputs(other)
    return {name: _distance(ours[name], theirs[name]) for name in ours if name in theirs}


def changed_parts(before: Contents, after: Contents) -> list[str]:
    """What of `before` is not the same in `after`: weights by name, symbols, architecture, training state."""
    parts = [name for name in {**before.weights, **after.weights} if not _equal(before.weights, after.weights, name)]
    average, other = before.averaged or {}, after.averaged or {}
    parts += [f"the average of {name}" for name in average if not _equal(average, other, name)]
    moments, others = before.optimizer or {}, after.optimizer or {}
    parts += [
        f"{moment} of {name}"
        for name in moments
        for moment in MOMENTS
        if not _equal(moments[name], others.get(name, {}), moment)
    ]
    named = {
        "the symbols": (before.labels, after.labels),
        "the conv blocks": (before.config.model.conv_layers(), after.config.model.conv_layers()),
        "the count of updates": (before.step or 0, after.step or 0),
        "the best validation result": (before.best, after.best),
    }
    return parts + [what for what, (old, new) in named.items() if old is not None and old != new]


def _equal(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    if name not in one or name not in other:
        return False
    return torch.equal(one[name].to(other[name].dtype), other[name])


def _outputs(contents: Contents) -> dict[str, Tensor]:
    audio_BS = _waveform(contents)
    weights = {name: tensor.float() for name, tensor in contents.weights.items()}
    if contents.config.mode == "finetune":
        ctc = Wav2Vec2Ctc(contents.config.model, DropoutConfig(), num_symbols=contents.num_symbols)
        ctc.load_state_dict({"w2v.mask_emb": ctc.w2v.mask_emb, **weights})
        trunk: Wav2Vec2Model = ctc.eval().w2v
        encoded = trunk(audio_BS)
        possible = ctc.proj.bias > NEVER / 2  # a made-up row would be the largest entry, and hide the others
        return {"frames": encoded.x, "logits": ctc.proj(encoded.x)[..., possible]}
    model = Wav2Vec2Model(contents.config.model, DropoutConfig())
    has_heads = any(name.startswith(PRETRAINING_HEADS) for name in weights)
    fresh = {name: value for name, value in model.state_dict().items() if name not in weights}
    model.load_state_dict({**fresh, **weights})
    encoded = model.eval()(audio_BS)
    found = {"frames": encoded.x}
    if has_heads:
        targets, quantized = model.quantize(encoded.features_BTC.flatten(0, 1))
        found |= {"predictions": model.final_proj(encoded.x), "targets": targets}
        if quantized is not None:
            found["quantizer"] = quantized.logits_RGV
    return found


def _waveform(contents: Contents) -> Tensor:
    """Noise and a gliding tone, the same for both sides, as the model wants it."""
    rate = contents.config.model.sample_rate
    time_S = torch.arange(int(_SECONDS * rate)) / rate
    noise_S = torch.randn(len(time_S), generator=torch.Generator().manual_seed(0))
    wave_S = 0.3 * torch.sin(2 * math.pi * (200 + 300 * time_S) * time_S) + 0.05 * noise_S
    if contents.config.model.normalize:
        wave_S = torch.from_numpy(normalize(wave_S.numpy()))
    return wave_S[None]


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    largest = max(one.abs().max().item(), other.abs().max().item(), 1e-30)
    distance = (one - other).abs().max().item() / largest
    return distance if math.isfinite(distance) else math.inf
