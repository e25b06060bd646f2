"""Sums, means, maxima and last values kept on the device until reduce(): one all-reduce, one read."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from common import distributed

Reduction = Literal["sum", "mean", "last", "max"]


class Metrics:
    """Accumulates scalar metrics between two log lines.

    `sum`: over add() calls and ranks; `mean`: over add() calls and ranks; `max`: over both;
    `last`: the value of the latest add() on rank 0.
    """

    def __init__(self, reductions: Mapping[str, Reduction]) -> None:
        """Take the table of every metric that may be added."""
        for name, reduction in reductions.items():
            if reduction not in get_args(Reduction):
                raise ValueError(f"metric {name!r}: reduction {reduction!r} is none of {get_args(Reduction)}")
        self._reductions = dict(reductions)
        self._numbers: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take one micro-batch's values; tensors (one element, any dtype) are neither read nor waited for.

        Raises KeyError for a metric that is not in the table.
        """
        for name, value in values.items():
            if name not in self._reductions:
                raise KeyError(f"metric {name!r} is not in the table of metrics")
            if isinstance(value, Tensor):
                self._add_tensor(name, value.detach())
            else:
                self._add_number(name, float(value))
            self._counts[name] = self._counts.get(name, 0) + 1

    def so_far(self, names: Collection[str]) -> dict[str, Tensor]:
        """What the tensors of these metrics add up to in this process; neither read, nor changed by a later add()."""
        return {name: self._tensors[name] for name in names if name in self._tensors}

    def reduce(self, device: torch.device | str) -> dict[str, float]:
        """Combine over all ranks, read the result once and start anew; every rank must call it.

        Metrics that no rank has added are left out. Order: that of the table.
        """
        rank, world = distributed.rank(), distributed.world_size()
        starts, width = self._layout(world)
        packed = [0.0] * width
        places, tensors = [], []
        for name, start in starts.items():
            reduction = self._reductions[name]
            slots, own = (world, rank) if reduction == "max" else (1, 0)
            number_at, tensor_at = start + 1 + own, start + 1 + slots + own
            if reduction == "max":
                packed[number_at] = packed[tensor_at] = -math.inf
            if name not in self._counts or (reduction == "last" and rank != 0):
                continue
            packed[start] = float(self._counts[name])
            if name in self._numbers:
                packed[number_at] = self._numbers[name]
            if name in self._tensors:
                places.append(tensor_at)
                tensors.append(self._tensors[name].to(device))
        vector = torch.tensor(packed, dtype=torch.float64, device=device)
        if tensors:
            vector[torch.tensor(places, device=device)] = torch.stack(tensors)
        combined = distributed.sum_across_ranks(vector, device).tolist()
        self._numbers, self._tensors, self._counts = {}, {}, {}
        return self._unpack(combined, starts, world)

    def _add_tensor(self, name: str, value: Tensor) -> None:
        if value.numel() != 1:
            raise ValueError(f"metric {name!r}: a tensor of shape {tuple(value.shape)} is not one number")
        # float64: counts of samples pass 2^24, beyond which float32 sums lose units
        value = value.reshape(()).to(torch.float64, copy=True)
        before = self._tensors.get(name)
        if self._reductions[name] == "last":
            self._numbers.pop(name, None)
        elif before is not None:
            value = torch.maximum(before, value) if self._reductions[name] == "max" else before + value
        self._tensors[name] = value

    def _add_number(self, name: str, value: float) -> None:
        reduction = self._reductions[name]
        if reduction == "last":
            self._tensors.pop(name, None)
            self._numbers[name] = value
        elif reduction == "max":
            self._numbers[name] = _maximum([self._numbers.get(name, -math.inf), value])
        else:
            self._numbers[name] = self._numbers.get(name, 0.0) + value

    def _layout(self, world: int) -> tuple[dict[str, int], int]:
        """Where each metric starts in the packed vector, and the length of the vector.

        A metric takes its count, then the sum of its plain numbers, then the sum of its tensors (a maximum: one
        of each per rank). Each rank fills only its own places, so one sum over ranks serves every reduction.
        """
        starts, width = {}, 0
        for name, reduction in self._reductions.items():
            starts[name] = width
            width += 1 + 2 * (world if reduction == "max" else 1)
        return starts, width

    def _unpack(self, combined: list[float], starts: dict[str, int], world: int) -> dict[str, float]:
        result = {}
        for name, start in starts.items():
            reduction = self._reductions[name]
            slots = 2 * (world if reduction == "max" else 1)
            count, values = combined[start], combined[start + 1 : start + 1 + slots]
            if count == 0:
                continue
            if reduction == "max":
                result[name] = _maximum(values)
            else:
                result[name] = sum(values) / count if reduction == "mean" else sum(values)
        return result


def _maximum(values: list[float]) -> float:
    """Largest value; NaN if there is one (the built-in max() depends on the order then)."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
