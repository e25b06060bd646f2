"""Checkpoints of this toolkit <-> Contents, with the files of older format versions brought up to date."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import checkpoint, flags
from common.errors import CheckpointError, ConfigError
from wav2vec2.config import Config
from wav2vec2.convert.contents import Contents, check_complete


def to_contents(path: str | Path, state: Mapping[str, Any]) -> Contents:
    """What a file of checkpoint.load() says. Raises CheckpointError naming the file."""
    config = replace(saved_config(state, path), mode=state["mode"])
    weights = dict(state["model"])
    progress = state.get("progress") or {}
    labels = state.get("labels")
    contents = Contents(
        source="native",
        config=config,
        weights=weights,
        labels=tuple(labels) if labels else None,
        averaged=state.get("ema"),
        optimizer=state.get("optimizer"),
        scaler=state.get("scaler"),
        loader=state.get("loader"),
        step=progress.get("step"),
        best=progress.get("best"),
        origin=state.get("origin"),
    )
    check_complete(str(path), weights, config, contents.num_symbols)
    return contents


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
    """Write a checkpoint of this toolkit."""
    checkpoint.save(path, to_state(contents))


def saved_config(state: Mapping[str, Any], path: str | Path) -> Config:
    """The configuration in a checkpoint. Raises CheckpointError naming the file."""
    try:
        return flags.from_dict(Config, state["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be used: {error}") from error


def _fp32(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.float() for name, tensor in weights.items()}
