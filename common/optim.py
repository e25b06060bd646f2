"""Parameter groups, and Adam with decoupled weight decay as in the original wav2vec 2.0."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError

# Group name -> (parameter name, parameter), in the order of the module.
Groups = Mapping[str, Sequence[tuple[str, Tensor]]]


def parameter_groups(module: nn.Module, group_of: Callable[[str], str]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters of `module` by the group that `group_of` gives for their names."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name), []).append((name, parameter))
    return groups


class _DividingAdamW(torch.optim.AdamW):
    """AdamW whose kernel divides the gradients by `grad_scale`, which torch.amp.GradScaler sets in the same way."""

    grad_scale: Tensor | None = None


class Adam:
    """Adam with decoupled weight decay on every parameter.

    With m and v the running means of the gradient and its square, in update t of a group:

        p -= lr * weight_decay * p
        p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    eps is not bias-corrected, unlike in torch.optim.AdamW, which divides by sqrt(v) / c + eps' where
    c = sqrt(1 - beta2^t). With eps' = eps / c that is (sqrt(v) + eps) / c, so its update
    lr / (1 - beta1^t) * m / (sqrt(v) / c + eps') = lr * c / (1 - beta1^t) * m / (sqrt(v) + eps) is the one above.
    That keeps torch's fused kernel: one launch for many parameters, no wait for the device.
    """

    def __init__(self, groups: Groups, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """`groups` hold the tensors to be updated in place; each has its gradient in `.grad`."""
        self._eps = eps
        self._beta2 = betas[1]
        self._parameters = {name: tensor for group in groups.values() for name, tensor in group}
        self._group_of = {name: key for key, group in groups.items() for name, _ in group}
        self._steps = dict.fromkeys(groups, 0)
        self._keys = [key for key, group in groups.items() if group]
        self._adamw = _DividingAdamW(
            [{"params": [tensor for _, tensor in groups[key]]} for key in self._keys],
            lr=0.0,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
        # Made here and not in the first step, so that a checkpoint always holds every parameter.
        for tensor in self._parameters.values():
            self._adamw.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }

    def step(self, lr: float, frozen: Collection[str] = (), divisor: Tensor | None = None) -> None:
        """One update; groups in `frozen` must have no gradients and keep weights, moments and step count.

        `divisor`: a float32 number on the device, by which the kernel divides all gradients (clipping, loss scale).
        """
        for key, group in zip(self._keys, self._adamw.param_groups, strict=True):
            group["lr"] = lr
            if key not in frozen:
                self._steps[key] += 1
                group["eps"] = self._eps / math.sqrt(1 - self._beta2 ** self._steps[key])
        self._adamw.grad_scale = divisor
        self._adamw.step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> exp_avg, exp_avg_sq (tensors) and step (int: updates made)."""
        return {
            name: {
                "exp_avg": self._adamw.state[tensor]["exp_avg"],
                "exp_avg_sq": self._adamw.state[tensor]["exp_avg_sq"],
                "step": self._steps[self._group_of[name]],
            }
            for name, tensor in self._parameters.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from `state` (see state_dict).

        Raises:
            CheckpointError: other names or shapes than these parameters, or a group with several step counts.
        """
        check_names("optimizer state", state, self._parameters)
        shapes = {name: entry["exp_avg"] for name, entry in state.items()}
        check_shapes("optimizer state", shapes, self._parameters)
        steps: dict[str, set[int]] = {key: set() for key in self._steps}
        for name, entry in state.items():
            steps[self._group_of[name]].add(int(entry["step"]))
        for key, found in steps.items():
            if len(found) > 1:
                raise CheckpointError(
                    f"optimizer state: the parameters of group {key} have step counts {sorted(found)}; "
                    "use a checkpoint of a run with the same parameter groups, or start a new run from its weights"
                )
            self._steps[key] = max(found, default=0)
        for name, tensor in self._parameters.items():
            kept = self._adamw.state[tensor]
            kept["exp_avg"].copy_(state[name]["exp_avg"])
            kept["exp_avg_sq"].copy_(state[name]["exp_avg_sq"])
            kept["step"].fill_(self._steps[self._group_of[name]])


def check_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise CheckpointError that lists missing and unexpected parameter names."""
    found, expected = set(found), set(expected)
    problems = [
        f"{kind} {_some(sorted(names))}"
        for kind, names in (("missing", expected - found), ("unexpected", found - expected))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{what}: does not belong to this model ({'; '.join(problems)}); "
            "use a checkpoint of the same architecture, or start a new run from its weights"
        )


def check_shapes(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError that lists the tensors whose shape is not the expected one."""
    other = [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    if other:
        raise CheckpointError(
            f"{what}: other shapes than this model's ({_some(other)}); use a checkpoint of the same architecture"
        )


def _some(items: Sequence[str], limit: int = 5) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
