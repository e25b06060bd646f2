"""What a checkpoint of any program says, in this toolkit's terms: the hub of all conversions."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError
from wav2vec2.config import Config, DropoutConfig
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model

# What pre-training adds to the trunk. A file may lack all of it and still be fine-tuned.
PRETRAINING_HEADS = ("quantizer.", "project_q.", "final_proj.")
MASK_EMBEDDING = "mask_emb"


@dataclass(frozen=True)
class Contents:
    """A checkpoint in this toolkit's terms, whoever wrote it."""

    source: str  # the program: native, fairseq, nvidia, huggingface
    config: Config  # mode and options; those that the file does not tell have this toolkit's defaults
    weights: Mapping[str, Tensor]  # by this toolkit's names, in the type that the file has
    labels: tuple[str, ...] | None = None  # output symbols by id
    averaged: Mapping[str, Tensor] | None = None
    optimizer: Mapping[str, Mapping[str, Any]] | None = None  # name -> exp_avg, exp_avg_sq, step
    scaler: Mapping[str, Any] | None = None
    loader: Mapping[str, Any] | None = None
    step: int | None = None  # finished updates
    best: float | None = None  # lowest WER, or loss in pre-training
    origin: str | None = None  # the program and the file that it was converted from
    remarks: tuple[str, ...] = ()  # what the file holds or asks for that has no place here

    @property
    def epoch(self) -> int | None:
        """The pass over the data in which training would go on."""
        return self.loader["epoch"] if self.loader else None

    @property
    def num_symbols(self) -> int:
        """Rows of the output layer; 0 without one."""
        return len(self.weights["proj.weight"]) if "proj.weight" in self.weights else 0

    @property
    def missing(self) -> list[str]:
        """What a training run would have to make up."""
        lacks = {
            "quantizer and projections of pre-training": self.config.mode == "pretrain"
            and not any(name.startswith(PRETRAINING_HEADS) for name in self.weights),
            "mask embedding": not any(name.endswith(MASK_EMBEDDING) for name in self.weights),
            "symbols of the output layer": self.config.mode == "finetune" and self.labels is None,
            "optimizer state": self.optimizer is None,
            "position in the data": self.loader is None,
            "training step": self.step is None,
        }
        return [what for what, is_missing in lacks.items() if is_missing]

    def inference_weights(self) -> dict[str, Tensor]:
        """The weights that results are reported with: averaged where there is an average."""
        return {**self.weights, **(self.averaged or {})}

    def without_training_state(self) -> Contents:
        """The model alone."""
        return replace(self, optimizer=None, scaler=None, loader=None)


def empty_model(config: Config, num_symbols: int) -> nn.Module:
    """The model of a configuration without memory for its weights, for names and shapes."""
    with torch.device("meta"):
        if config.mode == "pretrain":
            return Wav2Vec2Model(config.model, DropoutConfig())
        return Wav2Vec2Ctc(config.model, DropoutConfig(), num_symbols=num_symbols)


def needed_shapes(config: Config, num_symbols: int) -> dict[str, torch.Size]:
    """Name -> shape of every weight of the architecture."""
    return {name: tensor.shape for name, tensor in empty_model(config, num_symbols).state_dict().items()}


def check_complete(where: str, found: Mapping[str, Tensor], config: Config, num_symbols: int) -> None:
    """Refuse weights that are not those of the architecture; a pre-trained file may lack heads and mask embedding.

    Raises CheckpointError that lists missing and wrongly shaped weights by this toolkit's names.
    """
    needed = needed_shapes(config, num_symbols)
    optional = {name for name in needed if name.endswith(MASK_EMBEDDING)}
    heads = {name for name in needed if name.startswith(PRETRAINING_HEADS)}
    if config.mode == "pretrain" and not heads & set(found):
        optional |= heads
    problems = [
        *(f"{name} is missing" for name in needed if name not in found and name not in optional),
        *(f"{name} has no place" for name in found if name not in needed),
        *(
            f"{name} is {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in needed.items()
            if name in found and found[name].shape != shape
        ),
    ]
    if problems:
        raise CheckpointError(f"{where}: its weights are not those of its architecture: {listed(problems)}")


def listed(items: Iterable[str], most: int = 30) -> str:
    """A list in one line, its end cut off where it is long."""
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
