"""Adam's moments in the checkpoints of other programs <-> by parameter name.

They number the parameters in the order of the module, or (16-bit runs) keep one flat vector over all of them.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, shown
from common.schedules import make_schedule
from wav2vec2.config import Config
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.names import NameTable
from wav2vec2.convert.stand_ins import count_in, number_in

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_COUNTERS = ("num_skipped", "since_overflow", "since_change", "overflows_since_change")

# Original names that the optimizer sees as one parameter, in its order: mostly one, or q, k and v stacked.
Groups = Sequence[Sequence[str]]


def read(
    where: str,
    state: Mapping[str, Any],
    groups: Groups,
    weights: Mapping[str, Tensor],
    table: NameTable,
    native_names: Sequence[str],
    idle: Collection[str] = (),
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """This toolkit's optimizer state without `idle` parameters, and remarks; without a gradient there are zeros.

    It counts updates once for the trunk and once for the output layer, so the highest count of each is taken:
    where layers sat out some updates (LayerDrop), their counts are a little lower.
    Raises CheckpointError if the state is that of another model.
    """
    entries = _entries(where, state, groups, weights)
    steps: dict[bool, set[int]] = {True: set(), False: set()}
    by_name: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for names, entry in zip(groups, entries, strict=True):
        if names[0] in idle:
            continue
        if entry is not None:
            steps[names[0].endswith((".proj.weight", ".proj.bias"))].add(_step(where, entry, state))
        for moment in MOMENTS:
            by_name[moment] |= _apart(where, moment, entry, names, weights)
    native = {moment: table.to_native(where, by_name[moment], native_names) for moment in MOMENTS}
    remarks = [
        f"the optimizer counts {min(found)} to {max(found)} updates, depending on the parameter; {max(found)} is taken"
        for found in steps.values()
        if len(found) > 1
    ]
    count = {is_output: max(found, default=0) for is_output, found in steps.items()}
    return {
        name: {**{moment: native[moment][name] for moment in MOMENTS}, "step": count[name.startswith("proj.")]}
        for name in native[MOMENTS[0]]
    }, remarks


def write(contents: Contents, groups: Groups, table: NameTable, *, flat: bool) -> dict[str, Any]:
    """The optimizer state as torch's optimizers keep it; `flat`: one vector over all parameters."""
    moments = {
        moment: table.to_foreign({name: entry[moment] for name, entry in (contents.optimizer or {}).items()})
        for moment in MOMENTS
    }
    steps = {part: entry["step"] for name, entry in (contents.optimizer or {}).items() for part in table.foreign(name)}
    weights = table.to_foreign(contents.weights)
    last = max(steps.values(), default=0)
    entries: dict[int, dict[str, Any]] = {}
    for number, names in enumerate(groups):
        pieces = {
            moment: torch.cat([found[n] if n in found else torch.zeros_like(weights[n]).float() for n in names])
            for moment, found in moments.items()
        }
        entries[number] = {"step": steps.get(names[0], last), **pieces}
    if flat:
        vectors = {moment: torch.cat([entry[moment].flatten() for entry in entries.values()]) for moment in MOMENTS}
        entries = {0: {"step": last, **vectors}}
    scale = {"loss_scale": contents.scaler["scale"]} if contents.scaler else {}
    return {"state": entries, "param_groups": [_group(contents.config, len(entries), last)], **scale}


def scaler_state(state: Any) -> dict[str, Any] | None:
    """The state of the loss scaler, if the optimizer state has a scale; its counters begin anew."""
    scale = number_in(state, "loss_scale")
    if scale is None or scale <= 0:
        return None
    return {"scale": float(scale), **dict.fromkeys(SCALER_COUNTERS, 0)}


def _entries(
    where: str, state: Mapping[str, Any], groups: Groups, weights: Mapping[str, Tensor]
) -> list[Mapping[str, Any] | None]:
    """One entry per group, None where there is none; a flat vector is cut up."""
    found = state.get("state")
    if not isinstance(found, Mapping) or not all(isinstance(entry, Mapping) for entry in found.values()):
        raise _other(where, "it has no moments")
    sizes = [sum(weights[name].numel() for name in names) for names in groups]
    flat = found.get(0, {})
    if len(found) == 1 and len(groups) > 1 and _numel(flat) == sum(sizes):
        vectors = {moment: _unscaled(where, flat, moment, sum(sizes)).split(sizes) for moment in MOMENTS}
        step = {"step": _step(where, flat, state)}
        return [{moment: vectors[moment][i] for moment in MOMENTS} | step for i in range(len(groups))]
    if not set(found) <= set(range(len(groups))):
        strange = sorted(map(shown, set(found) - set(range(len(groups)))))
        raise _other(where, f"it is of parameter {strange[0]}, the model has {len(groups)}")
    return [found.get(number) for number in range(len(groups))]


def _apart(
    where: str, moment: str, entry: Mapping[str, Any] | None, names: Sequence[str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One moment of the parameters of a group, in their own shapes."""
    if entry is None:
        return {name: torch.zeros(weights[name].shape) for name in names}
    sizes = [weights[name].numel() for name in names]
    pieces = _unscaled(where, entry, moment, sum(sizes)).split(sizes)
    return {name: piece.view(weights[name].shape) for name, piece in zip(names, pieces, strict=True)}


def _unscaled(where: str, entry: Mapping[str, Any], moment: str, length: int) -> Tensor:
    """A moment as a vector in fp32; fairseq keeps 16-bit ones beside the scale that they were divided by."""
    value, scale = entry.get(moment), number_in({f"{moment}_scale": 1.0, **entry}, f"{moment}_scale")
    if not isinstance(value, Tensor) or not value.is_floating_point() or scale is None:
        raise _other(where, f"it has no {moment}")
    if value.numel() != length:
        raise _other(where, f"an {moment} has {value.numel()} entries instead of {length}")
    return value.float().flatten() * scale


def _numel(entry: Mapping[str, Any]) -> int:
    value = entry.get(MOMENTS[0])
    return value.numel() if isinstance(value, Tensor) else 0


def _step(where: str, entry: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """The count of updates beside the moments, or beside the options of the group."""
    options = state.get("param_groups")
    first = options[0] if isinstance(options, (list, tuple)) and options else {}
    step = count_in(entry if "step" in entry else first, "step")
    if step is None:
        raise _other(where, "it does not count its updates")
    return step


def _group(config: Config, parameters: int, step: int) -> dict[str, Any]:
    """The options of the one group of parameters, under the names of both programs."""
    optim = config.optim
    rate = make_schedule(**optim.schedule(config.model.encoder_embed_dim))
    return {
        "lr": rate(max(step, 1)),  # that of the next update, which NVIDIA's takes from here
        "betas": list(optim.adam_betas),
        "eps": optim.adam_eps,
        "weight_decay": optim.weight_decay,
        "amsgrad": False,
        "bias_correction": True,
        "step": step,
        "params": list(range(parameters)),
    }


def _other(where: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{where}: its optimizer state cannot be used ({reason}); start from its weights alone")
