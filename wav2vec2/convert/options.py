"""Options of fairseq and NVIDIA (which mostly agree) <-> this toolkit's configuration."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common import flags
from common.errors import CheckpointError, ConfigError
from wav2vec2.config import Config, DropoutConfig, MaskConfig, ModelConfig, ObjectiveConfig

# Where an older file does not name an option, its program's default counts, which is another one than ours.
_DEFAULTS = {"quantize_targets": False, "final_dim": 0, "loss_weights": None}
# Options that change what the model computes and that this toolkit does not have: the only values it can take.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu",),
    "layer_type": ("transformer",),
    "quantize_input": (False,),
    "same_quantizer": (False,),
    "target_glu": (False,),
    "quantizer_depth": (1,),
    "pos_conv_depth": (1,),
    "attn_type": ("", None),
    "pos_enc_type": ("abs",),
    "adp_num": (-1, 0, None),
    "crop_seq_to_multiple": (1,),
    "infonce": (True,),
    "rotary_embeddings": (False,),
    "use_spectrogram_features": (False,),
    "autoregressive": (False,),
}
# Options of training alone; another value than these is told, because a run that goes on would differ.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "mask_channel_before": (False,),
    "mask_dropout": (0, None),
    "require_same_masks": (True,),
    "zero_mask": (False,),
    "layer_decay": (1.0,),
}
_RENAMED = {"layerdrop": "encoder_layerdrop"}  # fairseq's fine-tuning
_TUPLES = ("latent_temp", "loss_weights", "adam_betas")
_TAKEN_FROM_OPTIM = ("max_update", "lr", "warmup_updates", "adam_betas", "adam_eps", "weight_decay", "clip_norm")
_SECTIONS: dict[str, tuple[str, ...]] = {
    "model": tuple(ModelConfig.__dataclass_fields__),
    "dropout": tuple(DropoutConfig.__dataclass_fields__),
    "mask": tuple(MaskConfig.__dataclass_fields__),
    "objective": tuple(ObjectiveConfig.__dataclass_fields__),
    "ctc": ("freeze_finetune_updates", "blank_weight", "blank_mode"),
    "optim": _TAKEN_FROM_OPTIM,
}


def to_config(where: str, mode: str, options: Mapping[str, Any]) -> tuple[Config, tuple[str, ...]]:
    """The configuration that options of the original say, and remarks on those that have no counterpart.

    Raises CheckpointError for an architecture that this toolkit does not have, and for values of the wrong kind.
    """
    options = {**_DEFAULTS, **{_RENAMED.get(name, name): value for name, value in options.items()}}
    for name, allowed in _FIXED.items():
        if name in options and options[name] not in allowed:
            raise CheckpointError(
                f"{where}: has {name} {_shown(options[name])}, which this toolkit does not have (only {allowed[0]!r})"
            )
    remarks = tuple(
        f"{name} {_shown(options[name])} has no counterpart in this toolkit"
        for name, usual in _UNUSED.items()
        if name in options and options[name] not in usual
    )
    try:
        values = _values(options)
        sections = {key: {name: values[name] for name in names if name in values} for key, names in _SECTIONS.items()}
        if mode == "finetune" and options.get("apply_mask") is False:
            sections["mask"] |= {"mask_prob": 0.0, "mask_channel_prob": 0.0}
        return flags.from_dict(Config, {"mode": mode, **sections}), remarks
    except (ConfigError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: has options that cannot be used: {error}") from error


def from_config(config: Config) -> dict[str, Any]:
    """Options of the original, those of architecture, regularisation, masks, objective, CTC and optimizer."""
    plain = flags.to_dict(config)
    options = {name: plain[key][name] for key, names in _SECTIONS.items() for name in names}
    options["hourglass_transformer"] = options["hourglass_transformer"] or None
    if not config.model.quantize_targets:
        options["loss_weights"] = options["loss_weights"][1:]  # there is no diversity to weigh
    return options


def _values(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the types of our fields."""
    values = {name: value for name, value in options.items() if value is not None}
    for name in _TUPLES:
        if isinstance(values.get(name), str):
            values[name] = _numbers(name, values[name])
        if name in values:
            values[name] = [float(value) for value in values[name]]
    for name in ("lr", "update_freq"):
        if isinstance(values.get(name), (list, tuple)) and values[name]:
            values[name] = values[name][0]
    values["loss_weights"] = _two_weights(values.get("loss_weights") or [0.0], bool(values["quantize_targets"]))
    if values["final_dim"] == 0:
        values["final_dim"] = values.get("encoder_embed_dim", ModelConfig.encoder_embed_dim)
    return values


def _two_weights(weights: list[float], quantized: bool) -> list[float]:
    """Weights of the diversity and of the feature penalty: one number counts for every term that there is."""
    if len(weights) == 2 and quantized:
        return weights
    if len(weights) == 1:
        return [weights[0] if quantized else 0.0, weights[0]]
    raise ValueError(f"loss_weights {weights}: there are {2 if quantized else 1} terms to weigh")


def _numbers(name: str, text: str) -> list[float]:
    """'(2.0, 0.5)' or '[2.0, 0.5]' as numbers; nothing is evaluated."""
    match = re.fullmatch(r"\s*[\[(]([-+.\deE,\s]{1,200})[\])]\s*", text)
    if match is None:
        raise ValueError(f"{name} {_shown(text)}: is not a list of numbers")
    return [float(part) for part in match[1].split(",") if part.strip()]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
