"""Adam's moments in the checkpoints of other programs <-> by parameter name.

They number the parameters in the order of the module, or keep one flat vector over all of them (16-bit runs).
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError
from wav2vec2.convert.names import NameTable

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[str, dict[str, Tensor]]  # moment -> parameter -> value


def read(
    where: str, state: Mapping[str, Any], order: Sequence[tuple[str, torch.Size]]
) -> tuple[Moments, dict[str, int]]:
    """Moments by moment and parameter name, and the updates that each parameter has had.

    A parameter that never had a gradient has zeros. Raises CheckpointError if the state is that of another model.
    """
    entries = state.get("state")
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        raise _other(where, "it has no moments")
    total = sum(shape.numel() for _, shape in order)
    if set(entries) == {0} and len(order) > 1 and _numel(entries[0]) == total:
        sizes = [shape.numel() for _, shape in order]
        flat = {moment: entries[0][moment].float().flatten().split(sizes) for moment in MOMENTS}
        moments = {
            moment: {name: piece.view(shape) for (name, shape), piece in zip(order, pieces, strict=True)}
            for moment, pieces in flat.items()
        }
        return moments, dict.fromkeys(moments["exp_avg"], _step(where, entries[0], state))
    if not set(entries) <= set(range(len(order))):
        raise _other(where, f"it has {len(entries)} entries, the model {len(order)} parameters")
    found: Moments = {moment: {} for moment in MOMENTS}
    steps = {}
    for number, (name, shape) in enumerate(order):
        entry = entries.get(number)
        for moment in MOMENTS:
            value = torch.zeros(shape) if entry is None else entry.get(moment)
            if not isinstance(value, Tensor) or value.shape != shape:
                raise _other(where, f"{moment} of {name} is not of shape {list(shape)}")
            found[moment][name] = value.float()
        steps[name] = 0 if entry is None else _step(where, entry, state)
    return found, steps


def to_native(
    where: str, moments: Moments, steps: Mapping[str, int], table: NameTable, native_names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """This toolkit's optimizer state, and remarks.

    It counts updates once for the trunk and once for the output layer, so the highest count of each is taken:
    where layers sat out some updates (LayerDrop), their counts are a little lower.
    """
    by_moment = {moment: table.to_native(where, moments[moment], native_names) for moment in MOMENTS}
    counts: dict[bool, set[int]] = {True: set(), False: set()}
    of_name = {name: max(steps.get(part, 0) for part in table.foreign(name)) for name in native_names}
    for name in native_names:
        counts[name.startswith("proj.")].add(of_name[name])
    remarks = [
        f"the optimizer counts {min(group)} to {max(group)} updates, depending on the parameter; {max(group)} is taken"
        for group in counts.values()
        if len(group - {0}) > 1
    ]
    state = {
        name: {
            **{moment: by_moment[moment][name] for moment in MOMENTS},
            "step": max(counts[name.startswith("proj.")]),
        }
        for name in by_moment["exp_avg"]
    }
    return state, remarks


def write(
    optimizer: Mapping[str, Mapping[str, Any]], table: NameTable, order: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """The entries of torch's optimizer state, numbered by `order` (original names)."""
    moments = {moment: table.to_foreign({n: entry[moment] for n, entry in optimizer.items()}) for moment in MOMENTS}
    steps = {part: entry["step"] for name, entry in optimizer.items() for part in table.foreign(name)}
    return {
        number: {"step": steps[name], **{moment: moments[moment][name] for moment in MOMENTS}}
        for number, name in enumerate(order)
        if name in steps
    }


def _numel(entry: Mapping[str, Any]) -> int:
    value = entry.get("exp_avg")
    return value.numel() if isinstance(value, Tensor) else 0


def _step(where: str, entry: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """The count of updates beside the moments, or beside the options of the group."""
    groups = state.get("param_groups") or [{}]
    step = entry.get("step", groups[0].get("step") if isinstance(groups[0], Mapping) else None)
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, (int, float)):
        raise _other(where, "it does not count its updates")
    return int(step)


def _other(where: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{where}: its optimizer state cannot be used ({reason}); start from its weights alone")
