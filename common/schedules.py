"""Learning-rate policies and the Gumbel temperature: pure functions of the number of completed updates."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from common.errors import ConfigError


def poly(
    step: int,
    *,
    lr: float,
    warmup_updates: int,
    hold_updates: int = 0,
    max_update: int,
    power: float = 1.0,
    initial_lr_scale: float = 0.0,
    final_lr_scale: float = 0.0,
) -> float:
    """Linear warm-up, hold, then a polynomial down to final_lr_scale * lr at max_update.

    The decay is counted from the end of the hold, so the curve has no jump there.
    """
    start = warmup_updates + hold_updates
    if step <= start:
        return _warmup(step, lr, warmup_updates, initial_lr_scale)
    final = final_lr_scale * lr
    if step >= max_update:
        return final
    return final + (lr - final) * (1 - (step - start) / (max_update - start)) ** power


def exp(
    step: int,
    *,
    lr: float,
    warmup_updates: int,
    hold_updates: int = 0,
    max_update: int,
    initial_lr_scale: float = 0.01,
    final_lr_scale: float = 0.05,
    lr_exp_decay: float | None = None,
) -> float:
    """Tri-stage: linear warm-up, hold, then exponential decay to final_lr_scale * lr at max_update.

    `lr_exp_decay` is a factor per update; without it the factor is the one that ends at final_lr_scale * lr.
    The rate never falls below final_lr_scale * lr.
    """
    start = warmup_updates + hold_updates
    if step <= start:
        return _warmup(step, lr, warmup_updates, initial_lr_scale)
    final = final_lr_scale * lr
    if lr_exp_decay is not None:
        return max(lr * lr_exp_decay ** (min(step, max_update) - start), final)
    if step >= max_update:
        return final
    return max(lr * final_lr_scale ** ((step - start) / (max_update - start)), final)


def cosine(
    step: int,
    *,
    lr: float,
    warmup_updates: int,
    hold_updates: int = 0,
    max_update: int,
    initial_lr_scale: float = 0.0,
    final_lr_scale: float = 0.1,
) -> float:
    """Linear warm-up, hold, then half a cosine down to final_lr_scale * lr at max_update."""
    start = warmup_updates + hold_updates
    if step <= start:
        return _warmup(step, lr, warmup_updates, initial_lr_scale)
    final = final_lr_scale * lr
    if step >= max_update:
        return final
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * (step - start) / (max_update - start)))


def noam(step: int, *, lr: float, d_model: int, warmup_updates: int, min_lr: float = 0.0) -> float:
    """lr * d_model^-0.5 * min(n^-0.5, n * warmup^-1.5) with n = max(1, step); after warm-up at least min_lr.

    `lr` is a scale here: the peak, at the end of the warm-up, is lr / sqrt(d_model * warmup_updates).
    """
    count = max(1, step)
    rate = lr * d_model**-0.5 * min(count**-0.5, count * warmup_updates**-1.5)
    return max(rate, min_lr) if count > warmup_updates else rate


def gumbel_temperature(step: int, start: float, end: float, factor: float) -> float:
    """Temperature of the quantizer after `step` updates: start * factor^step, at least `end`."""
    return max(start * factor**step, end)


POLICIES: dict[str, Callable[..., float]] = {"poly": poly, "exp": exp, "cosine": cosine, "noam": noam}

# Settings whose flag has another name.
_FLAGS = {"power": "--lr_poly_power", "d_model": "--encoder_embed_dim"}


def make_schedule(policy: str, **settings: float | None) -> Callable[[int], float]:
    """A policy with its settings -> function from the number of completed updates to the learning rate.

    Args:
        policy: a name in POLICIES.
        settings: keyword arguments of that policy; None means "not given", so the policy's default holds.

    Raises:
        ConfigError: unknown policy, missing or foreign setting, or a value that makes no curve.
    """
    complete = all_settings(policy, **settings)
    return partial(POLICIES[policy], **complete)


def all_settings(policy: str, **settings: float | None) -> dict[str, Any]:
    """All settings of a policy, with its defaults for those that are not given (see make_schedule, and its errors)."""
    if policy not in POLICIES:
        raise ConfigError(f"--lr_policy {policy}: unknown policy; choose one of {', '.join(POLICIES)}")
    given = {name: value for name, value in settings.items() if value is not None}
    parameters = inspect.signature(POLICIES[policy]).parameters
    for name in given:
        if name not in parameters:
            raise ConfigError(f"{_flag(name)}: has no effect with --lr_policy {policy}; remove it")
    resolved: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name == "step":
            continue
        if name not in given and parameter.default is parameter.empty:
            raise ConfigError(f"{_flag(name)}: --lr_policy {policy} needs a value; give one")
        resolved[name] = given.get(name, parameter.default)
    _check(policy, resolved)
    return resolved


def _warmup(step: int, lr: float, warmup_updates: int, initial_lr_scale: float) -> float:
    """From initial_lr_scale * lr at step 0 up to lr at warmup_updates, lr after that."""
    if step >= warmup_updates:
        return lr
    initial = initial_lr_scale * lr
    return initial + (lr - initial) * step / warmup_updates


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name}")


def _check(policy: str, settings: dict[str, float | None]) -> None:
    """Refuse values that make no curve, naming their flags."""
    for name, value in settings.items():
        if value is None:
            continue
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{_flag(name)} {value}: must be a number of at least 0; give such a value")
        if name in ("initial_lr_scale", "final_lr_scale") and value > 1:
            raise ConfigError(f"{_flag(name)} {value}: is a fraction of --lr; give a value from 0 to 1")
        if name == "max_update" and value < 1:
            raise ConfigError(f"--max_update {value}: nothing to train; give a number of updates from 1")
    if policy == "noam":
        _check_noam(settings)
        return
    warmup, hold, end = (settings[name] or 0 for name in ("warmup_updates", "hold_updates", "max_update"))
    if warmup + hold > end:
        raise ConfigError(
            f"--warmup_updates {warmup} --hold_updates {hold}: together they are more than --max_update {end}, "
            "so the learning rate would never decay; lower them or raise --max_update"
        )
    if policy == "exp":
        _check_exp(settings)


def _check_exp(settings: dict[str, float | None]) -> None:
    decay = settings["lr_exp_decay"]
    if decay is not None and not 0 < decay <= 1:
        raise ConfigError(f"--lr_exp_decay {decay}: is a factor per update; give a value above 0 and at most 1")
    if decay is None and settings["final_lr_scale"] == 0:
        raise ConfigError(
            "--final_lr_scale 0: an exponential never reaches 0; "
            "give a value above 0 (0.05 in the recipes), or --lr_exp_decay, or --lr_policy poly"
        )


def _check_noam(settings: dict[str, float | None]) -> None:
    for name in ("d_model", "warmup_updates"):
        if settings[name] == 0:
            raise ConfigError(f"{_flag(name)} 0: --lr_policy noam divides by it; give a value from 1")
