"""How findings about lists are told: a text for people, a picture of the lengths, JSON for programs."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.manifest import Manifest
from common.errors import ConfigError
from utils import program
from utils.list_checks import KINDS, SHOWN, Checked, folders_in_both, shown_symbol

BIN_WIDTHS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)  # seconds
MOST_BINS = 16
BAR = 40  # characters of the longest bar
SYMBOLS_SHOWN = 20


@dataclass(frozen=True, eq=False)
class CheckedList:
    """A list and what was found; labels: where they are, or why they cannot be used (`labels_fault`)."""

    path: Path
    manifest: Manifest
    found: Checked
    labels: str = ""
    labels_fault: str = ""


@dataclass(frozen=True)
class Limit:
    """An option that leaves out (or, `crops`, cuts) utterances, and its value in seconds or samples."""

    flag: str
    value: float

    def effect(self, num_samples: np.ndarray, sample_rate: int) -> tuple[int, int]:
        """How many utterances it touches, and how many samples are lost; both bounds are kept."""
        if self.flag == "max_sample_size":
            touched = num_samples > self.value
            return int(touched.sum()), int((num_samples[touched] - int(self.value)).sum())
        sizes = num_samples if self.flag == "min_sample_size" else num_samples / sample_rate
        touched = sizes > self.value if self.flag == "max_duration" else sizes < self.value
        return int(touched.sum()), int(num_samples[touched].sum())


TYPICAL_LIMITS = (
    *(Limit("min_duration", value) for value in (1, 2)),
    *(Limit("max_duration", value) for value in (15.6, 20, 30)),
)


# ---- Numbers --------------------------------------------------------------------------------------------------------


def bin_edges(seconds: np.ndarray) -> np.ndarray:
    """Edges of a histogram from 0 s, in a round width; the last bin takes in the longest thousandth."""
    most = float(np.quantile(seconds, 0.999, method="lower"))
    width = next((width for width in BIN_WIDTHS if most / width <= MOST_BINS), most / MOST_BINS)
    number = int(most // width) + 1
    return np.append(np.arange(number) * width, max(number * width, float(seconds.max())))


def summary(num_samples: np.ndarray, edges: np.ndarray, limits: Sequence[Limit], sample_rate: int) -> dict[str, Any]:
    """Utterances, hours, lengths, their histogram and the effect of the limits, as JSON has it."""
    seconds = num_samples / sample_rate
    counts, _ = np.histogram(seconds, edges)
    sums, _ = np.histogram(seconds, edges, weights=seconds)
    effects = [(limit, *limit.effect(num_samples, sample_rate)) for limit in limits]
    return {
        "utterances": len(num_samples),
        "hours": float(seconds.sum()) / 3600,
        "seconds": {
            "shortest": float(seconds.min()),
            "median": float(np.median(seconds)),
            "longest": float(seconds.max()),
        },
        "histogram": {
            "edges": edges.tolist(),
            "utterances": counts.tolist(),
            "hours": (sums / 3600).tolist(),
        },
        "limits": [
            {"limit": limit.flag, "value": limit.value, "utterances": number, "hours": samples / sample_rate / 3600}
            for limit, number, samples in effects
        ],
    }


def sources(found: Iterable[Checked], sample_rate: int) -> list[dict[str, Any]]:
    """Kinds of files with utterances and hours, most hours first."""
    total: dict[Any, list[int]] = {}
    for part in found:
        for source, counts in part.sources.items():
            total[source] = [a + b for a, b in zip(total.get(source, (0, 0)), counts, strict=True)]
    ordered = sorted(total.items(), key=lambda item: (-item[1][1], item[0].kind, item[0].container))
    return [
        {
            "audio": source.kind,
            "container": source.container,
            "is_converted": source.is_converted,
            "utterances": number,
            "hours": samples / sample_rate / 3600,
        }
        for source, (number, samples) in ordered
    ]


def report(
    lists: Sequence[CheckedList], limits: Sequence[Limit], *, sample_rate: int, decoded: bool, dictionary: str
) -> dict[str, Any]:
    """Everything that was found, as one dictionary for JSON; the text is made of it."""
    everything = np.concatenate([part.manifest.num_samples for part in lists])
    edges = bin_edges(everything / sample_rate)
    return {
        "sample_rate": sample_rate,
        "decoded": decoded,
        "dictionary": dictionary,
        "lists": [
            {
                "list": str(part.path),
                **summary(part.manifest.num_samples, edges, limits, sample_rate),
                "sources": sources([part.found], sample_rate),
                "labels": part.labels,
                "labels_fault": part.labels_fault,
                "unknown_symbols": dict(part.found.unknown.most_common()),
                "findings": [finding for finding in _findings(part, sample_rate) if finding["utterances"]],
            }
            for part in lists
        ],
        "together": {
            **summary(everything, edges, limits, sample_rate),
            "sources": sources([part.found for part in lists], sample_rate),
        },
        "folders_in_both": [
            {"lists": [str(one.path), str(other.path)], "folders": folders}
            for one, other in itertools.combinations(lists, 2)
            if (folders := folders_in_both(one.found, other.found))
        ],
    }


def _findings(part: CheckedList, sample_rate: int) -> Iterator[dict[str, Any]]:
    """Every kind: how many utterances and hours, in which lines, and the first of them in words."""
    for kind in KINDS:
        offending = part.found.has(kind.name)
        yield {
            "kind": kind.name,
            "is_error": kind.is_error,
            "utterances": int(offending.sum()),
            "hours": float(part.manifest.num_samples[offending].sum()) / sample_rate / 3600,
            "lines": [line_number(part.manifest, index) for index in np.flatnonzero(offending).tolist()],
            "first": [vars(offender) for offender in part.found.first.get(kind.name, [])],
        }


def line_number(manifest: Manifest, index: int) -> int:
    """The line of an utterance in its list."""
    return int(manifest.where(index).rpartition(":")[2])


# ---- Text -----------------------------------------------------------------------------------------------------------


def text(content: dict[str, Any]) -> Iterator[str]:
    """The lines of the report: every list, all together, then what was found."""
    parts = [(Path(part["list"]).name, part) for part in content["lists"]]
    if len(parts) > 2:
        parts.append(("together", content["together"]))
    for name, part in parts:
        yield from _part_text(name, part, content["dictionary"] or "no dictionary")
        yield ""
    yield from _findings_text(content)


def _part_text(name: str, part: dict[str, Any], dictionary: str) -> Iterator[str]:
    seconds = part["seconds"]
    yield (
        f"{name}: {part['utterances']:,} utterances, {_hours(part['hours'])} h, {seconds['shortest']:.2f} to "
        f"{seconds['longest']:.2f} s, median {seconds['median']:.2f} s"
    )
    rows = [
        [source["audio"], source["container"], *_amount(source), "converted when read" * source["is_converted"]]
        for source in part["sources"]
    ]
    yield from _table(["audio", "container", "utterances", "hours", ""], rows, "<<>><")
    if part.get("labels_fault"):
        yield "  labels    cannot be used, see below"
    elif "labels" in part:
        yield f"  labels    {part['labels']}, {dictionary}" if part["labels"] else "  labels    none"
    if part.get("unknown_symbols"):
        yield f"            not in the dictionary: {_symbols(part['unknown_symbols'])}"
    yield from _histogram_text(part["histogram"])
    rows = [
        [
            f"--{limit['limit']} {limit['value']:g}",
            *_amount(limit),
            f"{100 * limit['hours'] / part['hours']:.2f} %",
            "would be cut off" if limit["limit"] == "max_sample_size" else "would be left out",
        ]
        for limit in part["limits"]
        if limit["utterances"]
    ]
    yield from _table(["limit", "utterances", "hours", "", ""], rows, "<>>><")


def _histogram_text(histogram: dict[str, Any]) -> Iterator[str]:
    """A line per bin; the bars are of utterances."""
    edges, counts = histogram["edges"], histogram["utterances"]
    most = max(counts)
    rows = [
        [f"{low:g} to {high:.4g}", f"{count:,}", _hours(hours), "#" * -(-BAR * count // most)]
        for low, high, count, hours in zip(edges, edges[1:], counts, histogram["hours"], strict=False)
    ]
    yield from _table(["seconds", "utterances", "hours", ""], rows, ">>><")


def _findings_text(content: dict[str, Any]) -> Iterator[str]:
    """What was found, errors first, the first offenders of a kind over all lists."""
    for part in content["lists"]:
        if part["labels_fault"]:
            yield f"error  labels: {part['labels_fault']}"
    for kind in KINDS:
        found = [finding for part in content["lists"] for finding in part["findings"] if finding["kind"] == kind.name]
        number = sum(finding["utterances"] for finding in found)
        if not number:
            continue
        severity = "error " if kind.is_error else "remark"
        hours = sum(finding["hours"] for finding in found)
        yield f"{severity} {kind.name}: {kind.meaning}; {number:,} utterances, {_hours(hours)} h"
        first = [offender for finding in found for offender in finding["first"]][:SHOWN]
        yield from (f"    {offender['where']}: {offender['path']}: {offender['detail']}" for offender in first)
        if number > len(first):
            yield f"    and {number - len(first):,} more"
    for both in content["folders_in_both"]:
        one, other = (Path(name).name for name in both["lists"])
        yield (
            f"remark folders: {both['folders']:,} folders have files in both {one} and {other}; if folders are "
            "speakers, they are on both sides"
        )


def _amount(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['utterances']:,}", _hours(row["hours"])


def _hours(hours: float) -> str:
    """Hours, of small corpora with more digits."""
    return f"{hours:,.2f}" if hours >= 10 else f"{hours:.3f}"


def _symbols(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{shown_symbol(symbol)} {n:,} times" for symbol, n in list(counts.items())[:SYMBOLS_SHOWN])
    return shown + (f" and {len(counts) - SYMBOLS_SHOWN} others" if len(counts) > SYMBOLS_SHOWN else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Aligned columns below a head; nothing without rows."""
    if rows:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
            yield ("  " + "  ".join(cells)).rstrip()


# ---- Picture --------------------------------------------------------------------------------------------------------


def draw_lengths(out: Path, lists: Sequence[CheckedList], sample_rate: int) -> None:
    """Write the histogram of the lengths as a PNG, a curve per list."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png: needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    seconds = [part.manifest.num_samples / sample_rate for part in lists]
    together = np.concatenate(seconds)
    number = int(np.clip(4 * np.sqrt(len(together)), 10, 100))  # few clips make few bars
    edges = np.linspace(0, float(together.max()), number + 1).tolist()
    for part, own in zip(lists, seconds, strict=True):
        label = f"{part.path.name}: {len(own):,} utterances, {_hours(own.sum() / 3600)} h"
        axes.hist(own, edges, histtype="stepfilled" if len(lists) == 1 else "step", label=label)
    axes.set(title="lengths of utterances", xlabel="seconds", ylabel="utterances", xlim=(0, None))
    axes.locator_params(axis="y", integer=True)
    figure.legend(loc="outside lower center", ncols=min(len(lists), 2))
    with program.writing(out):
        figure.savefig(out, format="png", dpi=150)
    pyplot.close(figure)
