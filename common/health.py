"""Rules on logged figures that tell a sick run from a healthy one: first a warning, then the end of the run.

It knows metrics by the names that it is given. Everything that a rule remembers goes into the checkpoint, so a
resumed run stops where the uninterrupted one would.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from common.checkpoint import update_path
from common.errors import TrainingError

log = logging.getLogger(__name__)

MIN_HISTORY = 10  # healthy figures that make a median
MAX_HISTORY = 100
SKIPPED = "skipped in a row"


@dataclass(frozen=True)
class Limit:
    """A figure that a healthy run keeps on the other side of: passed at `bound` or above, or below `bound`.

    `flag` sets the bound. relative: the bound is a multiple of the median of what the figure was while all was well.
    warned_at: the share of the bound from which on the figure is worth a warning, where it does not only end the run.
    """

    metric: str
    side: Literal["above", "below"]
    bound: float
    flag: str
    relative: bool = False
    warned_at: float = 1.0

    def passed(self, value: float, median: float | None = None, share: float = 1.0) -> bool:
        """Whether the figure is on the wrong side of a share of the bound; never without the median that it needs."""
        if self.relative and median is None:
            return False
        bound = share * self.bound * ((median or 0.0) if self.relative else 1.0)
        return value >= bound if self.side == "above" else value < bound

    def told(self, value: float, median: float | None = None) -> str:
        """The figure with its bound, for a message."""
        bound = f"{self.bound:g}" + (f" x its median {median:.3g}" if self.relative and median is not None else "")
        side = "" if not self.passed(value, median) else "not below " if self.side == "above" else "below "
        return f"{self.metric} {value:.4g} ({side}--{self.flag} {bound})"


@dataclass(frozen=True)
class Rule:
    """A sickness: all limits are passed, at every look for `patience` updates.

    It looks when more than `grace` updates are finished. It warns when half of its patience is over; without patience
    when its limits are passed as far as they are `warned_at`. `shown`: further figures for its message; `remedies`:
    what to do, the best first.
    """

    name: str
    limits: tuple[Limit, ...]
    remedies: tuple[str, ...]
    patience: int = 0
    grace: int = 0
    shown: tuple[str, ...] = ()


class Health:
    """Judges the figures of a run by rules, and knows its last healthy checkpoint."""

    def __init__(self, rules: Sequence[Rule], action: str, folder: str | Path) -> None:
        """`folder`: of the checkpoints; `action`: "stop", "warn" (never ends the run) or "off" (does not look)."""
        self._rules = tuple(rules) if action != "off" else ()
        self._stops = action == "stop"
        self._folder = Path(folder)
        self._since: dict[str, int] = {}  # rule -> update at which it first found the run sick
        self._warned: list[str] = []
        self._history: dict[str, list[float]] = {
            limit.metric: [] for rule in self._rules for limit in rule.limits if limit.relative
        }
        self._skipped = 0
        self._healthy: int | None = None

    def check(self, update: int, figures: Mapping[str, float]) -> None:
        """Judge the figures at this update; rules whose figures are not among them wait.

        Figures that are not finite are left out. Raises TrainingError when a sickness has lasted too long.
        """
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        able = [
            rule for rule in self._rules if update > rule.grace and all(limit.metric in known for limit in rule.limits)
        ]
        sick = [rule for rule in able if self._passed(rule, known, warned=True)]
        for rule in able:
            if rule not in sick:
                self._recover(rule, update)
        if able and not sick:
            for name in self._history.keys() & known.keys():
                self._history[name] = [*self._history[name], known[name]][-MAX_HISTORY:]
        for rule in sick:
            self._suffer(rule, update, known)

    def count(self, update: int, *, skipped: bool) -> None:
        """Take note of every update that was tried: how many have been skipped in a row is a figure, too."""
        before, self._skipped = self._skipped, self._skipped + 1 if skipped else 0
        if skipped or before:
            self.check(update, {SKIPPED: float(self._skipped)})

    def saved(self, update: int) -> None:
        """A checkpoint of this update is being written: it counts as healthy if no rule finds anything."""
        if not self._since:
            self._healthy = update

    @property
    def kept(self) -> tuple[int, ...]:
        """The update of the checkpoint that is not to be removed."""
        return () if self._healthy is None else (self._healthy,)

    @property
    def last_healthy(self) -> str:
        """For messages: where the last healthy checkpoint is."""
        if self._healthy is None:
            return "there is no healthy checkpoint yet"
        return f"the last healthy checkpoint is {update_path(self._folder, self._healthy)}"

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            "since": dict(self._since),
            "warned": list(self._warned),
            "history": {name: list(values) for name, values in self._history.items()},
            "skipped": self._skipped,
            "healthy": self._healthy,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` (see state_dict); what belongs to rules that are off now is dropped."""
        names = {rule.name for rule in self._rules}
        self._since = {name: update for name, update in state["since"].items() if name in names}
        self._warned = [name for name in state["warned"] if name in names]
        for name in self._history:
            self._history[name] = list(state["history"].get(name, ()))
        self._skipped, self._healthy = state["skipped"], state["healthy"]

    def _median(self, limit: Limit) -> float | None:
        history = self._history.get(limit.metric, []) if limit.relative else []
        return statistics.median(history) if len(history) >= MIN_HISTORY else None

    def _passed(self, rule: Rule, figures: Mapping[str, float], *, warned: bool = False) -> bool:
        """Whether all limits of a rule are passed, or as far as it warns."""
        return all(
            limit.passed(figures[limit.metric], self._median(limit), limit.warned_at if warned else 1.0)
            for limit in rule.limits
        )

    def _recover(self, rule: Rule, update: int) -> None:
        self._since.pop(rule.name, None)
        if rule.name in self._warned:
            self._warned.remove(rule.name)
            log.info("health: %s is over at update %d", rule.name, update)

    def _suffer(self, rule: Rule, update: int, figures: Mapping[str, float]) -> None:
        since = self._since.setdefault(rule.name, update)
        lasted, warned = update - since, rule.name in self._warned
        if self._stops and self._passed(rule, figures) and lasted >= rule.patience and (warned or not rule.patience):
            self._end(rule, update, lasted, figures)
        if 2 * lasted >= rule.patience and not warned:
            self._warned.append(rule.name)
            log.warning(
                "health: %s at update %d: %s%s; %s",
                *(rule.name, update, self._told(rule, figures), self._outlook(rule, update), self._advice(rule)),
            )

    def _outlook(self, rule: Rule, update: int) -> str:
        """For a warning: what follows."""
        if not self._stops:
            return ""
        end = self._since[rule.name] + rule.patience
        return "; ends the run if it lasts" + (f", until update {end}" if end > update else "")

    def _end(self, rule: Rule, update: int, lasted: int, figures: Mapping[str, float]) -> NoReturn:
        duration = f", for {lasted} updates now" if lasted else ""
        raise TrainingError(
            f"{rule.name} at update {update}: {self._told(rule, figures)}{duration}; {self._advice(rule)} "
            "(--health warn goes on regardless)"
        )

    def _told(self, rule: Rule, figures: Mapping[str, float]) -> str:
        limits = [limit.told(figures[limit.metric], self._median(limit)) for limit in rule.limits]
        told = {limit.metric for limit in rule.limits}
        more = [f"{name} {figures[name]:.4g}" for name in rule.shown if name in figures and name not in told]
        return ", ".join([*limits, *more])

    def _advice(self, rule: Rule) -> str:
        possible = [one for one in rule.remedies if self._healthy is not None or "last healthy checkpoint" not in one]
        numbered = ", ".join(f"{number}. {remedy}" for number, remedy in enumerate(possible, start=1))
        return f"{self.last_healthy}; try {numbered}"
