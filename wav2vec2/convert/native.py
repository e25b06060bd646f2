"""Checkpoints of this toolkit <-> Contents, with the files of older format versions brought up to date."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common import checkpoint, flags, torch_file
from common.errors import CheckpointError, ConfigError, one_line, shown
from wav2vec2.config import Config
from wav2vec2.convert.adam_state import MOMENTS, SCALER_COUNTERS
from wav2vec2.convert.contents import Contents, check_complete, check_part, output_rows, symbols_of, weights_of
from wav2vec2.convert.stand_ins import count_in, number_in, table_in


def to_contents(path: str | Path, state: Mapping[str, Any]) -> Contents:
    """What a file of checkpoint.load() says. Raises CheckpointError naming the file."""
    where = str(path)
    config = saved_config(state, path)
    weights = weights_of(where, state["model"])
    num_symbols = output_rows(where, config.mode, weights, "proj.weight")
    check_complete(where, weights, config, num_symbols)
    averaged = weights_of(where, table_in(state, "ema"), "ema")
    check_part(where, "averaged weights", averaged, weights)
    labels, origin, progress = state.get("labels"), state.get("origin"), table_in(state, "progress")
    return Contents(
        source="native",
        config=config,
        weights=weights,
        labels=None if labels is None else symbols_of(where, labels, num_symbols),
        averaged=averaged or None,
        optimizer=_optimizer(where, table_in(state, "optimizer"), weights) or None,
        scaler=_scaler(where, table_in(state, "scaler")),
        loader=_loader(where, table_in(state, "loader")),
        step=count_in(progress, "step"),
        best=number_in(progress, "best"),
        origin=one_line(origin) if isinstance(origin, str) else None,
    )


def to_state(contents: Contents) -> dict[str, Any]:
    """What checkpoint.save() writes: fp32 weights (exact for 16-bit ones), plain values."""
    progress = None if contents.step is None else {"step": contents.step, "best": contents.best}
    return {
        "mode": contents.config.mode,
        "config": flags.to_dict(contents.config),
        "model": _fp32(contents.weights),
        "labels": list(contents.labels) if contents.labels else None,
        "sample_rate": contents.config.model.sample_rate,
        "normalize": contents.config.model.normalize,
        "optimizer": contents.optimizer,
        "scaler": contents.scaler,
        "ema": _fp32(contents.averaged) if contents.averaged else None,
        "loader": contents.loader,
        "progress": progress,
        "origin": contents.origin,
    }


def write(path: Path, contents: Contents) -> None:
    """Write a checkpoint of this toolkit. Raises OSError."""
    torch_file.write(path, checkpoint.file_content(to_state(contents)))


def saved_config(state: Mapping[str, Any], path: str | Path) -> Config:
    """The configuration in a checkpoint. Raises CheckpointError naming the file."""
    mode = state["mode"]
    if mode not in flags.MODES:
        raise CheckpointError(f"{path}: has the mode {shown(mode)}; this toolkit has {' and '.join(flags.MODES)}")
    try:
        return flags.from_dict(Config, {**state["config"], "mode": mode})
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be used: {one_line(error)}") from error


def _optimizer(where: str, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Moments and count of updates by parameter."""
    entries: dict[str, dict[str, Any]] = {name: _counts(where, table_in(state, name), ("step",)) for name in state}
    for moment in MOMENTS:
        found = weights_of(where, {name: table_in(state, name).get(moment) for name in state}, "optimizer")
        check_part(where, "moments of the optimizer", found, weights)
        for name, tensor in found.items():
            entries[name][moment] = tensor
    return entries


def _loader(where: str, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where in the data training would go on."""
    plan = {str(name): value for name, value in state.items() if isinstance(value, (int, str))}
    return {**plan, **_counts(where, state, ("epoch", "position"))} if state else None


def _scaler(where: str, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The loss scale and its counters."""
    if not state:
        return None
    scale = number_in(state, "scale")
    if scale is None or scale <= 0:
        raise CheckpointError(f"{where}: its loss scale is {shown(scale)}; use another file")
    return {"scale": scale, **_counts(where, state, SCALER_COUNTERS)}


def _counts(where: str, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    counts = {name: count_in(state, name) for name in names}
    if None in counts.values():
        raise CheckpointError(f"{where}: its training state does not tell {' and '.join(names)}; use another file")
    return counts


def _fp32(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.float() for name, tensor in weights.items()}
