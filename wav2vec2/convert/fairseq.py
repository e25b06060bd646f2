"""Checkpoints of fairseq <-> Contents.

Three generations are read: settings as nested dicts (`cfg`), as omegaconf's containers, and as one flat
argparse.Namespace (`args`), whose lists are text. The first is written.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common import torch_file
from common.errors import CheckpointError
from common.labels import SPECIAL_SYMBOLS
from wav2vec2.config import Config
from wav2vec2.convert import adam_state
from wav2vec2.convert.contents import Contents, check_complete, needed_shapes
from wav2vec2.convert.names import original_names, original_order
from wav2vec2.convert.options import from_config, to_config
from wav2vec2.convert.stand_ins import StandIn, plain

_MODES = {"wav2vec2": "pretrain", "wav2vec_ctc": "finetune"}
_SECTIONS_READ = ("optimization", "optimizer", "lr_scheduler", "criterion", "task", "model")
# What fine-tuning sets itself; everything else is said by the settings of the pre-trained model.
_OF_FINETUNING = re.compile(
    r"(no_)?mask_\w+|\w*dropout\w*|layerdrop|feature_grad_mult|freeze_finetune_updates|blank_\w+|apply_mask"
    r"|zero_mask|layer_decay|autoregressive"
)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def recognises(content: Any) -> bool:
    """Whether torch_file.read() gave a checkpoint of fairseq."""
    if not isinstance(content, Mapping) or "model" not in content:
        return False
    return content.get("cfg") is not None or isinstance(content.get("args"), StandIn)


def to_contents(path: str | Path, content: Mapping[str, Any]) -> Contents:
    """What a file says. Raises CheckpointError naming it."""
    where = str(path)
    mode, options = _mode_and_options(where, content)
    config, remarks = to_config(where, mode, options)
    foreign = weights_of(where, content["model"])
    num_symbols = len(foreign.get("w2v_encoder.proj.weight", ()))
    table = original_names(config.model)
    shapes = needed_shapes(config, num_symbols)
    weights = table.to_native(where, foreign, shapes)
    check_complete(where, weights, config, num_symbols)
    rest = {key: content.get(key) for key in ("optimizer_history", "extra_state", "labels")}
    rest = plain(where, {**rest, "task_state": content.get("task_state")})
    extra, history = _table(rest, "extra_state"), rest["optimizer_history"] or [{}]
    averaged = _table(extra, "ema")
    optimizer, told = None, []
    state = content.get("last_optimizer_state")
    if isinstance(state, Mapping) and state.get("state"):
        order = [(name, tensor.shape) for name, tensor in foreign.items()]
        moments, steps = adam_state.read(where, state, order)
        optimizer, told = adam_state.to_native(where, moments, steps, table, list(weights))
    iterator = _table(extra, "train_iterator")
    return Contents(
        source="fairseq",
        config=config,
        weights=weights,
        labels=_labels(where, rest, num_symbols),
        averaged=table.to_native(where, weights_of(where, averaged), shapes) if averaged else None,
        optimizer=optimizer,
        scaler=fresh_scaler(state.get("loss_scale")) if optimizer and isinstance(state, Mapping) else None,
        loader={"epoch": iterator["epoch"], "position": 0} if isinstance(iterator.get("epoch"), int) else None,
        step=history[-1].get("num_updates"),
        best=extra.get("best"),
        remarks=(*remarks, *told),
    )


def to_content(contents: Contents, data: str) -> dict[str, Any]:
    """A checkpoint of fairseq, as plain data; `data` is the folder in which it looks for the dictionary.

    Raises CheckpointError for what fairseq's models do not have.
    """
    config = contents.config
    if config.model.hourglass():
        raise CheckpointError(
            f"--to fairseq: its models have no Hourglass ({config.model.hourglass_transformer}), so it cannot hold "
            "this one; nvidia and native can"
        )
    refuse_projection("fairseq", contents)
    table = original_names(config.model)
    weights = table.to_foreign(contents.weights)
    order = original_order(weights)
    content: dict[str, Any] = {
        "args": None,
        "cfg": _cfg(config, data),
        "model": {name: weights[name] for name in order},
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "Wav2vecCriterion" if config.mode == "pretrain" else "CtcCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": contents.best},
                "num_updates": contents.step or 0,
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": contents.epoch or 1, "iterations_in_epoch": 0, "shuffle": True},
            "best": contents.best,
        },
    }
    if contents.averaged:
        averaged = {**contents.weights, **contents.averaged}
        content["extra_state"]["ema"] = table.to_foreign(averaged)
    if contents.optimizer:
        content["last_optimizer_state"] = {
            "state": adam_state.write(contents.optimizer, table, order),
            "param_groups": [_param_group(config, len(order))],
        }
    if contents.labels:
        content["labels"] = list(contents.labels)  # fairseq itself reads them from the dictionary in `data`
    return content


def weights_of(where: str, found: Any) -> dict[str, Tensor]:
    """The entry of a file that should be a table of tensors."""
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{where}: its entry 'model' is not a table of weights; use another file")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def fresh_scaler(scale: Any) -> dict[str, Any] | None:
    """The state of the loss scaler at a scale; its counters begin anew."""
    if not isinstance(scale, (int, float)):
        return None
    counters = dict.fromkeys(("num_skipped", "since_overflow", "since_change", "overflows_since_change"), 0)
    return {"scale": float(scale), **counters}


def refuse_projection(program: str, contents: Contents) -> None:
    """The originals have no projection of the features where it does not change their width."""
    model = contents.config.model
    if model.feature_projection == "always" and model.conv_layers()[-1][0] == model.encoder_embed_dim:
        raise CheckpointError(
            f"--to {program}: its models do not project features that have the width of the transformer "
            f"({model.encoder_embed_dim}), and this one does; huggingface and native can hold it"
        )


def _mode_and_options(where: str, content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mode and all options that count, in one table."""
    cfg, model = _settings(where, content)
    kind = model.get("_name") or model.get("arch")
    if kind not in _MODES:
        raise CheckpointError(
            f"{where}: holds a model {str(kind)[:40]!r} of fairseq; this toolkit has {' and '.join(_MODES)}"
        )
    options = _merged(cfg, model)
    if _MODES[str(kind)] == "pretrain":
        return "pretrain", options
    trunk = model.get("w2v_args")
    if not isinstance(trunk, Mapping):
        raise CheckpointError(
            f"{where}: does not tell the architecture of its pre-trained model (w2v_args); use a file that does"
        )
    inner = trunk["model"] if isinstance(trunk.get("model"), Mapping) else trunk
    own = {name: value for name, value in options.items() if _OF_FINETUNING.fullmatch(name)}
    outer = {name: options[name] for name in ("normalize", "sample_rate", "lr", "max_update") if name in options}
    return "finetune", {**_merged(trunk, inner), **outer, **own}


def _settings(where: str, content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """All sections, and that of the model; a flat Namespace is its own only section."""
    cfg = content.get("cfg")
    if cfg is not None:
        cfg = plain(where, cfg)
        if isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping):
            return cfg, cfg["model"]
    else:
        args = plain(where, content["args"])
        if isinstance(args, Mapping):
            return args, args
    raise CheckpointError(f"{where}: its settings are not a table; use another file")


def _merged(cfg: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The options of all sections; those of the model count most."""
    merged: dict[str, Any] = {}
    for name in _SECTIONS_READ:
        merged |= _table(cfg, name)
    merged |= model
    return {name: _resolved(cfg, value) for name, value in merged.items()}


def _resolved(cfg: Mapping[str, Any], value: Any) -> Any:
    """The option that `${section.name}` refers to."""
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    found: Any = cfg
    for part in match[1].split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return None if isinstance(found, str) and _REFERENCE.fullmatch(found) else found


def _table(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, Mapping) else {}


def _labels(where: str, rest: Mapping[str, Any], num_symbols: int) -> tuple[str, ...] | None:
    """The symbols of a pickled Dictionary, or those that this toolkit wrote."""
    symbols = rest["labels"] or _table(_table(rest, "task_state"), "target_dictionary").get("symbols")
    if not num_symbols or not isinstance(symbols, list):
        return None
    if len(symbols) != num_symbols or tuple(symbols[:4]) != SPECIAL_SYMBOLS:
        raise CheckpointError(
            f"{where}: its dictionary has {len(symbols)} symbols, its output layer {num_symbols} rows; use another file"
        )
    return tuple(str(symbol) for symbol in symbols)


def _cfg(config: Config, data: str) -> dict[str, Any]:
    """The sections that fairseq's own programs look at."""
    options = from_config(config)
    optim = {"lr": [config.optim.lr]}
    task = {"data": data, "sample_rate": config.model.sample_rate, "normalize": config.model.normalize}
    pretraining = {"_name": "audio_pretraining", "labels": None, **task}
    trunk = {"_name": "wav2vec2", **_FIXED_IN_TRUNK, **{name: options[name] for name in _TRUNK_OPTIONS}}
    cfg: dict[str, Any] = {
        "_name": None,
        "common": {"_name": None, "seed": config.run.seed, "fp16": config.precision.fp16},
        "optimization": {
            "_name": None,
            "max_update": config.optim.max_update,
            "clip_norm": config.optim.clip_norm,
            "sentence_avg": config.mode == "finetune",
            **optim,
        },
        "optimizer": {
            "_name": "adam",
            "adam_betas": f"({config.optim.adam_betas[0]},{config.optim.adam_betas[1]})",
            "adam_eps": config.optim.adam_eps,
            "weight_decay": config.optim.weight_decay,
            **optim,
        },
        "lr_scheduler": None,
    }
    if config.mode == "pretrain":
        criterion = {"_name": "wav2vec", "infonce": True, "loss_weights": options["loss_weights"]}
        return {**cfg, "model": trunk, "task": pretraining, "criterion": criterion}
    masked = config.mask.mask_prob > 0 or config.mask.mask_channel_prob > 0
    model = {
        "_name": "wav2vec_ctc",
        "w2v_path": "",
        "apply_mask": masked,
        **{name: options[name] for name in _CTC_OPTIONS},
        "layerdrop": options["encoder_layerdrop"],
        "normalize": config.model.normalize,
        "data": data,
        "w2v_args": {**cfg, "model": trunk, "task": pretraining, "criterion": None},
    }
    task = {"_name": "audio_finetuning", "labels": "ltr", **task}
    return {**cfg, "model": model, "task": task, "criterion": {"_name": "ctc", "zero_infinity": True}}


_MASK_OPTIONS = (
    *("mask_length", "mask_prob", "mask_selection", "mask_other", "no_mask_overlap", "mask_min_space"),
    *("mask_channel_length", "mask_channel_prob", "mask_channel_selection", "mask_channel_other"),
    *("no_mask_channel_overlap", "mask_channel_min_space"),
)
_TRUNK_OPTIONS = (
    *("extractor_mode", "encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"),
    *("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "dropout_input", "dropout_features"),
    *("final_dim", "layer_norm_first", "conv_feature_layers", "conv_bias", "logit_temp", "quantize_targets"),
    *("feature_grad_mult", "latent_vars", "latent_groups", "latent_dim", "latent_temp", "num_negatives"),
    *("negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives", "conv_pos", "conv_pos_groups"),
    *_MASK_OPTIONS,
)
_CTC_OPTIONS = (
    *("dropout_input", "final_dropout", "dropout", "attention_dropout", "activation_dropout", "feature_grad_mult"),
    *("freeze_finetune_updates", "blank_weight", "blank_mode"),
    *_MASK_OPTIONS,
)
_FIXED_IN_TRUNK = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "quantize_input": False,
    "same_quantizer": False,
    "target_glu": False,
    "quantizer_depth": 1,
    "quantizer_factor": 3,
    "pos_conv_depth": 1,
    "require_same_masks": True,
    "mask_dropout": 0.0,
    "mask_channel_before": False,
    "required_seq_len_multiple": 2,
    "crop_seq_to_multiple": 1,
}


def _param_group(config: Config, parameters: int) -> dict[str, Any]:
    optim = config.optim
    return {
        "lr": optim.lr,
        "betas": tuple(optim.adam_betas),
        "eps": optim.adam_eps,
        "weight_decay": optim.weight_decay,
        "amsgrad": False,
        "params": list(range(parameters)),
    }


def write(path: Path, contents: Contents) -> None:
    """Write a file that fairseq loads, and for a fine-tuned model its dictionary beside it."""
    torch_file.write(path, to_content(contents, str(path.resolve().parent)))
