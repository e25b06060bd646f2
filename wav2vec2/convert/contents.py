"""What a checkpoint of any program says, in this toolkit's terms: the hub of all conversions."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from common.data.sampler import updates_per_epoch
from common.errors import CheckpointError, DataError, one_line
from common.labels import Dictionary
from wav2vec2.config import Config, DropoutConfig
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model

# What pre-training adds to the trunk. A file may lack all of it and still be fine-tuned.
PRETRAINING_HEADS = ("quantizer.", "project_q.", "final_proj.")
MASK_EMBEDDING = "mask_emb"
_NO_TEXT = ("Cc", "Cs")  # control characters, and halves of characters, which no file can hold


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
        return self.loader["epoch"] + self.epoch_has_ended if self.loader else None

    @property
    def epoch_has_ended(self) -> bool:
        """Whether the position in the data is the end of its epoch."""
        loader = self.loader or {}
        updates = loader.get("updates_per_epoch")
        if not updates and loader.get("sub_batches") and loader.get("sub_batches_per_update"):  # an earlier version
            updates = updates_per_epoch(loader["sub_batches"], loader["sub_batches_per_update"])
        return bool(updates) and loader["position"] >= updates  # other programs begin their epochs anew

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


def empty_model(config: Config, num_symbols: int) -> nn.Module:
    """The model of a configuration without memory for its weights, for names and shapes."""
    with torch.device("meta"):
        if config.mode == "pretrain":
            return Wav2Vec2Model(config.model, DropoutConfig())
        return Wav2Vec2Ctc(config.model, DropoutConfig(), num_symbols=num_symbols)


@lru_cache(maxsize=1)  # one file asks for them several times, and a deep model takes a second
def needed_shapes(config: Config, num_symbols: int) -> Mapping[str, torch.Size]:
    """Name -> shape of every weight of the architecture."""
    model = empty_model(config, num_symbols)
    return MappingProxyType({name: tensor.shape for name, tensor in model.state_dict().items()})


def weights_of(where: str, found: Any, entry: str = "model") -> dict[str, Tensor]:
    """An entry of a file that should be a table of weights. Raises CheckpointError where it is not."""
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{where}: its entry {entry!r} is not a table of weights; use another file")
    other = [str(name) for name, tensor in found.items() if not tensor.is_floating_point()]
    if other:
        raise CheckpointError(f"{where}: has weights that are no floating-point numbers: {listed(other)}")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def output_rows(where: str, mode: str, weights: Mapping[str, Tensor], name: str) -> int:
    """Rows of the output layer, of which a fine-tuned model has some. Raises CheckpointError if it has none."""
    matrix = weights.get(name)
    if matrix is not None and matrix.ndim == 2 and matrix.numel():
        return len(matrix)
    if mode == "finetune":
        raise CheckpointError(f"{where}: is a fine-tuned model without the matrix {name}; use another file")
    return 0


def symbols_of(where: str, symbols: Any, num_symbols: int) -> tuple[str, ...]:
    """The symbols of the output layer, in the order of its rows. Raises CheckpointError if they are not that."""
    if not isinstance(symbols, (list, tuple)) or not all(isinstance(symbol, str) for symbol in symbols):
        raise CheckpointError(f"{where}: its symbols are not a list of texts; use another file")
    if len(symbols) != num_symbols:
        raise CheckpointError(
            f"{where}: names {len(symbols)} symbols, its output layer has {num_symbols} rows; use another file"
        )
    if any(symbol.split() != [symbol] for symbol in symbols):
        raise CheckpointError(f"{where}: has a symbol with white space, which no dictionary can hold; use another file")
    strange = [symbol for symbol in symbols if any(unicodedata.category(c) in _NO_TEXT for c in symbol)]
    if strange:
        raise CheckpointError(
            f"{where}: has symbols that are no text ({listed(map(ascii, strange), 3)}); use another file"
        )
    try:
        return tuple(Dictionary.from_symbols(symbols).symbols)
    except DataError as error:
        raise CheckpointError(f"{where}: its symbols cannot be used: {one_line(error)}") from None


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
        *_misfits(found, needed),
    ]
    if problems:
        raise CheckpointError(f"{where}: its weights are not those of its architecture: {listed(problems)}")


def check_part(where: str, what: str, found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse what belongs to `weights` (averages, moments) and has other names or shapes. Raises CheckpointError."""
    problems = _misfits(found, {name: tensor.shape for name, tensor in weights.items()})
    if problems:
        raise CheckpointError(f"{where}: its {what} are not those of its weights: {listed(problems)}")


def _misfits(found: Mapping[str, Tensor], needed: Mapping[str, torch.Size]) -> list[str]:
    return [
        *(f"{name} has no place" for name in found if name not in needed),
        *(
            f"{name} is {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in needed.items()
            if name in found and found[name].shape != shape
        ),
    ]


def refuse_hourglass(program: str, contents: Contents) -> None:
    """What only this toolkit and NVIDIA's have."""
    if contents.config.model.hourglass():
        raise CheckpointError(
            f"--to {program}: its models have no Hourglass ({contents.config.model.hourglass_transformer}), so it "
            "cannot hold this one; nvidia and native can"
        )


def listed(items: Iterable[str], most: int = 30) -> str:
    """A list in one line, its end cut off where it is long."""
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(one_line(item, 300) for item in items[:most]) + rest
