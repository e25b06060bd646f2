"""Where a run starts: from nothing, from the weights of a checkpoint, or where a checkpoint stands.

Checkpoints of every program that wav2vec2/convert knows will do.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint, distributed, flags
from common.errors import CheckpointError, ConfigError
from common.labels import Dictionary
from wav2vec2.config import Config
from wav2vec2.config_checks import check_model
from wav2vec2.convert import native
from wav2vec2.convert.contents import MASK_EMBEDDING, PRETRAINING_HEADS, Contents
from wav2vec2.convert.load_any import load_any, with_dictionary
from wav2vec2.convert.options import schedule

log = logging.getLogger(__name__)

_OUTPUT_LAYER = ("proj.weight", "proj.bias")
_OF_TRAINING = ("dropout", "mask", "objective", "ctc", "optim", "precision")  # what decides what is learnt


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    config: Config  # with the architecture that counts
    dictionary: Dictionary | None = None
    path: Path | None = None  # the checkpoint, if there is one
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None  # the symbols of an output layer among the weights, row by row
    state: Mapping[str, Any] | None = None  # of a run that goes on

    def fill(self, model: nn.Module) -> None:
        """Put the weights into a model with fresh ones; tell which stay fresh. CheckpointError if they do not fit."""
        if not self.path:
            return
        weights = dict(self.weights)
        if self.labels and self.dictionary:
            rows = {name: weights.pop(name) for name in _OUTPUT_LAYER}
            _carry_over(model, rows, self.labels, self.dictionary.symbols)
        fresh = {} if self.state else _may_stay_fresh(model, weights)
        load_weights(model, {**fresh, **weights}, self.path)
        if any(name.startswith(PRETRAINING_HEADS) for name in fresh):
            log.warning(
                "%s: has no quantizer and projections of pre-training; they begin with fresh weights", self.path
            )
        if any(name.endswith(MASK_EMBEDDING) for name in fresh):
            log.warning("%s: has no mask embedding; it begins with a fresh one", self.path)


def find_start(config: Config) -> Start:
    """Where a run with this configuration begins. Raises ConfigError, CheckpointError or DataError."""
    resumed = _find_checkpoint(config)
    if resumed:
        start = _resume(config, *resumed)
    elif config.mode == "finetune":
        start = _fine_tune(config)
    else:
        start = _continue_pretraining(config) if config.run.init_from else Start(config)
    check_model(start.config)
    return start


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a folder, the same on all ranks, which call this together; None: there is none."""
    newest = checkpoint.load_newest(folder) if distributed.is_main() else None
    name = distributed.broadcast_object(newest[0].name if newest else None)
    if name is None or newest:
        return newest
    if not (folder / name).exists():
        raise ConfigError(
            f"--output_dir {folder}: process {distributed.rank()} does not see {name}; "
            "all machines need one shared folder"
        )
    return folder / name, checkpoint.load(folder / name)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Put weights into a model. Raises CheckpointError naming the file."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:  # torch lists all differences, one per line below the first
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise CheckpointError(
            f"{path}: its weights do not fit its architecture ({reasons[0][:160]}); use another checkpoint"
        ) from error


# ---- From weights ---------------------------------------------------------------------------------------------------


def _continue_pretraining(config: Config) -> Start:
    """All weights of a pre-trained model, or the trunk of a fine-tuned one."""
    path = Path(config.run.init_from)
    contents = load_any(path)
    weights = contents.inference_weights()
    if contents.config.mode == "finetune":
        weights = {name.removeprefix("w2v."): weights[name] for name in weights if name.startswith("w2v.")}
    _tell("starts from the weights of", path, contents)
    return Start(replace(config, model=contents.config.model), path=path, weights=weights)


def _fine_tune(config: Config) -> Start:
    """The trunk, and of a model that was fine-tuned before the output rows of the symbols that stay."""
    if not config.ctc.w2v_path:
        raise ConfigError(
            f"--w2v_path: is missing, and --output_dir {config.run.output_dir} holds no run to go on with"
        )
    path = Path(config.ctc.w2v_path)
    dictionary = Dictionary.read(_dictionary_path(config))
    contents = load_any(path)
    weights = contents.inference_weights()
    if contents.config.mode == "pretrain":
        weights = {f"w2v.{name}": weights[name] for name in weights if not name.startswith(PRETRAINING_HEADS)}
    elif contents.labels is None:
        weights = {name: weights[name] for name in weights if name not in _OUTPUT_LAYER}
        log.warning(
            "%s: does not tell the symbols of its output layer, which begins with fresh weights; to keep it, convert "
            "the file with utils/convert_checkpoint.py --dictionary FILE first",
            path,
        )
    _tell("starts from the weights of", path, contents)
    return Start(replace(config, model=contents.config.model), dictionary, path, weights, contents.labels)


def _carry_over(model: nn.Module, rows: Mapping[str, Tensor], old: tuple[str, ...], new: list[str]) -> None:
    """Copy the output rows of shared symbols, and tell which symbols are kept, new and dropped."""
    place = {symbol: row for row, symbol in enumerate(old)}
    kept = [symbol for symbol in new if symbol in place]
    with torch.no_grad():
        for name in _OUTPUT_LAYER:
            parameter = model.get_parameter(name)
            parameter[[new.index(symbol) for symbol in kept]] = rows[name][[place[symbol] for symbol in kept]].to(
                parameter.dtype
            )
    table = {
        "kept": kept,
        "new": [symbol for symbol in new if symbol not in place],
        "dropped": [symbol for symbol in old if symbol not in set(new)],
    }
    log.info("output layer, symbol by symbol:")
    for what, symbols in table.items():
        log.info("  %-8s%5d  %s", what, len(symbols), " ".join(symbols))


def _may_stay_fresh(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own values of what a checkpoint may lack: heads as a whole, mask embedding, output layer."""
    has_heads = any(name.startswith(PRETRAINING_HEADS) for name in weights)
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in weights
        and (
            name in _OUTPUT_LAYER
            or name.endswith(MASK_EMBEDDING)
            or (not has_heads and name.startswith(PRETRAINING_HEADS))
        )
    }


def _dictionary_path(config: Config) -> Path:
    return Path(config.data.data) / f"dict.{config.data.labels}.txt"


def _tell(what: str, path: Path, contents: Contents) -> None:
    log.info("%s %s (%s, %s)", what, path, contents.source, contents.config.mode)
    for remark in contents.remarks:
        log.warning("%s: %s", path, remark)


# ---- Where a checkpoint stands --------------------------------------------------------------------------------------


def _find_checkpoint(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, the same on all ranks; without --resume a folder that holds one is refused."""
    folder = Path(config.run.output_dir)
    found = None
    if config.run.resume:
        found = newest_checkpoint(folder)
    else:
        paths = checkpoint.update_paths(folder)
        if paths and config.run.save:
            raise ConfigError(
                f"--output_dir {folder}: holds {paths[0].name} of an earlier run; "
                "add --resume to go on from it, or choose another folder"
            )
    if found is None and config.run.resume_from:
        return Path(config.run.resume_from), _state_of_any(Path(config.run.resume_from), config)
    return found


def _state_of_any(path: Path, config: Config) -> dict[str, Any]:
    """A checkpoint of any program as one of this toolkit."""
    contents = load_any(path)
    fresh = "--init_from" if config.mode == "pretrain" else "--w2v_path"
    if contents.config.mode != config.mode:
        raise CheckpointError(
            f"--resume_from {path}: is of {contents.config.mode}, this is {config.mode}; "
            f"start from its weights with {fresh}"
        )
    for missing, what in ((contents.optimizer, "optimizer state"), (contents.step, "count of updates")):
        if missing is None:
            raise CheckpointError(
                f"{path}: has no {what}, so its training cannot go on; start anew from its weights with {fresh}"
            )
    if config.mode == "finetune" and contents.labels is None:
        contents = with_dictionary(contents, str(path), _dictionary_path(config))
    _tell("goes on from", path, contents)
    for what in contents.missing:
        log.warning("%s: has no %s", path, what)
    if contents.source != "native":
        log.info("epoch %s begins anew; the options are those of this command", contents.epoch or 1)
    # the best result so far is of other data, and its checkpoint is not in --output_dir
    return native.to_state(replace(contents, best=None))


def _resume(config: Config, path: Path, state: dict[str, Any]) -> Start:
    """The state of a run, with the differences between its options and the present ones told."""
    if state["mode"] != config.mode:
        raise CheckpointError(f"{path}: is of {state['mode']}; choose another --output_dir for {config.mode}")
    contents = native.to_contents(path, state)  # refuses what could not be resumed
    saved = contents.config
    _check_origin(config, saved, path)
    given = config.mode == "pretrain" and not (config.run.init_from or config.run.resume_from)
    if given and saved.model != config.model:
        raise CheckpointError(
            f"{path}: has another architecture ({_differences(asdict(saved.model), asdict(config.model))}); "
            "resume with its values, or choose another --output_dir"
        )
    config = replace(config, model=saved.model)
    sections = _OF_TRAINING if state.get("origin") else (*_OF_TRAINING, "data")  # others say little of theirs
    changed = _differences(_options(saved, sections), _options(config, sections))
    if changed:
        log.warning("options differ from those of %s, this command's count: %s", path, changed)
    dictionary = Dictionary.from_symbols(contents.labels) if contents.labels else None
    return Start(config, dictionary, path, contents.weights, state=state)


def _check_origin(config: Config, saved: Config, path: Path) -> None:
    """Refuse --init_from and --resume_from that would not be read because --output_dir holds a run of its own."""
    if path == Path(config.run.resume_from):
        return
    for name in ("init_from", "resume_from"):
        given, before = getattr(config.run, name), getattr(saved.run, name)
        if given and given != before:
            raise ConfigError(
                f"--{name} {given}: {path} is of a run that began {f'with {before}' if before else 'without it'}; "
                "choose another --output_dir"
            )
        if given:
            log.info("--%s %s: was read when the run began; it goes on from %s", name, given, path)


def _options(config: Config, sections: tuple[str, ...]) -> dict[str, Any]:
    """The options of some sections, with all settings of the learning rate."""
    options = flags.to_dict(config)
    options["optim"] |= schedule(config)
    return {name: options[name] for name in sections}


def _differences(old: Any, new: Any) -> str:
    """'name old -> new' for every option that differs."""
    before, after = _flat(old), _flat(new)
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in after if before.get(name) != after[name])


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found
