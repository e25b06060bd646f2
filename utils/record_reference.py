"""Makes reference curves of finished runs of one recipe that differ by their seed, for utils/compare_run.py.

    python utils/record_reference.py RUN_DIR... --name NAME --title TEXT --out FILE

The band at an update reaches from the lowest to the highest run, and further on both sides by half of what lies between
them, and at least 5 % of the mean (word and letter error rates: 1 point) to either side of the mean. With one run
or two nothing is known of the spread; 30 % (error rates: 3 points) to either side stand for it, and the file says so.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError
from utils import program
from utils.reference_curves import SCHEMA
from utils.run_log import RunLog, read_run

# metric -> title, unit, better side
QUANTITIES = {
    "pretrain": {
        "train_loss": ("loss (train)", "bits per masked frame", "lower"),
        "train_accuracy": ("accuracy (train)", "", "higher"),
        "train_code_perplexity": ("code perplexity (train)", "codes", "neither"),
        "val_accuracy": ("accuracy (validation)", "", "higher"),
    },
    "finetune": {
        "train_nll_loss": ("loss (train)", "bits per letter", "lower"),
        "val_nll_loss": ("loss (validation)", "bits per letter", "lower"),
        "val_uer": ("letter error rate (validation)", "%", "lower"),
        "val_wer": ("word error rate (validation)", "%", "lower"),
    },
}
FEW = 2  # runs that do not tell how far others may lie apart
LEAST, LEAST_OF_FEW = 0.05, 0.3  # of the mean, to either side
LEAST_POINTS, LEAST_POINTS_OF_FEW = 1.0, 3.0  # of error rates in percent
HOURS = 0.005  # a run fits with so much more or less speech, as a share
POINTS = 10  # of the curves of training


def band(values: Sequence[float], metric: str) -> dict[str, float]:
    """Low, high and mean of one quantity at one update."""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    share, points = (LEAST, LEAST_POINTS) if len(values) > FEW else (LEAST_OF_FEW, LEAST_POINTS_OF_FEW)
    least = max(share * abs(mean), points if metric.endswith("er") else 0.0)
    beyond = (high - low) / 2
    low, high = min(low - beyond, mean - least), max(high + beyond, mean + least)
    rounded = {"low": max(low, 0.0), "high": min(high, 1.0) if metric.endswith("accuracy") else high, "mean": mean}
    return {name: float(f"{value:.4g}") for name, value in rounded.items()}


def curve(runs: Sequence[RunLog], metric: str) -> dict[str, Any]:
    """One quantity over the updates that all runs logged; of training only every so many."""
    title, unit, better = QUANTITIES[runs[0].mode][metric]
    updates = sorted(set.intersection(*(set(run.curves.get(metric, {})) for run in runs)))
    if metric.startswith("train_") and updates:
        wanted = [runs[0].last_update * part / POINTS for part in range(1, POINTS + 1)]
        updates = sorted({_closest(updates, place) for place in wanted})
    if not updates:
        raise ConfigError(f"{runs[0].folder}: the runs have no update in common with {metric}; name runs of one recipe")
    points = []
    for update in updates:
        values = [run.curves[metric][update] for run in runs]
        if not all(map(math.isfinite, values)):
            raise ConfigError(f"{metric}, update {update}: a value is not finite; leave that run out")
        points.append({"update": update} | band(values, metric) | {"values": [float(f"{v:.4g}") for v in values]})
    gap = min((after - before for before, after in zip(updates, updates[1:], strict=False)), default=2)
    return {
        "metric": metric,
        "title": title,
        "unit": unit,
        "better": better,
        "window": max(gap // 2, 1),
        "points": points,
    }


def _closest(updates: Sequence[int], place: float) -> int:
    return min(updates, key=lambda update: abs(update - place))


def reference(runs: Sequence[RunLog], name: str, title: str) -> dict[str, Any]:
    """The object of the file."""
    first = runs[0]
    hours = [run.hours()[0] for run in runs]  # exact at the end of an epoch
    seeds = [run.section("run").get("seed") for run in runs]
    if len({run.mode for run in runs}) > 1 or first.mode not in QUANTITIES:
        raise ConfigError(f"{first.folder}: runs of different modes; name runs of one recipe")
    return {
        "schema": SCHEMA,
        "name": name,
        "title": title,
        "mode": first.mode,
        "match": {
            "encoder_embed_dim": first.section("model").get("encoder_embed_dim"),
            "max_update": first.section("optim").get("max_update"),
            "hours": [round(min(hours) * (1 - HOURS), 4), round(max(hours) * (1 + HOURS), 4)],
        },
        "source": f"measured with this toolkit on {date.today().isoformat()}, seeds {', '.join(map(str, seeds))}",
        "band": (
            "lowest to highest run, further on both sides by half of what lies between them, "
            "and at least 5 % of the mean (error rates: 1 point) to either side of it"
            if len(runs) > FEW
            else "one run or two: at least 30 % of their mean (error rates: 3 points) to either side, which is an "
            "assumption"
        ),
        "curves": [curve(runs, metric) for metric in QUANTITIES[first.mode]],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = program.Parser((__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+", help="--output_dir of a finished run")
    parser.add_argument("--name", required=True, help="what --reference of compare_run.py takes")
    parser.add_argument("--title", required=True, help="recipe and corpus in a few words")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where to write the curves")
    args = parser.parse(None if argv is None else list(argv))
    made = reference([read_run(folder) for folder in args.runs], args.name, args.title)
    program.write_lines(args.out, [json.dumps(made, indent=1)])


if __name__ == "__main__":
    program.run(main)
