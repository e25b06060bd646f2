"""A run against reference curves: where every milestone stands, whether the run has collapsed, and the verdict."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.health import Rule
from utils.reference_curves import Point, Reference, ReferenceCurve, nearest
from utils.run_log import RunLog
from wav2vec2.health_rules import make_rules, training_figures

Place = Literal["within", "above", "below"]
Standing = Literal["within", "better", "outside", "collapsed", "nothing to compare"]

SLIGHTLY = 0.25  # of the width of the band
# Healthy runs go through these phases, too, so they count only after this share of all updates.
PHASES = {"distance_to_chance": 0.75, "val_blank_share": 0.25}
IN_A_ROW, VALIDATIONS_IN_A_ROW = 3, 2  # figures that must say so


@dataclass(frozen=True)
class Compared:
    """One quantity of the run at one milestone."""

    curve: ReferenceCurve
    point: Point
    update: int
    value: float

    @property
    def place(self) -> Place:
        """Where the value lies."""
        return "below" if self.value < self.point.low else "above" if self.value > self.point.high else "within"

    @property
    def outside(self) -> bool:
        """Whether it lies beside the band, on a side that is not better."""
        return self.place != "within" and not self.better

    @property
    def better(self) -> bool:
        """Whether it lies beside the band, on the better side."""
        return (self.place, self.curve.better) in (("above", "higher"), ("below", "lower"))

    @property
    def words(self) -> str:
        """Where it lies: "slightly below", "above (better)" and so on."""
        if self.place == "within":
            return "within"
        low, high = self.point.low, self.point.high
        distance = low - self.value if self.place == "below" else self.value - high
        slightly = "slightly " if distance <= SLIGHTLY * (high - low) else ""
        return slightly + self.place + (" (better)" if self.better else "")

    def line(self) -> str:
        """What is told about it."""
        point, unit = self.point, f" {self.curve.unit}" if self.curve.unit else ""
        where = "" if self.update == point.update else f" (logged at {self.update})"
        return (
            f"update {point.update}{where}: {self.curve.title} {figure(self.value)}{unit}, "
            f"reference {figure(point.low)} to {figure(point.high)}{unit}: {self.words}"
        )


@dataclass(frozen=True)
class Verdict:
    """What is to be said of the whole run."""

    standing: Standing
    text: str


def figure(value: float) -> str:
    """A number with three or four digits that say something."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def compare(run: RunLog, reference: Reference) -> list[Compared]:
    """All milestones that the run has a value for, by quantity and update."""
    found = []
    for curve in reference.curves:
        for point in curve.points:
            value = nearest(run.curves.get(curve.metric, {}), point, curve.window)
            if value:
                found.append(Compared(curve, point, *value))
    return found


def judge(run: RunLog, reference: Reference, compared: Sequence[Compared]) -> Verdict:
    """The verdict: a collapse first, then where the last milestone of every quantity lies."""
    collapse = collapsed(run)
    if collapse:
        return Verdict("collapsed", collapse)
    if not compared:
        first = min(point.update for curve in reference.curves for point in curve.points)
        text = f"nothing to compare: the log ends at update {run.last_update}, the reference begins at {first}"
        return Verdict("nothing to compare", text)
    curves = {id(item.curve): [other for other in compared if other.curve is item.curve] for item in compared}
    outside = [_outside(items) for items in curves.values() if items[-1].outside]
    if outside:
        return Verdict("outside", "; ".join(outside))
    better = [items[-1].curve.title for items in curves.values() if items[-1].better]
    text = f"better than the reference band ({', '.join(better)})" if better else "within the reference band"
    earlier = [f"{item.curve.title} at update {item.point.update}" for item in compared if item.outside]
    text += f"; outside before: {', '.join(earlier)}" if earlier else ""
    planned = reference.match["max_update"]
    text += f"; so far: the log ends at update {run.last_update}" if run.last_update < planned else ""
    return Verdict("better" if better else "within", text)


def _outside(items: Sequence[Compared]) -> str:
    """Since when a quantity has been outside."""
    first = items[-1]
    for item in reversed(items):
        if not item.outside:
            break
        first = item
    return f"{first.curve.title} {items[-1].place} the reference band from update {first.point.update}"


def collapsed(run: RunLog) -> str:
    """Why going on with this run is no use, and since when; empty where nothing says so.

    What ends a run (docs/metrics.md), with the run's own thresholds; but without patience, which a short run, or one
    with --health warn, outlives.
    """
    losses = run.curves.get("train_loss", {})
    broken = _at_the_end(losses, [update for update in losses if not math.isfinite(losses[update])])
    if broken:
        return f"the loss is not finite from update {broken[0]}"
    config = run.settings()
    figures = {update: training_figures(config, run.at(update)) for update in run.updates}
    for rule in make_rules(config):
        if not any(limit.relative for limit in rule.limits):
            told = _told(rule, figures, config.optim.max_update)
            if told:
                return told
    return ""


def _told(rule: Rule, figures: Mapping[int, Mapping[str, float]], max_update: int) -> str:
    """What a rule says of a run from some update to its end; empty where it says nothing."""
    metrics = [limit.metric for limit in rule.limits]
    begin = max(rule.grace, *(PHASES.get(metric, 0.0) * max_update for metric in metrics))
    looks = [update for update, values in figures.items() if all(metric in values for metric in metrics)]
    sick = [
        update
        for update in looks
        if update > begin and all(limit.passed(figures[update][limit.metric]) for limit in rule.limits)
    ]
    streak = _at_the_end(looks, sick)
    if len(streak) < (VALIDATIONS_IN_A_ROW if metrics[0].startswith("val_") else IN_A_ROW):
        return ""
    last = ", ".join(limit.told(figures[streak[-1]][limit.metric]) for limit in rule.limits)
    return f"collapsed from update {streak[0]}: {rule.name}; {last}"


def _at_the_end(updates: Iterable[int], chosen: Sequence[int]) -> list[int]:
    """The chosen ones behind which there is none that is not chosen, in order."""
    last = max(set(updates) - set(chosen), default=-1)
    return sorted(update for update in chosen if update > last)
