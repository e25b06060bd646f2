"""The picture of a run over its reference curves."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from utils import program
from utils.curve_verdicts import Compared, Verdict
from utils.reference_curves import Reference, ReferenceCurve
from utils.run_log import RunLog

BAND, RUN = "#7f9fbf", "#c2410c"
MARKS = {"outside": ("X", "#991b1b"), "within": ("o", RUN), "better": ("^", "#15803d")}


def draw(out: Path, run: RunLog, reference: Reference, compared: Sequence[Compared], verdict: Verdict) -> None:
    """Write a PNG with one panel per quantity. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png: needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 1 if len(reference.curves) == 1 else 2
    rows = -(-len(reference.curves) // columns)
    size = (8 if columns == 1 else 12.8, 3.4 * rows + 1.3)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for axes, curve in zip(panels, reference.curves, strict=False):
        panel(axes, curve, run, [item for item in compared if item.curve is curve])
    for axes in panels[len(reference.curves) :]:
        axes.set_axis_off()
    told = f"{run.folder.resolve().name} against {reference.title}", verdict.text
    lines = [line for text in told for line in textwrap.wrap(text, 11 * int(size[0]))]
    figure.suptitle("\n".join(lines), fontsize="medium")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3 * columns)
    with program.writing(out):
        figure.savefig(out, format="png", dpi=130)
    pyplot.close(figure)


def panel(axes: Any, curve: ReferenceCurve, run: RunLog, compared: Sequence[Compared]) -> None:  # noqa: ANN401 - optional
    """Band, its mean, the run's line, and the milestones by where they lie."""
    updates = [point.update for point in curve.points]
    low, high = [point.low for point in curve.points], [point.high for point in curve.points]
    axes.fill_between(updates, low, high, color=BAND, alpha=0.35, label="reference band")
    axes.plot(updates, [point.mean for point in curve.points], color=BAND, marker=".", label="reference mean")
    values = run.curves.get(curve.metric, {})
    axes.plot(list(values), list(values.values()), color=RUN, linewidth=1.2, label="this run")
    for kind, (marker, color) in MARKS.items():
        items = [item for item in compared if kind == _kind(item)]
        if items:
            places = [item.update for item in items], [item.value for item in items]
            axes.plot(*places, marker, color=color, markersize=7, label=f"milestone, {kind}")
    axes.set(title=curve.title, xlabel="updates", ylabel=curve.unit or "share (0 to 1)", xlim=(0, None))
    _limits(axes, curve, [v for update, v in values.items() if update >= updates[0] - curve.window and isfinite(v)])
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.grid(alpha=0.3)


def _limits(axes: Any, curve: ReferenceCurve, values: Sequence[float]) -> None:  # noqa: ANN401
    """Room for the band and the run; what is before the band, where a run begins far from it, may be cut off."""
    bottom = min([*(point.low for point in curve.points), *values])
    top = max([*(point.high for point in curve.points), *values])
    margin = 0.08 * (top - bottom)
    axes.set_ylim(bottom - margin, top + margin)


def _kind(item: Compared) -> str:
    return "outside" if item.outside else "better" if item.better else "within"
