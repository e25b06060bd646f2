"""Checkpoints of fairseq <-> Contents.

Three generations are read: settings as nested dicts (`cfg`), as omegaconf's containers, and as one flat
argparse.Namespace (`args`), whose lists are text. The first is written.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import torch_file
from common.errors import CheckpointError, shown
from wav2vec2.convert import adam_state, original
from wav2vec2.convert.contents import Contents, refuse_hourglass, symbols_of
from wav2vec2.convert.fairseq_settings import settings
from wav2vec2.convert.names import optimizer_groups, original_names, original_order
from wav2vec2.convert.options import numbers
from wav2vec2.convert.stand_ins import StandIn, count_in, number_in, plain, table_in

_MODES = {"wav2vec2": "pretrain", "wav2vec_ctc": "finetune"}
_SECTIONS_READ = ("common", "dataset", "optimization", "optimizer", "lr_scheduler", "criterion", "task", "model")
# What fine-tuning sets itself; everything else is said by the settings of the pre-trained model.
_OF_FINETUNING = re.compile(
    r"(no_)?mask_\w+|\w*dropout\w*|layerdrop|feature_grad_mult|freeze_finetune_updates|blank_\w+|apply_mask"
    r"|zero_mask|layer_decay|autoregressive|freeze_regex"
)
_REPLACED = ("layer_type", "adp_num")  # of the trunk, where fine-tuning names them
_OF_THE_RUN = ("normalize", "sample_rate", "fp16", "bf16", "amp", "max_tokens", "update_freq", "lr", "max_update")
_OPTIMIZER = ("adam_betas", "adam_eps", "weight_decay", "clip_norm")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MAX_NUMBER = 1e15  # above that, and without end, it is no number of updates and no rate


def recognises(content: Any) -> bool:
    """Whether torch_file.read() gave a checkpoint of fairseq."""
    if not isinstance(content, Mapping) or "model" not in content:
        return False
    return content.get("cfg") is not None or isinstance(content.get("args"), StandIn)


def to_contents(path: str | Path, content: Mapping[str, Any]) -> Contents:
    """What a file says. Raises CheckpointError naming it."""
    where = str(path)
    cfg, model = _settings(where, content)
    mode, options = _mode_and_options(where, cfg, model)
    extra = table_in(content, "extra_state")
    contents = original.read(
        where,
        "fairseq",
        mode,
        options,
        weights=content["model"],
        averaged=table_in(extra, "ema"),
        optimizer=table_in(content, "last_optimizer_state"),
        position=table_in(extra, "train_iterator"),
    )
    rest = plain(where, {key: content.get(key) for key in ("optimizer_history", "labels", "task_state")})
    history = rest["optimizer_history"] if isinstance(rest["optimizer_history"], list) else []
    return replace(
        contents,
        labels=_labels(where, rest, contents.num_symbols),
        step=count_in(history[-1] if history else None, "num_updates"),
        best=_best(mode, table_in(cfg, "checkpoint") or cfg, number_in(extra, "best")),
    )


def to_content(contents: Contents, data: str) -> dict[str, Any]:
    """A checkpoint of fairseq, as plain data; `data` is the folder in which it looks for the dictionary.

    Raises CheckpointError for what fairseq's models do not have.
    """
    config = contents.config
    refuse_hourglass("fairseq", contents)
    original.refuse_projection("fairseq", contents)
    table = original_names(config.model)
    weights = table.to_foreign(contents.weights)
    order = original_order(weights)
    best = {} if contents.best is None else {"best": contents.best}
    extra_state: dict[str, Any] = {
        "train_iterator": {"version": 2, "epoch": contents.epoch or 1, "iterations_in_epoch": 0, "shuffle": True},
        **best,
    }
    if contents.averaged:
        extra_state["ema"] = table.to_foreign({**contents.weights, **contents.averaged})
    precision = config.precision
    optimizer = "FP16Optimizer" if precision.o2 else "FairseqAdam"
    history = {
        "criterion_name": "Wav2vecCriterion" if config.mode == "pretrain" else "CtcCriterion",
        "optimizer_name": "AMPOptimizer" if precision.amp else optimizer,
        "lr_scheduler_state": {"best": contents.best},
        "num_updates": contents.step or 0,
    }
    content: dict[str, Any] = {
        "args": None,
        "cfg": settings(config, data),
        "model": {name: weights[name] for name in order},
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": extra_state,
    }
    if contents.optimizer:
        flat = precision.o2 and precision.fp16  # it does not flatten the parameters of bf16 runs
        content["last_optimizer_state"] = adam_state.write(contents, optimizer_groups(order), table, flat=flat)
    if contents.labels:
        content["labels"] = list(contents.labels)  # fairseq itself reads them from the dictionary in `data`
    return content


def _mode_and_options(where: str, cfg: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mode and all options that count, in one table."""
    kind = model.get("_name") or model.get("arch")
    if not isinstance(kind, str) or kind not in _MODES:
        raise CheckpointError(
            f"{where}: holds a model {shown(kind)} of fairseq; this toolkit has {' and '.join(_MODES)}"
        )
    options = _merged(cfg, model)
    options |= _schedule(cfg, options)
    if _MODES[kind] == "pretrain":
        return "pretrain", options
    trunk = model.get("w2v_args")
    if not isinstance(trunk, Mapping):
        raise CheckpointError(
            f"{where}: does not tell the architecture of its pre-trained model (no w2v_args), as some files of 2020 "
            "do not; load and save it with a newer fairseq, beside the pre-trained file that it was made from"
        )
    inner = trunk["model"] if isinstance(trunk.get("model"), Mapping) else trunk
    kept = {name: value for name, value in _merged(trunk, inner).items() if not _OF_FINETUNING.fullmatch(name)}
    own = (*_REPLACED, *_OF_THE_RUN, *_OPTIMIZER, *_schedule(cfg, options))
    ours = {name: value for name, value in options.items() if _OF_FINETUNING.fullmatch(name) or name in own}
    return "finetune", {**kept, **ours}


def _schedule(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate in this toolkit's terms, and its length; fairseq's tri_stage is exp here."""
    section = cfg.get("lr_scheduler")
    kind = section.get("_name") if isinstance(section, Mapping) else section
    if kind == "polynomial_decay":
        end, peak, total = (_as_numbers(options.get(n)) for n in ("end_learning_rate", "lr", "total_num_update"))
        scale = end[0] / peak[0] if end and peak and peak[0] > 0 else None
        length = {"max_update": int(total[0])} if total else {}
        return {"lr_policy": "poly", "lr_poly_power": options.get("power"), "final_lr_scale": scale, **length}
    if kind != "tri_stage":
        return {"lr_policy": f"{kind} of fairseq"} if kind else {}
    shares, updates = _as_numbers(options.get("phase_ratio")), _as_numbers(options.get("max_update"))
    lengths = [options.get(name) for name in ("warmup_steps", "hold_steps")]
    length = {}
    if len(shares) == 3 and updates:
        lengths = [int(share * updates[0]) for share in shares[:2]]
        length = {"max_update": int(updates[0])}
    elif steps := _as_numbers([*lengths, options.get("decay_steps")]):
        length = {"max_update": int(sum(steps))} if any(steps) else {}
    return {
        "lr_policy": "exp",
        "warmup_updates": lengths[0],
        "hold_updates": lengths[1],
        "initial_lr_scale": options.get("init_lr_scale"),
        "final_lr_scale": options.get("final_lr_scale"),
        **length,
    }


def _as_numbers(value: Any) -> list[float]:
    """A number, a list of them, or the text of a list; nothing of anything else."""
    try:
        found = numbers("", value) if isinstance(value, str) else value
    except ValueError:
        return []
    found = found if isinstance(found, (list, tuple)) else [found]
    return list(found) if all(isinstance(item, (int, float)) and abs(item) < _MAX_NUMBER for item in found) else []


def _best(mode: str, options: Mapping[str, Any], best: float | None) -> float | None:
    """The best validation result, if it is of what this toolkit looks at: the loss, or in fine-tuning the WER."""
    metric = {"pretrain": "loss", "finetune": "wer"}[mode]
    if options.get("best_checkpoint_metric", "loss") != metric or options.get("maximize_best_checkpoint_metric"):
        return None
    return None if best is None else float(best)


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
    raise CheckpointError(f"{where}: is a checkpoint of fairseq whose settings are no table; use another file")


def _merged(cfg: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The options of all sections; those of the model count most."""
    merged: dict[str, Any] = {}
    for name in _SECTIONS_READ:
        merged |= table_in(cfg, name)
    merged |= model
    return {name: _resolved(cfg, value) for name, value in merged.items()}


def _resolved(cfg: Mapping[str, Any], value: Any) -> Any:
    """The option that `${section.name}` refers to; the text itself where it leads nowhere."""
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    found: Any = cfg
    for part in match[1].split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return value if found is None else found


def _labels(where: str, rest: Mapping[str, Any], num_symbols: int) -> tuple[str, ...] | None:
    """The symbols of a pickled Dictionary, or those that this toolkit wrote."""
    symbols = rest["labels"] or table_in(table_in(rest, "task_state"), "target_dictionary").get("symbols")
    return symbols_of(where, symbols, num_symbols) if num_symbols and symbols else None


def write(path: Path, contents: Contents) -> None:
    """Write a file that fairseq loads; its folder is where fairseq looks for the dictionary."""
    torch_file.write(path, to_content(contents, str(path.resolve().parent)))
