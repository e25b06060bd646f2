"""Reference curves as data: reading them, and finding the one that a run can be compared with.

The format is described in docs/reference_curves/README.md.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from common.errors import ConfigError, one_line
from utils.run_log import RunLog

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference_curves"
SCHEMA = 1
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Point:
    """The band at one update; mean: of the runs behind it."""

    update: int
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class ReferenceCurve:
    """One quantity over the updates.

    metric: its name in nvlog.json; better: the side of the band on which a run is better; window: how many updates
    away from a point the run's value may be.
    """

    metric: str
    title: str
    unit: str
    better: Better
    window: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Reference:
    """The curves of one recipe on one corpus.

    match: what a run must have to be compared without being asked (see `fits`); source, band: where the figures come
    from, and how the band was chosen.
    """

    name: str
    title: str
    mode: str
    match: dict[str, Any]
    source: str
    band: str
    curves: tuple[ReferenceCurve, ...]


def read_reference(path: Path) -> Reference:
    """Read a file of reference curves. Raises ConfigError that names what is wrong with it."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({one_line(error)}); see docs/reference_curves/README.md") from None
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
        raise ConfigError(f'{path}: has no "schema": {SCHEMA}; see docs/reference_curves/README.md')
    try:
        return Reference(
            curves=tuple(_curve(curve, path) for curve in entry["curves"]),
            **{name: entry[name] for name in ("name", "title", "mode", "match", "source", "band")},
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: {one_line(error)} is missing or wrong; see docs/reference_curves/README.md"
        ) from None


def _curve(entry: dict[str, Any], path: Path) -> ReferenceCurve:
    keys = ("update", "low", "high", "mean")
    points = tuple(Point(**{key: point[key] for key in keys}) for point in entry["points"])
    updates = [point.update for point in points]
    if updates != sorted(set(updates)) or not points:
        raise ConfigError(f"{path}: {entry['metric']}: updates must grow from point to point; correct the file")
    for point in points:
        if not point.low <= point.mean <= point.high:
            raise ConfigError(
                f"{path}: {entry['metric']}, update {point.update}: low, mean, high must be in order; correct the file"
            )
    if entry["better"] not in ("higher", "lower", "neither"):
        raise ConfigError(f'{path}: {entry["metric"]}: "better" must be higher, lower or neither; correct the file')
    return ReferenceCurve(
        entry["metric"], entry["title"], entry["unit"], cast(Better, entry["better"]), entry["window"], points
    )


def shipped() -> list[Reference]:
    """All references of this toolkit, by name."""
    return [read_reference(path) for path in sorted(FOLDER.glob("*.json"))]


def fits(reference: Reference, run: RunLog) -> bool:
    """Whether a run has the mode, width, length and amount of speech of a reference.

    An amount that the log cannot rule out yet is no obstacle.
    """
    wanted, (least, most) = reference.match, run.hours()
    same = (
        reference.mode == run.mode
        and run.section("model").get("encoder_embed_dim") == wanted["encoder_embed_dim"]
        and run.section("optim").get("max_update") == wanted["max_update"]
    )
    low, high = wanted["hours"]
    return same and least <= high and low <= most


def choose(run: RunLog, name: str) -> Reference:
    """The reference that is asked for by name or file, or without one the only one that fits the run.

    Raises ConfigError with all names where there is no such reference, or not exactly one that fits.
    """
    references = shipped()
    names = [reference.name for reference in references if reference.mode == run.mode]
    if name:
        for reference in references:
            if reference.name == name:
                return reference
        if Path(name).is_file():
            return read_reference(Path(name))
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(
            f"--reference {name}: no such file, and no such name"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; choose one of {', '.join(names)}"
        )
    found = [reference for reference in references if fits(reference, run)]
    if len(found) != 1:
        raise ConfigError(f"{run.folder}: {_why_not(run, found)}; choose with --reference, one of {', '.join(names)}")
    return found[0]


def _why_not(run: RunLog, found: Sequence[Reference]) -> str:
    if found:
        return f"{' and '.join(reference.name for reference in found)} fit what is known so far"
    least, most = run.hours()
    told = f"{least:.3f} to {most:.3f} h of speech"
    width, updates = run.section("model").get("encoder_embed_dim"), run.section("optim").get("max_update")
    return f"no reference for {run.mode}, width {width}, {updates} updates, {told}"


def nearest(curve: dict[int, float], point: Point, window: int) -> tuple[int, float] | None:
    """Update and value of a run's curve closest to a point, at most `window` updates away; only finite values count."""
    close = [update for update in curve if abs(update - point.update) <= window and math.isfinite(curve[update])]
    if not close:
        return None
    update = min(close, key=lambda known: (abs(known - point.update), known))
    return update, curve[update]
