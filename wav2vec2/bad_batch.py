"""The file of an update that went wrong: the batches of one process, and all that is needed to make it again.

`bad_batch_update{N}_rank{R}.pt` holds plain containers and tensors and loads with `weights_only=True`.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common import torch_file
from common.data.collate import Batch, SubBatch
from common.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = "wav2vec2 bad batch"
FORMAT_VERSION = 1
_TENSORS = ("audio_BS", "lengths_B", "mask_BT", "masked_R", "channel_mask_BD", "labels_BL")
_NEEDED_TENSORS = ("audio_BS", "lengths_B")
_PLAIN = ("padded", "num_samples")
_TUPLES = ("ids", "frame_lengths", "label_lengths", "texts", "places")


@dataclass(frozen=True, eq=False)
class BadBatch:
    """One process's share of an update.

    step: updates that were finished before it; epoch, position: its place in the data; count: what the loss of the
    update is divided by, over all processes.
    """

    mode: str
    step: int
    epoch: int
    position: int
    seed: int
    rank: int
    world: int
    count: float
    batches: tuple[Batch, ...]

    def write(self, folder: str | Path) -> None:
        """Write the file, whole or not at all; what fails is only logged, because worse has happened."""
        path = Path(folder) / file_name(self.step, self.rank)
        partial = path.with_name(f".{path.name}.partial")
        content: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content |= {"format": FORMAT, "format_version": FORMAT_VERSION, "update": self.step + 1}
        content["batches"] = [_to_plain(batch) for batch in self.batches]
        try:
            torch_file.write(partial, content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            log.warning("%s: could not be written (%s)", path, error.strerror)


def file_name(step: int, rank: int) -> str:
    """Of the update behind `step` finished ones; in names and messages updates count from 1."""
    return f"bad_batch_update{step + 1}_rank{rank}.pt"


def read(path: str | Path) -> BadBatch:
    """Raises CheckpointError in one line: missing, damaged, or another kind of file."""
    content = torch_file.read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: holds no recorded batch; name a file such as bad_batch_update7_rank0.pt")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: is of another version of the toolkit; use the one that wrote it")
    names = [name for name in BadBatch.__dataclass_fields__ if name != "batches"]
    try:
        values = {name: content[name] for name in names}
        return BadBatch(**values, batches=tuple(_from_plain(batch) for batch in content["batches"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error}); use another file") from None


def _to_plain(batch: Batch) -> dict[str, Any]:
    tensors = {name: getattr(batch, name) for name in _TENSORS}
    plain: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in tensors.items()}
    plain |= {name: getattr(batch, name) for name in _PLAIN}
    lists = {name: getattr(batch, name) for name in _TUPLES}
    plain |= {name: None if value is None else list(value) for name, value in lists.items()}
    return plain | {"sub_batches": [list(astuple(sub)) for sub in batch.sub_batches]}


def _from_plain(plain: Mapping[str, Any]) -> Batch:
    tensors = {name: plain[name] for name in _TENSORS}
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or name in _NEEDED_TENSORS):
            raise TypeError(f"{name} is no tensor")
    fields: dict[str, Any] = {**tensors, **{name: plain[name] for name in _PLAIN}}
    for name in _TUPLES:
        fields[name] = None if plain[name] is None else tuple(plain[name])
    return Batch(**fields, sub_batches=tuple(SubBatch(*sub) for sub in plain["sub_batches"]))
