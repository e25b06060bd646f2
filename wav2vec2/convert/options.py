"""Options of fairseq and NVIDIA (which mostly agree) <-> this toolkit's configuration."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common import flags
from common.errors import CheckpointError, ConfigError, one_line, shown
from common.schedules import all_settings
from wav2vec2.config import Config, DropoutConfig, MaskConfig, ModelConfig, ObjectiveConfig, OptimConfig

# Where a file does not name an option, its program's default counts, which is another one than ours.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {"quantize_targets": False, "final_dim": 0, "loss_weights": None},
    "finetune": {
        **{"quantize_targets": False, "final_dim": 0, "dropout": 0.0, "attention_dropout": 0.0},
        **{"feature_grad_mult": 0.0, "mask_prob": 0.5, "apply_mask": False},
    },
}
# Options that change what the model computes and that this toolkit does not have: the only values it can take.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu",),
    "layer_type": ("transformer",),
    "pos_conv_depth": (1,),
    "conv_pos_batch_norm": (False,),
    "attn_type": ("", None),
    "pos_enc_type": ("abs",),
    "adp_num": (-1, 0, None),
    "crop_seq_to_multiple": (1,),
    "rotary_embeddings": (False,),
    "use_spectrogram_features": (False,),
    "autoregressive": (False,),
}
_FIXED_IN_PRETRAINING: dict[str, tuple[Any, ...]] = {
    "quantize_input": (False,),
    "same_quantizer": (False,),
    "target_glu": (False,),
    "quantizer_depth": (1,),
    "infonce": (True,),
}
# Options of training alone; another value than these is told, because a run that goes on would differ.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "mask_channel_before": (False,),
    "mask_dropout": (0, None),
    "require_same_masks": (True,),
    "zero_mask": (False,),
    "layer_decay": (1.0,),
    "freeze_regex": (None,),
    "precompute_mask_config": (None,),
}
_RENAMED = {"layerdrop": "encoder_layerdrop"}  # fairseq's fine-tuning
_TUPLES = ("latent_temp", "loss_weights", "adam_betas", "phase_ratio")
# What the model is, and how it was regularised: must be understood.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "model": tuple(ModelConfig.__dataclass_fields__),
    "dropout": tuple(DropoutConfig.__dataclass_fields__),
    "mask": tuple(MaskConfig.__dataclass_fields__),
    "objective": tuple(ObjectiveConfig.__dataclass_fields__),
    "ctc": ("freeze_finetune_updates", "blank_weight", "blank_mode"),
}
_CURVE = (
    *("lr_policy", "warmup_updates", "hold_updates", "initial_lr_scale", "final_lr_scale"),
    *("lr_poly_power", "lr_exp_decay"),
)
# How the run went: taken where it can be.
_OF_THE_RUN: dict[str, tuple[str, ...]] = {
    "optim": (
        *("max_update", "lr", *_CURVE),
        *("adam_betas", "adam_eps", "weight_decay", "clip_norm", "ema"),
    ),
    "data": (
        *("max_tokens", "max_tokens_valid", "required_batch_size_multiple", "num_concat_batches", "update_freq"),
        *("max_sample_size", "min_sample_size", "enable_padding"),
    ),
    "precision": ("fp16", "bf16", "amp"),
}


def to_config(where: str, mode: str, options: Mapping[str, Any]) -> tuple[Config, tuple[str, ...]]:
    """The configuration that options of the original say, and remarks on those that have no counterpart.

    Raises CheckpointError for an architecture that this toolkit does not have, and for values of the wrong kind.
    """
    given = {_RENAMED.get(name, name): value for name, value in options.items()}
    options = {**_DEFAULTS[mode], **{name: value for name, value in given.items() if value is not None}}
    for name, allowed in (_FIXED | (_FIXED_IN_PRETRAINING if mode == "pretrain" else {})).items():
        if name in options and options[name] not in allowed:
            raise CheckpointError(
                f"{where}: has {name} {shown(options[name])}, which this toolkit does not have (only {allowed[0]!r})"
            )
    remarks = [
        f"{name} {shown(options[name])} has no counterpart in this toolkit"
        for name, usual in _UNUSED.items()
        if name in options and options[name] not in usual
    ]
    try:
        values = _values(options, mode)
        sections = {key: {name: values[name] for name in names if name in values} for key, names in _SECTIONS.items()}
        flags.from_dict(Config, {"mode": mode, **sections})
        for key, names in _OF_THE_RUN.items():
            sections[key] = {name: values[name] for name in names if name in values and _usable(key, name, values)}
            unusable = [name for name in names if name in values and name not in sections[key]]
            remarks += [f"{name} {shown(values[name])} has no counterpart in this toolkit" for name in unusable]
        config = flags.from_dict(Config, {"mode": mode, **sections})
    except (ConfigError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: has options that cannot be used: {one_line(error)}") from error
    try:
        schedule(config)
    except ConfigError as error:
        remarks.append(f"its learning rate has no counterpart in this toolkit ({error})")
        config = replace(config, optim=replace(config.optim, **{name: getattr(OptimConfig, name) for name in _CURVE}))
    return config, tuple(remarks)


def schedule(config: Config) -> dict[str, Any]:
    """All settings of the learning rate. Raises ConfigError where they do not fit together."""
    return all_settings(**config.optim.schedule(config.model.encoder_embed_dim))


def from_config(config: Config) -> dict[str, Any]:
    """The options of the original that this toolkit has, too."""
    plain = flags.to_dict(config)
    options = {name: plain[key][name] for key, names in (_SECTIONS | _OF_THE_RUN).items() for name in names}
    options["hourglass_transformer"] = options["hourglass_transformer"] or None
    masks = config.mask.mask_prob > 0 or config.mask.mask_channel_prob > 0
    options["apply_mask"] = config.mode == "finetune" and masks  # pre-training masks in any case
    if config.precision.amp:
        options |= {"fp16": False, "bf16": False}
    if not config.model.quantize_targets:
        options["loss_weights"] = options["loss_weights"][1:]  # there is no diversity to weigh
    return options


def _values(options: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The options in the types of our fields."""
    values = dict(options)
    for name in _TUPLES:
        if isinstance(values.get(name), str):
            values[name] = numbers(name, values[name])
        if values.get(name) is not None:
            values[name] = [float(value) for value in values[name]]
    for name in ("lr", "update_freq"):
        if isinstance(values.get(name), (list, tuple)) and values[name]:
            values[name] = values[name][0]
    if mode == "pretrain":
        values["loss_weights"] = _two_weights(values.get("loss_weights") or [0.0], bool(values["quantize_targets"]))
    else:
        values.pop("loss_weights", None)  # those of pre-training are of no more use and need not fit
        if not values["apply_mask"]:
            values |= {"mask_prob": 0.0, "mask_channel_prob": 0.0}
    if values.get("amp") and not values.get("bf16"):
        values["fp16"] = True  # there autocast is an option beside fp16, here it is a kind of it
    for policy, name in (("poly", "lr_poly_power"), ("exp", "lr_exp_decay")):
        if values.get("lr_policy", "poly") != policy:
            values.pop(name, None)  # there, but of no effect
    if values["final_dim"] == 0:
        values["final_dim"] = values.get("encoder_embed_dim", ModelConfig.encoder_embed_dim)
    return values


def _usable(key: str, name: str, values: Mapping[str, Any]) -> bool:
    try:
        flags.from_dict(Config, {"mode": "pretrain", key: {name: values[name]}})
    except ConfigError:
        return False
    return True


def _two_weights(weights: list[float], quantized: bool) -> list[float]:
    """Weights of the diversity and of the feature penalty: one number counts for every term that there is."""
    if len(weights) == 2 and quantized:
        return weights
    if len(weights) == 1:
        return [weights[0] if quantized else 0.0, weights[0]]
    raise ValueError(f"loss_weights {shown(weights)}: there are {2 if quantized else 1} terms to weigh")


def numbers(name: str, text: str) -> list[float]:
    """'(2.0, 0.5)' or '[2.0, 0.5]' as numbers; nothing is evaluated. Raises ValueError."""
    match = re.fullmatch(r"\s*[\[(]([-+.0-9eE,\s]{1,200})[\])]\s*", text)
    if match is None:
        raise ValueError(f"{name} {shown(text)}: is not a list of numbers")
    return [float(part) for part in match[1].split(",") if part.strip()]
