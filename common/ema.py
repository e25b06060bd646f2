"""Exponential moving average of the master weights, swapped into the model for evaluation."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, ConfigError
from common.optim import check_names, check_shapes
from common.sharding import assign, local

log = logging.getLogger(__name__)


class Ema:
    """average = decay * average + (1 - decay) * weights, in fp32 or better; decay 0 or None: does nothing."""

    def __init__(self, decay: float | None, weights: Mapping[str, Tensor]) -> None:
        """Start from `weights` (parameter name -> master weight).

        Raises:
            ConfigError: decay outside of [0, 1).
        """
        self._decay = decay or 0.0
        if not 0 <= self._decay < 1:
            raise ConfigError(f"--ema {decay}: must be from 0 (off) to below 1; 0.999 and 0.9999 are usual")
        self._average = (
            {name: weight.detach().to(_wide(weight.dtype), copy=True) for name, weight in weights.items()}
            if self.active
            else {}
        )
        self._shares = [local(average) for average in self._average.values()]

    @property
    def active(self) -> bool:
        """Whether there is an average."""
        return self._decay > 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards `weights`."""
        if self.active:
            new = [local(weights[name]).to(average.dtype) for name, average in self._average.items()]
            torch._foreach_lerp_(self._shares, new, 1 - self._decay)

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Within the context `module` has the averaged weights (in its own precision), afterwards its own again."""
        if not self.active:
            yield
            return
        named: dict[str, Tensor] = dict(module.named_parameters())
        parameters = [local(named[name].detach()) for name in self._average]
        with torch.no_grad():
            own = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, self._shares)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> averaged weight (shared, not copied); empty when off."""
        return dict(self._average)

    def state_dict(self) -> dict[str, Tensor] | None:
        """The averaged weights, None when off."""
        return self.weights() if self.active else None

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Continue from `state` (see state_dict); when off, a stored average is dropped with a warning.

        Raises:
            CheckpointError: no average stored although one is wanted, or one of other weights.
        """
        if not self.active:
            if state is not None:
                log.warning("the checkpoint holds averaged weights, which end here because --ema is off")
            return
        if state is None:
            raise CheckpointError(
                "averaged weights: the checkpoint was written without --ema; "
                "continue without --ema, or start a new run from its weights"
            )
        check_names("averaged weights", state, self._average)
        check_shapes("averaged weights", state, self._average)
        for name, average in self._average.items():
            assign(average, state[name])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
