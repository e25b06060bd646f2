"""Options of Hugging Face transformers (config.json, preprocessor_config.json) <-> this toolkit's configuration."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from common import flags
from common.errors import CheckpointError, ConfigError, one_line, shown
from wav2vec2.config import Config, ObjectiveConfig

# transformers' name: our section and name, and what transformers takes where a file does not say.
_OPTIONS: dict[str, tuple[str, str, Any]] = {
    "conv_bias": ("model", "conv_bias", False),
    "num_hidden_layers": ("model", "encoder_layers", 12),
    "hidden_size": ("model", "encoder_embed_dim", 768),
    "intermediate_size": ("model", "encoder_ffn_embed_dim", 3072),
    "num_attention_heads": ("model", "encoder_attention_heads", 12),
    "do_stable_layer_norm": ("model", "layer_norm_first", False),
    "num_conv_pos_embeddings": ("model", "conv_pos", 128),
    "num_conv_pos_embedding_groups": ("model", "conv_pos_groups", 16),
    "num_codevectors_per_group": ("model", "latent_vars", 320),
    "num_codevector_groups": ("model", "latent_groups", 2),
    "codevector_dim": ("model", "latent_dim", 256),
    "proj_codevector_dim": ("model", "final_dim", 256),
    "hidden_dropout": ("dropout", "dropout", 0.1),
    "attention_dropout": ("dropout", "attention_dropout", 0.1),
    "activation_dropout": ("dropout", "activation_dropout", 0.1),
    "layerdrop": ("dropout", "encoder_layerdrop", 0.1),
    "feat_proj_dropout": ("dropout", "dropout_input", 0.0),
    "feat_quantizer_dropout": ("dropout", "dropout_features", 0.0),
    "final_dropout": ("dropout", "final_dropout", 0.1),
    "mask_time_prob": ("mask", "mask_prob", 0.05),
    "mask_time_length": ("mask", "mask_length", 10),
    "mask_feature_prob": ("mask", "mask_channel_prob", 0.0),
    "mask_feature_length": ("mask", "mask_channel_length", 10),
    "num_negatives": ("objective", "num_negatives", 100),
    "contrastive_logits_temperature": ("objective", "logit_temp", 0.1),
}
_NORMS = {"group": "default", "layer": "layer_norm"}
_CONV = {"conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
_DIVERSITY = "diversity_loss_weight"
_DIVERSITY_DEFAULT = 0.1
# What this toolkit cannot do otherwise, and writes.
_FIXED: dict[str, Any] = {
    "model_type": "wav2vec2",
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "add_adapter": False,
    "adapter_attn_dim": None,
    "quantization_config": None,
}
# Options of training alone; another value than ours is told, because a run that goes on would differ.
_UNUSED = {"mask_time_min_masks": 2, "mask_feature_min_masks": 0}
_AUDIO = {"do_normalize": True, "sampling_rate": 16000}
_LARGEST = 1 << 20  # of a width, kernel or number: more is a mistake, and would overflow sizes


def to_config(
    where: str, mode: str, options: Mapping[str, Any], audio: Mapping[str, Any]
) -> tuple[Config, tuple[str, ...]]:
    """The configuration that the tables of config.json and of the feature extractor say, and remarks.

    Features are always projected. Raises CheckpointError for an architecture that this toolkit does not have, and
    for values of the wrong kind.
    """
    for name, ours in _FIXED.items():
        if options.get(name, ours) != ours:
            raise CheckpointError(
                f"{where}: has {name} {shown(options[name])}, which this toolkit does not have (only {ours!r})"
            )
    values: dict[str, dict[str, Any]] = {"model": {}, "dropout": {}, "mask": {}, "objective": {}}
    for name, (section, ours, default) in _OPTIONS.items():
        values[section][ours] = options.get(name, default)
    model = values["model"]
    too_large = [name for name, (_, ours, _) in _OPTIONS.items() if _is_above(model.get(ours), _LARGEST)]
    if too_large:
        raise CheckpointError(f"{where}: {', '.join(too_large)}: above {_LARGEST}, which no model is; use another file")
    if model["latent_dim"] == model["final_dim"]:
        model["latent_dim"] = 0
    layers = _conv_layers(where, options)
    model["conv_feature_layers"] = _spelled(layers)
    same_width = bool(layers) and layers[-1][0] == model["encoder_embed_dim"]
    model["feature_projection"] = "always" if same_width else "needed"  # it is always there
    norm = options.get("feat_extract_norm", "group")
    if norm not in list(_NORMS):
        raise CheckpointError(f"{where}: has feat_extract_norm {shown(norm)}; this toolkit has {', '.join(_NORMS)}")
    model["extractor_mode"] = _NORMS[norm]
    model["normalize"], model["sample_rate"] = (audio.get(name, default) for name, default in _AUDIO.items())
    if options.get("apply_spec_augment", True) is False:
        values["mask"] |= {"mask_prob": 0.0, "mask_channel_prob": 0.0}
    weights = [options.get(_DIVERSITY, _DIVERSITY_DEFAULT), ObjectiveConfig.loss_weights[1]]
    values["objective"]["loss_weights"] = weights
    try:
        config = flags.from_dict(Config, {"mode": mode, **values})
    except (ConfigError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: has options that cannot be used: {one_line(error)}") from error
    return config, (*_told(options), *_assumed(audio))


def from_config(config: Config, *, has_mask_embedding: bool) -> dict[str, Any]:
    """The options of config.json, without those of the output layer.

    transformers has the mask embedding where a probability of masks is above 0, used or not.
    """
    model, mask = config.model, config.mask
    options = {name: getattr(getattr(config, section), ours) for name, (section, ours, _) in _OPTIONS.items()}
    options["codevector_dim"] = model.target_dim
    if not model.quantize_targets:  # there is none to describe; transformers' own numbers fit each other
        for name in ("num_codevectors_per_group", "num_codevector_groups", "codevector_dim"):
            options[name] = _OPTIONS[name][2]
    options["apply_spec_augment"] = has_mask_embedding and (mask.mask_prob > 0 or mask.mask_channel_prob > 0)
    if not has_mask_embedding:
        options |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    elif not options["apply_spec_augment"]:
        options["mask_time_prob"] = _OPTIONS["mask_time_prob"][2]
    layers = model.conv_layers()
    return {
        **{name: value for name, value in _FIXED.items() if value is not None},
        **options,
        **{name: [layer[i] for layer in layers] for i, name in enumerate(_CONV)},
        "num_feat_extract_layers": len(layers),
        "feat_extract_norm": next(name for name, ours in _NORMS.items() if ours == model.extractor_mode),
        _DIVERSITY: config.objective.loss_weights[0],
        **_UNUSED,
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
    }


def feature_extractor(config: Config) -> dict[str, Any]:
    """The options of preprocessor_config.json.

    Models with a group norm are run without an attention mask, as transformers advises.
    """
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": config.model.sample_rate,
        "do_normalize": config.model.normalize,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config.model.extractor_mode == "layer_norm",
    }


def _conv_layers(where: str, options: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The conv blocks as (channels, kernel, stride) each."""
    columns = [options.get(name, default) for name, default in _CONV.items()]
    if not all(isinstance(column, list) and all(type(item) is int for item in column) for column in columns):
        raise CheckpointError(f"{where}: {', '.join(_CONV)} are not lists of whole numbers; use another file")
    if len({len(column) for column in columns}) > 1:
        raise CheckpointError(
            f"{where}: {', '.join(_CONV)} have {', '.join(str(len(column)) for column in columns)} entries, which "
            "must be the same number; use another file"
        )
    return list(zip(*columns, strict=True))


def _spelled(layers: list[tuple[int, int, int]]) -> str:
    """'[(512,10,5)]+[(512,3,2)]*4'."""
    runs = [(layer, len(list(run))) for layer, run in groupby(layers)]
    return "+".join(f"[({','.join(map(str, layer))})]" + (f"*{times}" if times > 1 else "") for layer, times in runs)


def _is_above(value: Any, limit: int) -> bool:
    return isinstance(value, (int, float)) and value > limit


def _told(options: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {shown(options[name])} has no counterpart in this toolkit (which has {ours})"
        for name, ours in _UNUSED.items()
        if options.get(name, ours) != ours
    ]


def _assumed(audio: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is not told by preprocessor_config.json: taken as {default}, as transformers does"
        for name, default in _AUDIO.items()
        if name not in audio
    ]
