"""Compares the log of a run with reference curves: a line per milestone, a verdict, and a picture.

    python utils/compare_run.py RUN_DIR [--reference NAME|FILE] [--png OUT] [--json OUT]

The run may still be going on, and may have been resumed. Without --reference the reference is found by mode, width,
number of updates and hours of speech. What counts is the last milestone of every quantity: a run that was outside
before and has come back is within the band. The exit status is 0 for a run that is within the band, better, or has
nothing to compare yet; 1 for one that is outside or has collapsed; 2 for wrong usage.

The JSON file is one object: `run`, `reference`, `last_update`, `standing` (within, better, outside, collapsed, nothing
to compare), `verdict` (the text), `status` (the exit status), and `milestones`, a list of {metric, milestone, update
(of the run's value), value, low, high, mean, place (within, above, below), better, outside}.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

from common.errors import ConfigError
from utils import curve_plot, program
from utils.curve_verdicts import Compared, Verdict, compare, judge
from utils.reference_curves import Reference, choose
from utils.run_log import RunLog, read_run

FAILED = ("outside", "collapsed")


def as_json(run: RunLog, reference: Reference, compared: Sequence[Compared], verdict: Verdict) -> dict[str, Any]:
    """The object of --json."""
    return {
        "run": str(run.folder),
        "reference": reference.name,
        "last_update": run.last_update,
        "standing": verdict.standing,
        "verdict": verdict.text,
        "status": int(verdict.standing in FAILED),
        "milestones": [
            {
                "metric": item.curve.metric,
                "milestone": item.point.update,
                "update": item.update,
                "value": item.value,
                "low": item.point.low,
                "high": item.point.high,
                "mean": item.point.mean,
                "place": item.place,
                "better": item.better,
                "outside": item.outside,
            }
            for item in compared
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says; exit status 1 where the run is outside the band."""
    parser = program.Parser((__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the --output_dir of a run")
    parser.add_argument(
        "--reference", metavar="NAME|FILE", default="", help="name in docs/reference_curves, or a file of that format"
    )
    parser.add_argument("--png", metavar="OUT", type=Path, help="draw the run over the reference")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write milestones and verdict")
    args = parser.parse(None if argv is None else list(argv))
    if not args.run.is_dir():
        raise ConfigError(f"{args.run}: no such folder; name the --output_dir of a run")
    run = read_run(args.run)
    reference = choose(run, args.reference)
    if reference.mode != run.mode:
        raise ConfigError(f"--reference {args.reference}: is of {reference.mode}, and the run is of {run.mode}")
    compared = compare(run, reference)
    verdict = judge(run, reference, compared)
    print(f"{args.run}: update {run.last_update}, against {reference.name}: {reference.title}")
    for item in compared:
        print(item.line())
    print(f"verdict: {verdict.text}")
    if args.png:
        curve_plot.draw(args.png, run, reference, compared, verdict)
    if args.json:
        program.write_lines(args.json, [json.dumps(as_json(run, reference, compared, verdict), indent=2)])
    sys.stdout.flush()
    if verdict.standing in FAILED:
        sys.exit(1)


if __name__ == "__main__":
    program.run(main)
