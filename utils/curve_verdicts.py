"""A run against reference curves: where every milestone stands, whether the run has collapsed, and the verdict."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from utils.reference_curves import Point, Reference, ReferenceCurve, nearest
from utils.run_log import Curve, RunLog

Place = Literal["within", "above", "below"]
Standing = Literal["within", "better", "outside", "collapsed", "nothing to compare"]

SLIGHTLY = 0.25  # of the width of the band
# What docs/metrics.md calls a collapse: accuracy near 1 though nearly all frames have the same code in every group.
COLLAPSED_ACCURACY, COLLAPSED_CODES = 0.95, 2.0
# Bits between the contrastive loss and log2(1 + negatives); a recogniser that writes nothing. Healthy runs go through
# such phases, too, so they count only after this share of all updates.
AT_CHANCE, CHANCE_AFTER = 1e-3, 0.75
BLANK_SHARE, BLANK_AFTER = 0.999, 0.25
IN_A_ROW = 3  # lines that must say so


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
    return Verdict(
        "better" if better else "within", text + (f"; outside before: {', '.join(earlier)}" if earlier else "")
    )


def _outside(items: Sequence[Compared]) -> str:
    """Since when a quantity has been outside."""
    first = items[-1]
    for item in reversed(items):
        if not item.outside:
            break
        first = item
    return f"{first.curve.title} {items[-1].place} the reference band from update {first.point.update}"


def collapsed(run: RunLog) -> str:
    """Why going on with this run is no use, and since when; empty where nothing says so."""
    broken = _streak(run.curves.get("train_loss", {}), lambda update, value: not math.isfinite(value), 1)
    if broken:
        return f"the loss is not finite from update {broken}"
    return _collapsed_codes(run) if run.mode == "pretrain" else _only_blanks(run)


def _collapsed_codes(run: RunLog) -> str:
    codes = run.curves.get("train_code_perplexity", {})
    limit = COLLAPSED_CODES * int(run.section("model").get("latent_groups", 2))
    first = _streak(
        run.curves.get("train_accuracy", {}),
        lambda update, value: value > COLLAPSED_ACCURACY and codes.get(update, math.inf) < limit,
    )
    if first:
        return f"collapsed from update {first}: nearly all frames have the same code (code_perplexity below {limit:g})"
    chance = math.log2(1 + int(run.section("objective").get("num_negatives", 100)))
    begin = CHANCE_AFTER * float(run.section("optim").get("max_update", 0))
    first = _streak(
        run.curves.get("train_loss_0", {}), lambda update, value: abs(value - chance) < AT_CHANCE and update > begin
    )
    return f"collapsed from update {first}: the contrastive loss stands at chance, {chance:.2f} bits" if first else ""


def _only_blanks(run: RunLog) -> str:
    begin = BLANK_AFTER * float(run.section("optim").get("max_update", 0))
    first = _streak(
        run.curves.get("val_blank_share", {}), lambda update, value: value >= BLANK_SHARE and update > begin, 2
    )
    return f"collapsed from update {first}: it writes nothing but blanks" if first else ""


def _streak(curve: Curve, bad: Callable[[int, float], bool], least: int = IN_A_ROW) -> int | None:
    """First update of the bad values at the end of a curve; None where they are fewer than `least`."""
    streak = list(_bad_at_the_end(curve, bad))
    return streak[-1] if len(streak) >= least else None


def _bad_at_the_end(curve: Curve, bad: Callable[[int, float], bool]) -> Iterator[int]:
    for update in sorted(curve, reverse=True):
        if not bad(update, curve[update]):
            return
        yield update
