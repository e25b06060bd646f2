"""Folders of Hugging Face transformers <-> Contents: Wav2Vec2Model, Wav2Vec2ForPreTraining and Wav2Vec2ForCTC."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import torch_file
from common.errors import CheckpointError, ConfigError, one_line, shown
from wav2vec2.config import Config
from wav2vec2.convert import huggingface_config, huggingface_labels
from wav2vec2.convert.contents import (
    MASK_EMBEDDING,
    PRETRAINING_HEADS,
    Contents,
    check_complete,
    listed,
    needed_shapes,
    output_rows,
    refuse_hourglass,
    symbols_of,
)
from wav2vec2.convert.names import huggingface_names

_MODES = {"Wav2Vec2ForPreTraining": "pretrain", "Wav2Vec2Model": "pretrain", "Wav2Vec2ForCTC": "finetune"}
_TRUNK = "wav2vec2."  # before the names of the trunk, except where a file holds nothing else
_OUTPUT = "lm_head.weight"
_PROJECTION = "post_extract_proj."
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first one that is there counts, as in transformers
_NAMED = re.compile(r"config\.json|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_MAX_JSON_BYTES = 16 * 2**20
_DAMAGED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError)  # beside the library's own


def folder_of(path: Path) -> Path | None:
    """The folder that a path means: itself, or that of its weights or config.json; None if it has no config.json."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or _NAMED.fullmatch(path.name)
    return folder if named and (folder / "config.json").is_file() else None


def to_contents(folder: Path) -> Contents:
    """What a folder says. Raises CheckpointError naming the file."""
    where = str(folder)
    options = _json(folder / "config.json")
    found = _weights(folder)
    mode = _mode(where, options, found)
    config, remarks = huggingface_config.to_config(f"{where}/config.json", mode, options, _audio(folder))
    if config.model.encoder_layers > len(found):
        raise CheckpointError(
            f"{where}: config.json claims {config.model.encoder_layers} layers, the folder has only {len(found)} "
            "weights in all; use another folder"
        )
    number = _output_rows(where, mode, options, found)
    weights = _native(where, config, found, number)
    config, weights = _without_identity(config, weights)
    labels = None
    if mode == "finetune":
        files = huggingface_labels.FILES
        tables = {file: _json(folder / file) for file in files if (folder / file).is_file()}
        rows = huggingface_labels.find_rows(where, number, options, tables)
        weights["proj.weight"] = rows.arrange(weights["proj.weight"], 0.0)
        weights["proj.bias"] = rows.arrange(weights["proj.bias"], huggingface_labels.NEVER)
        labels, remarks = rows.labels, (*remarks, *rows.remarks)
    return Contents(source="huggingface", config=config, weights=weights, labels=labels, remarks=remarks)


def write(path: Path, contents: Contents) -> None:
    """Write a new folder that transformers loads, with the weights in the types that they have.

    There is one set of weights: averaged ones, if they are wanted, must be handed in as `contents.weights`.
    Raises CheckpointError for what transformers' models do not have.
    """
    _refuse(contents)
    config = contents.config
    weights = _with_projection(contents)
    found = {name: tensor.contiguous() for name, tensor in huggingface_names().to_foreign(weights).items()}
    kind = "Wav2Vec2ForCTC" if config.mode == "finetune" else "Wav2Vec2ForPreTraining"
    if config.mode == "pretrain" and not any(name.startswith(PRETRAINING_HEADS) for name in weights):
        kind = "Wav2Vec2Model"
        found = {name.removeprefix(_TRUNK): tensor for name, tensor in found.items()}
    dtype = str(_common_type(weights)).removeprefix("torch.")
    has_mask_embedding = any(name.endswith(MASK_EMBEDDING) for name in weights)
    options = {
        "architectures": [kind],
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before version 4.56
        **huggingface_config.from_config(config, has_mask_embedding=has_mask_embedding),
        **huggingface_labels.special_rows(),
    }
    audio = huggingface_config.feature_extractor(config)
    files = {"config.json": options, "preprocessor_config.json": audio}
    if contents.labels:
        options["vocab_size"] = len(contents.labels)
        audio["processor_class"] = "Wav2Vec2Processor"
        files |= huggingface_labels.vocabulary(contents.labels)
    path.mkdir(parents=True)
    for name, table in files.items():
        (path / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    target = path / _WEIGHT_FILES[0]
    _save(found, target)
    shutil.copymode(path / "config.json", target)  # the library lets nobody else read its files
    for name in (*files, target.name):
        with (path / name).open("rb") as file:
            os.fsync(file.fileno())


def _save(found: dict[str, Tensor], target: Path) -> None:
    """Write the weights. Raises OSError, which the library tells by its number only."""
    safetensors = _library()
    try:
        safetensors.torch.save_file(found, target, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error


def _library() -> Any:
    """safetensors, imported where a file is read or written: training needs none."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            f"safetensors is not installed ({error}); install it with: pip install -r requirements.txt"
        ) from error
    return safetensors


def _refuse(contents: Contents) -> None:
    """What transformers' models do not have."""
    config = contents.config
    refuse_hourglass("huggingface", contents)
    if config.mode == "pretrain":
        if not config.model.quantize_targets:
            raise CheckpointError(
                "--to huggingface: its pre-trained models have a quantizer, and this one has none; "
                "fairseq, nvidia and native can hold it"
            )
        return
    if config.ctc.blank_weight:
        raise CheckpointError(
            f"--to huggingface: its models leave the blank's logit as it is (here --blank_weight "
            f"{config.ctc.blank_weight}); fairseq, nvidia and native can hold it"
        )
    if contents.labels is None:
        raise CheckpointError(
            "--to huggingface: its fine-tuned folders hold the symbols of the output layer, which this one lacks; "
            "name their file with --dictionary"
        )
    symbols_of("--to huggingface", contents.labels, contents.num_symbols)


# ---- Weights --------------------------------------------------------------------------------------------------------


def _native(where: str, config: Config, found: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Weights by this toolkit's names; all that the architecture has, and nothing else."""
    try:
        shapes = needed_shapes(config, number)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: config.json: its sizes cannot be used ({one_line(error, 100)})") from error
    weights = huggingface_names().to_native(where, found, shapes)
    check_complete(where, weights, config, number)
    return weights


def _without_identity(config: Config, weights: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
    """Without a projection of the features that leaves them as they are: write() adds it where there is none."""
    start = next(name for name in weights if _PROJECTION in name).rpartition(".")[0]
    weight, bias = weights[f"{start}.weight"], weights[f"{start}.bias"]
    if weight.shape[0] != weight.shape[1] or bias.any() or not torch.equal(weight, torch.eye(len(weight)).to(weight)):
        return config, weights
    rest = {name: tensor for name, tensor in weights.items() if _PROJECTION not in name}
    return replace(config, model=replace(config.model, feature_projection="needed")), rest


def _with_projection(contents: Contents) -> dict[str, Tensor]:
    """With a projection of the features, which transformers always has."""
    weights = dict(contents.weights)
    if not any(_PROJECTION in name for name in weights):
        start = f"{'w2v.' if contents.config.mode == 'finetune' else ''}{_PROJECTION}"
        dim, dtype = contents.config.model.encoder_embed_dim, _common_type(weights)
        weights |= {f"{start}weight": torch.eye(dim, dtype=dtype), f"{start}bias": torch.zeros(dim, dtype=dtype)}
    return weights


def _common_type(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The type that holds all weights exactly."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors by transformers' names, those of the trunk with its prefix."""
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            found = _tensors(folder / name)
        elif index.is_file():
            found = _shards(index)
        else:
            continue
        if not any(key.startswith(_TRUNK) for key in found):
            found = {f"{_TRUNK}{key}": tensor for key, tensor in found.items()}
        return found
    raise CheckpointError(
        f"{folder}: has a config.json, but neither {' nor '.join(_WEIGHT_FILES)}; complete it, or name another folder"
    )


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names, which lie beside it."""
    places = _json(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: has no table 'weight_map' of names and files; use another folder")
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not _NAMED.fullmatch(name):
            raise CheckpointError(
                f"{index}: names {shown(name)}, which is no file of weights beside it; it is not read"
            )
        tensors = _tensors(index.parent / name)
        twice = [key for key in tensors if key in found]
        if twice:
            raise CheckpointError(f"{index.parent / name}: has weights of another file again: {listed(twice)}")
        found |= tensors
    missing = [key for key in places if key not in found]
    if missing:
        raise CheckpointError(f"{index}: names weights that its files do not have: {listed(missing)}")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises CheckpointError naming it."""
    if path.suffix == ".bin":
        content = torch_file.read(path)
    else:
        content = _safetensors(path)
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path}: is not a table of weights; use another file")
    other = [str(name) for name, tensor in content.items() if not tensor.is_floating_point()]
    if other:
        raise CheckpointError(f"{path}: has weights that are no floating-point numbers: {listed(other)}")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Copies: the library's tensors are views of the file, which may change or go."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; complete the folder")
    safetensors = _library()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no table
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); check path and permissions"
        ) from None
    except (safetensors.SafetensorError, *_DAMAGED) as error:
        raise torch_file.damaged(path, one_line(error, 100)) from error


def _output_rows(where: str, mode: str, options: Mapping[str, Any], found: Mapping[str, Tensor]) -> int:
    """Rows of the output layer, which config.json must know."""
    number = output_rows(where, mode, found, _OUTPUT)
    claimed = options.get("vocab_size", number)
    if number and claimed != number:
        raise CheckpointError(
            f"{where}: config.json: vocab_size {str(claimed)[:40]}: the output layer has {number} rows; "
            "correct config.json"
        )
    return number


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _mode(where: str, options: Mapping[str, Any], found: Mapping[str, Tensor]) -> str:
    """What the class of the model is to this toolkit; where none is named, the weights tell."""
    classes = options.get("architectures") or ["Wav2Vec2ForCTC" if _OUTPUT in found else "Wav2Vec2Model"]
    if not isinstance(classes, list) or classes[0] not in list(_MODES):
        raise CheckpointError(
            f"{where}: config.json: has the architecture {shown(classes)}; this toolkit has {', '.join(_MODES)}"
        )
    return _MODES[classes[0]]


def _audio(folder: Path) -> Mapping[str, Any]:
    """The feature extractor's options: newer versions put them into processor_config.json."""
    for name, key in (("processor_config.json", "feature_extractor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            table = _json(folder / name)
            table = table.get(key, {}) if key else table
            if isinstance(table, Mapping) and table:
                return table
    return {}


def _json(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises CheckpointError naming it."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is larger than {_MAX_JSON_BYTES // 2**20} MiB; use another folder")
        table = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check path and permissions") from None
    except (ValueError, RecursionError) as error:
        raise torch_file.damaged(path, one_line(error, 100)) from None
    if not isinstance(table, dict):
        raise torch_file.damaged(path, "it is no table")
    return table
