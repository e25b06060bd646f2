"""O2 mixed precision: half-precision model, fp32 master weights, dynamic loss scaling, clipping; and autocast.

A training step calls backward() per micro-batch, then clip_grad_norm(), then step().
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import TrainingError
from common.optim import Adam, check_names, check_shapes

HALF = (torch.float16, torch.bfloat16)


class LossScaler:
    """The dynamic loss scale of fp16: down at an overflow, up after `window` updates without one.

    An overflow lowers the scale when overflows make up at least `tolerance` of the updates since the scale last
    changed, and never below `threshold` (None: no such floor). An update that would bring the scale to `minimum`
    or below ends the run. Pure Python; the scale is a power of `factor` times `init`, so scaling is exact.
    """

    def __init__(
        self,
        *,
        init: float = 128.0,
        factor: float = 2.0,
        window: int = 2**14,
        tolerance: float = 0.0,
        threshold: float | None = None,
        minimum: float = 1e-4,
    ) -> None:
        self.scale = float(init)
        self.num_skipped = 0
        self._factor = factor
        self._window = window
        self._tolerance = tolerance
        self._threshold = threshold
        self._minimum = minimum
        self._since_overflow = 0
        self._since_change = 0
        self._overflows_since_change = 0

    @staticmethod
    def default_window(world_size: int, update_freq: int) -> int:
        """Updates between two doublings: about 2^14 backward passes, whatever the layout."""
        return max(1, int(2**14 / world_size / update_freq))

    def update(self, finite: bool) -> Literal["applied", "skipped"]:
        """Report whether this update's gradients are finite -> what becomes of the update.

        Raises:
            TrainingError: the scale would reach the minimum; `scale` stays what it was.
        """
        self._since_change += 1
        if not finite:
            self._overflow()
            return "skipped"
        self._since_overflow += 1
        if self._since_overflow % self._window == 0:
            self._change(self.scale * self._factor)
        return "applied"

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers."""
        return {
            "scale": self.scale,
            "num_skipped": self.num_skipped,
            "since_overflow": self._since_overflow,
            "since_change": self._since_change,
            "overflows_since_change": self._overflows_since_change,
        }

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Continue from `state` (see state_dict)."""
        self.scale = float(state["scale"])
        self.num_skipped = int(state["num_skipped"])
        self._since_overflow = int(state["since_overflow"])
        self._since_change = int(state["since_change"])
        self._overflows_since_change = int(state["overflows_since_change"])

    def _overflow(self) -> None:
        self.num_skipped += 1
        self._since_overflow = 0
        self._overflows_since_change += 1
        if self._overflows_since_change < self._tolerance * self._since_change:
            return
        lower = self.scale / self._factor
        if self._threshold is not None:
            lower = max(lower, self._threshold)
        if lower <= self._minimum:
            raise TrainingError(
                f"fp16 loss scale {self.scale:g}: the gradients overflow even at this scale, and the next one would "
                f"reach the minimum {self._minimum:g}, so the model has most likely diverged; continue from an "
                "earlier checkpoint with a lower --learning_rate or a longer --warmup_updates, or use --bf16"
            )
        self._change(lower)

    def _change(self, scale: float) -> None:
        self.scale = scale
        self._since_change = 0
        self._overflows_since_change = 0


class MixedPrecisionOptimizer:
    """Adam on fp32 master weights behind a model of any precision.

    A parameter in fp32 or fp64 is its own master; one in fp16 or bf16 gets an fp32 copy that is updated and then
    rounded back into the model. No step waits for the device, except that fp16 reads one number: the norm.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[tuple[str, nn.Parameter]]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scaler: LossScaler | None = None,
    ) -> None:
        """`groups`: name -> (parameter name, parameter); `scaler` only for fp16 (O2 or autocast)."""
        self.scaler = scaler
        self._groups = {
            key: [_Slot(name, parameter) for name, parameter in group] for key, group in groups.items()
        }
        self._adam = Adam(
            {key: [(slot.name, slot.master) for slot in slots] for key, slots in self._groups.items()},
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self._frozen: frozenset[str] = frozenset()
        self._norm: Tensor | None = None

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by."""
        return self.scaler.scale if self.scaler else 1.0

    @property
    def num_skipped(self) -> int:
        """Updates skipped so far because their gradients overflowed."""
        return self.scaler.num_skipped if self.scaler else 0

    def freeze(self, group_names: Collection[str]) -> None:
        """From now on exactly these groups keep weights, moments and step count; their gradients count nowhere."""
        unknown = set(group_names) - set(self._groups)
        if unknown:
            raise ValueError(f"no parameter groups {sorted(unknown)}; there are {sorted(self._groups)}")
        self._frozen = frozenset(group_names)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss * loss_scale to those of the parameters."""
        (loss * self.scaler.scale if self.scaler else loss).backward()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Unscale the gradients and shrink them to a total norm of at most `max_norm` (0: do not shrink).

        The coefficient is min(1, max_norm / (norm + 1e-6)). To be called once per update.

        Returns:
            The L2 norm of all unscaled gradients before clipping, () on the device.
        """
        slots = self._active()
        missing = [slot.name for slot in slots if slot.parameter.grad is None]
        if missing:
            raise RuntimeError(
                f"no gradient for {len(missing)} parameters of the groups that are trained now, such as {missing[0]}: "
                "freeze their group, or let them take part in the loss"
            )
        _copy_all([slot.gradient for slot in slots if slot.is_copy], [slot.parameter.grad for slot in slots if slot.is_copy])
        gradients = [slot.gradient for slot in slots]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self.loss_scale
        factor: Tensor | None = None
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale
        elif self.scaler:
            factor = torch.full_like(norm, 1 / self.loss_scale)
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        self._norm = norm
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> bool:
        """Update the weights and clear the gradients; False if fp16 overflowed and the update was skipped.

        Raises:
            TrainingError: fp16 overflowed and its scale cannot go lower.
        """
        norm = self.clip_grad_norm(0.0) if self._norm is None else self._norm
        applied = self.scaler is None or self.scaler.update(math.isfinite(norm.item())) == "applied"
        if applied:
            ...
        return applied
