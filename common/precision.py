"""O2 mixed precision: half-precision model, fp32 master weights, dynamic loss scaling, clipping; and autocast.

A training step calls backward() per micro-batch, then clip_grad_norm(), then step().
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import distributed
from common.errors import TrainingError
from common.optim import Adam, check_names, check_shapes
from common.sharding import assign, is_sharded, local

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
        self.window = window
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
        if self._since_overflow % self.window == 0:
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
        if self._overflows_since_change / self._since_change < self._tolerance:
            return
        lower = self.scale / self._factor
        if self._threshold is not None:
            lower = max(lower, self._threshold)
        if lower <= self._minimum:
            raise TrainingError(
                f"fp16 loss scale {self.scale:g}: the gradients overflow even at this scale, and the next one would "
                f"reach the minimum {self._minimum:g}, so the model has most likely diverged; continue from an "
                "earlier checkpoint with a lower --lr or a longer --warmup_updates, or use --bf16"
            )
        self._change(lower)

    def _change(self, scale: float) -> None:
        self.scale = scale
        self._since_change = 0
        self._overflows_since_change = 0


def to_half(module: nn.Module, dtype: torch.dtype, keep_fp32: Sequence[nn.Module] = ()) -> None:
    """Convert the floating parameters and buffers of `module` to `dtype`, in place, except those of `keep_fp32`.

    The kept submodules cast what goes in and out themselves. What the submodules share with others is kept.
    """
    kept = {id(tensor) for part in keep_fp32 for tensor in _tensors(part)}
    for tensor in _tensors(module):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Context in which operations on fp32 weights choose `dtype` where that is safe; None: no change."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class _Weight:
    """A parameter of the model, its master, and the gradient that the master is updated with."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name = name
        self.parameter = parameter
        self.is_copy = parameter.dtype in HALF
        self.is_sharded = is_sharded(parameter)
        self.master = parameter.detach().float() if self.is_copy else parameter
        self._buffer = torch.empty_like(self.master) if self.is_copy else None

    @property
    def model_gradient(self) -> Tensor:
        """What backward left, in the precision of the model; of a sharded parameter this process's share."""
        if self.parameter.grad is not None:
            return local(self.parameter.grad) if self.is_sharded else self.parameter.grad
        if self.is_sharded:  # nobody waits for it, so a part that is left out is not touched
            return torch.zeros_like(local(self.parameter))
        raise RuntimeError(
            f"{self.name}: no gradient; freeze its group, or let it take part in the loss (0 * its sum will do)"
        )

    @property
    def gradient(self) -> Tensor:
        """In the precision of the master."""
        return self.model_gradient if self._buffer is None else self._buffer


class MixedPrecisionOptimizer:
    """Adam on fp32 master weights behind a model of any precision.

    A parameter in fp32 or fp64 is its own master; one in fp16 or bf16 gets an fp32 copy that is updated and then
    rounded back into the model. No step waits for the device, except that fp16 reads one number: the norm.
    Of sharded parameters (common/sharding.py) every process updates its shares; weights and moments are sharded, too.
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
        """`groups`: group -> (name, parameter) pairs; `scaler` only for fp16 (O2 or autocast).

        Where the model has already been rounded to half precision, load_master() gives the masters the
        weights from before.
        """
        self.scaler = scaler
        self._groups = {key: [_Weight(name, parameter) for name, parameter in group] for key, group in groups.items()}
        self._adam = Adam(
            {key: [(weight.name, weight.master) for weight in group] for key, group in self._groups.items()},
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self._masters = {weight.name: weight.master.detach() for weight in self._all()}
        self._sharded = any(weight.is_sharded for weight in self._all())
        self._frozen: frozenset[str] = frozenset()
        self._norm: Tensor | None = None
        self._divisor: Tensor | None = None  # what the update divides the gradients by

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by."""
        return self.scaler.scale if self.scaler else 1.0

    @property
    def num_skipped(self) -> int:
        """Updates skipped so far because their gradients overflowed."""
        return self.scaler.num_skipped if self.scaler else 0

    def freeze(self, group_names: Collection[str]) -> None:
        """From now on exactly these groups keep weights, moments and step count; no gradient of theirs counts."""
        unknown = set(group_names) - set(self._groups)
        if unknown:
            raise ValueError(f"no parameter groups {sorted(unknown)}; there are {sorted(self._groups)}")
        self._frozen = frozenset(group_names)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss * loss_scale to those of the parameters."""
        (loss * self.scaler.scale if self.scaler else loss).backward()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Let step() unscale the gradients and shrink them to a total norm of at most `max_norm` (0: leave their size).

        The coefficient is min(1, max_norm / (norm + 1e-6)). To be called once per update, before step(), whose kernel
        divides by it: no pass over the gradients of its own.

        Returns:
            The L2 norm of all unscaled gradients before clipping, () on the device.
        """
        norms = torch.stack(torch._foreach_norm(self._collect_gradients()))
        norm = torch.linalg.vector_norm(norms)
        if self._sharded:
            norm = distributed.sum_across_ranks(norm.double().square(), norm.device).sqrt().to(norm.dtype)
        self._norm = norm / self.loss_scale
        if max_norm > 0:
            self._divisor = ((self._norm + 1e-6) / max_norm).clamp(min=1.0).float() * self.loss_scale
        elif self.scaler:
            self._divisor = torch.full_like(self._norm, self.loss_scale, dtype=torch.float32)
        return self._norm

    @torch.no_grad()
    def step(self, lr: float) -> bool:
        """Update the weights and clear the gradients; False if fp16 overflowed and the update was skipped.

        Raises:
            TrainingError: fp16 overflowed and its scale cannot go lower.
        """
        norm = self.clip_grad_norm(0.0) if self._norm is None else self._norm
        # Every rank has the same norm, so every rank decides the same.
        if self.scaler and self.scaler.update(math.isfinite(norm.item())) == "skipped":
            self.zero_grad()
            return False
        active = {key: group for key, group in self._groups.items() if key not in self._frozen}
        gradients = {key: [weight.gradient for weight in group] for key, group in active.items()}
        self._adam.step(lr, gradients, self._divisor)
        self._round_into_model(self._active())
        self.zero_grad()
        return True

    def zero_grad(self) -> None:
        """Forget all gradients; step() does it too."""
        for weight in self._all():
            weight.parameter.grad = None
        self._norm = self._divisor = None

    def master_weights(self) -> dict[str, Tensor]:
        """Parameter name -> weight in full precision (shared with the optimizer, not copied)."""
        return dict(self._masters)

    @torch.no_grad()
    def load_master(self, weights: Mapping[str, Tensor]) -> None:
        """Set masters and model from full-precision weights; other entries (buffers, say) are ignored.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        masters = self.master_weights()
        found = {name: weights[name] for name in masters if name in weights}
        check_names("model weights", found, masters)
        check_shapes("model weights", found, masters)
        for name, master in masters.items():
            assign(master, found[name])
        self._round_into_model(self._all())

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """The L2 norm of this process's master weights or shares of them, () on the device: finite if they all are."""
        own = [local(weight.master) for weight in self._all()]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own)))

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> exp_avg, exp_avg_sq, step; weights and scaler are saved by their own names."""
        return self._adam.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from `state` (see state_dict).

        Raises:
            CheckpointError: the state of other parameters than these.
        """
        self._adam.load_state_dict(state)

    def _all(self) -> list[_Weight]:
        return [weight for group in self._groups.values() for weight in group]

    def _active(self) -> list[_Weight]:
        return [weight for key, group in self._groups.items() if key not in self._frozen for weight in group]

    def _collect_gradients(self) -> list[Tensor]:
        """The gradients of the weights that are trained now, in the precision of their masters."""
        weights = self._active()
        copies = [weight for weight in weights if weight.is_copy]
        if copies:
            torch._foreach_copy_([weight.gradient for weight in copies], [weight.model_gradient for weight in copies])
        return [weight.gradient for weight in weights]

    @staticmethod
    def _round_into_model(weights: Sequence[_Weight]) -> None:
        copies = [weight for weight in weights if weight.is_copy]
        if copies:
            torch._foreach_copy_([weight.parameter for weight in copies], [weight.master for weight in copies])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
