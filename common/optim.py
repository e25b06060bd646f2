"""Parameter groups, and Adam with decoupled weight decay as in the original wav2vec 2.0."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from common.errors import CheckpointError
from common.sharding import assign, local

# Group name -> (parameter name, parameter), in the order of the module.
Groups = Mapping[str, Sequence[tuple[str, Tensor]]]


def parameter_groups(module: nn.Module, group_of: Callable[[str], str]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters of `module` by the group that `group_of` gives for their names."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name), []).append((name, parameter))
    return groups


class _Group:
    """Tensors that are updated together, and their state."""

    def __init__(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        self.names = [name for name, _ in parameters]
        self.parameters = [tensor.detach() for _, tensor in parameters]
        # Made here and not in the first step, so that a checkpoint always holds every parameter.
        self.exp_avgs = [torch.zeros_like(tensor) for tensor in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(tensor) for tensor in self.parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=tensor.device) for tensor in self.parameters]
        # What the kernel works on: of sharded tensors the shares of this process.
        kinds = self.parameters, self.exp_avgs, self.exp_avg_sqs
        self.shares = [[local(tensor) for tensor in kind] for kind in kinds]
        self.updates = 0


class Adam:
    """Adam with decoupled weight decay on every parameter.

    With m and v the running means of the gradient and its square, in update t of a group:

        p -= lr * weight_decay * p
        p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    eps is not bias-corrected, unlike in torch's AdamW, which divides by sqrt(v) / c + eps' where
    c = sqrt(1 - beta2^t). With eps' = eps / c that is (sqrt(v) + eps) / c, so its update
    lr / (1 - beta1^t) * m / (sqrt(v) / c + eps') = lr * c / (1 - beta1^t) * m / (sqrt(v) + eps) is the one above.
    That keeps torch's fused kernel: one launch for many parameters, no wait for the device. Its function is called
    rather than the class torch.optim.AdamW, which imports torch's compiler: 0.8 s and 70 MB.
    """

    def __init__(self, groups: Groups, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """`groups` hold the tensors to be updated in place."""
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._groups = {key: _Group(group) for key, group in groups.items()}

    @torch.no_grad()
    def step(self, lr: float, gradients: Mapping[str, Sequence[Tensor]], divisor: Tensor | None = None) -> None:
        """One update of the groups in `gradients`; the others keep weights, moments and step count.

        Gradients are laid out in memory like their parameters, as autograd gives them: the kernel goes by place. Of
        sharded parameters they are the shares of this process.
        `divisor`: a float32 number on the device, by which the kernel divides all gradients (clipping, loss scale).
        """
        for key, of_group in gradients.items():
            group = self._groups[key]
            group.updates += 1
            parameters, exp_avgs, exp_avg_sqs = group.shares
            adamw(
                parameters,
                list(of_group),
                exp_avgs,
                exp_avg_sqs,
                [],
                group.steps,
                fused=True,
                grad_scale=divisor,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=lr,
                weight_decay=self._weight_decay,
                eps=self._eps / math.sqrt(1 - self._betas[1] ** group.updates),
                maximize=False,
            )

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> exp_avg, exp_avg_sq (tensors) and step (int: updates made)."""
        return {
            name: {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": group.updates}
            for group in self._groups.values()
            for name, exp_avg, exp_avg_sq in zip(group.names, group.exp_avgs, group.exp_avg_sqs, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from `state` (see state_dict).

        Raises:
            CheckpointError: other names or shapes than these parameters, or a group with several step counts.
        """
        own = {name: entry["exp_avg"] for name, entry in self.state_dict().items()}
        check_names("optimizer state", state, own)
        check_shapes("optimizer state", {name: entry["exp_avg"] for name, entry in state.items()}, own)
        for key, group in self._groups.items():
            found = sorted({int(state[name]["step"]) for name in group.names})
            if len(found) > 1:
                raise CheckpointError(
                    f"optimizer state: the parameters of group {key} have step counts {found}; "
                    "use a checkpoint of a run with the same parameter groups, or start a new run from its weights"
                )
            group.updates = max(found, default=0)
        with torch.no_grad():
            for group in self._groups.values():
                for name, exp_avg, exp_avg_sq, step in zip(
                    group.names, group.exp_avgs, group.exp_avg_sqs, group.steps, strict=True
                ):
                    assign(exp_avg, state[name]["exp_avg"])
                    assign(exp_avg_sq, state[name]["exp_avg_sq"])
                    step.fill_(group.updates)


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
