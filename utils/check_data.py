"""Checks lists before a long job: audio, lengths, labels, duplicates; exit status 1 if something would spoil the run.

Errors are: files that are missing, unreadable or damaged, that have NaN or infinite samples, another length than
listed, or none for a frame; silence that is not labelled as such; labels that do not pair with the list, have symbols
outside the dictionary, or are too many for CTC; audio that is in an earlier list, too. Remarks are: clipped samples,
empty transcripts, audio twice in one list, folders with files in two lists.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import numpy as np

from common.data.manifest import JSON_SUFFIXES, Manifest, read_manifest
from common.errors import ConfigError, DataError
from common.labels import SPECIAL_SYMBOLS, Dictionary
from utils import clean_list, list_report, program
from utils.list_checks import KINDS, REMARKS, Settings, check_list, find_duplicates
from utils.list_report import CheckedList, Limit

LIMITS = {"min_duration": float, "max_duration": float, "min_sample_size": int, "max_sample_size": int}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("lists", type=Path, nargs="+", metavar="LIST", help=".tsv, .json or .jsonl lists")
    parser.add_argument("--sample_rate", type=int, default=16000, help="that of the model, in Hz")
    parser.add_argument("--labels", metavar="EXT", help="labels are NAME.EXT beside the lists (default: ltr if there)")
    parser.add_argument("--dictionary", type=Path, help="symbols of the model (default: dict.EXT.txt beside a list)")
    parser.add_argument("--headers_only", action="store_true", help="a quick look that decodes nothing")
    parser.add_argument("--receptive_field", type=int, default=400, help="samples that the model needs for one frame")
    parser.add_argument("--frame_stride", type=int, default=320, help="samples from frame to frame")
    parser.add_argument("--max_clipped", type=float, default=0.001, help="share of clipped samples without a remark")
    for name, kind in LIMITS.items():
        unit = "SEC" if kind is float else "SAMPLES"
        parser.add_argument(f"--{name}", type=kind, nargs="+", metavar=unit, help="say what it would drop")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write the last LIST and its labels without errors")
    parser.add_argument("--drop", nargs="+", choices=REMARKS, help="let --fix leave out these, too")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all findings for a program")
    parser.add_argument("--png", type=Path, metavar="OUT", help="write a histogram of the lengths")
    parser.add_argument("--workers", type=int, default=program.cpu_count(), help="processes")
    args = parser.parse(argv)
    for name in ("sample_rate", "receptive_field", "frame_stride", "workers"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if not 0 <= args.max_clipped <= 1:
        raise ConfigError(f"--max_clipped {args.max_clipped:g}: not in [0, 1]; it is a share: 1 % is 0.01")
    if args.drop and not args.fix:
        raise ConfigError("--drop: says what --fix leaves out; give --fix OUT, too")
    _check_outputs(args)
    return args


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that would destroy an input."""
    inputs = [own for path in args.lists for own in (path, *clean_list.label_files(path, args.labels))]
    inputs += [args.dictionary] if args.dictionary else []
    if args.fix:
        clean_list.check_output(args.fix, args.lists[-1], inputs, args.labels)
    for name in ("json", "png"):
        out = getattr(args, name)
        if out and any(program.same_file(out, path) for path in [*inputs, *([args.fix] if args.fix else [])]):
            raise ConfigError(f"--{name} {out}: is one of the files read, or --fix; choose another name")


def read_list(path: Path, extension: str | None, sample_rate: int) -> tuple[Manifest, str, str]:
    """A list with its labels where it has some, where they are, and why they cannot be used."""
    is_json = path.suffix in JSON_SUFFIXES and extension is None
    labels = path if is_json else path.with_suffix(f".{extension or 'ltr'}")
    if extension is None and not labels.is_file():
        return read_manifest(path, sample_rate=sample_rate), "", ""
    try:
        pair = {"text": True} if is_json else {"labels": labels}
        return read_manifest(path, sample_rate=sample_rate, **pair), str(labels), ""
    except DataError as error:
        manifest = read_manifest(path, sample_rate=sample_rate)  # raises it again where the list itself is at fault
        if is_json and str(error).startswith(f"{manifest.where(0)}:"):
            return manifest, "", ""  # a JSON list without text is a list without labels
        return manifest, str(labels), str(error)


def find_dictionary(args: argparse.Namespace) -> Path | None:
    """The dictionary that is given, or that lies beside a list; None where there is none."""
    beside = (path.parent / f"dict.{args.labels or 'ltr'}.txt" for path in args.lists)
    return args.dictionary or next((path for path in beside if path.is_file()), None)


def verdict(lists: list[CheckedList]) -> str:
    """What would stop or spoil a run, in one line; empty when nothing would."""
    counts = {kind.name: sum(int(part.found.has(kind.name).sum()) for part in lists) for kind in KINDS if kind.is_error}
    told = [f"{number:,} {name}" for name, number in counts.items() if number]
    told += [f"labels of {part.path.name}" for part in lists if part.labels_fault]
    if not told:
        return ""
    return f"{', '.join(str(part.path) for part in lists)}: would stop or spoil a run: {', '.join(told)}"


def fix(args: argparse.Namespace, part: CheckedList) -> None:
    """Write the clean list and say what it lacks."""
    if part.labels_fault:
        raise DataError(f"{part.labels_fault}; nothing was written to --fix {args.fix}")
    found = part.found
    dropped = np.logical_or.reduce([found.has_error, *(found.has(kind) for kind in args.drop or ())])
    written = clean_list.write_clean(args.fix, part.path, part.manifest, ~dropped, args.labels)
    kinds = [kind.name for kind in KINDS if kind.is_error or kind.name in (args.drop or ())]
    why = ", ".join(f"{int(found.has(kind).sum()):,} {kind}" for kind in kinds if found.has(kind).any())
    print(
        f"{', '.join(map(str, written))}: {int((~dropped).sum()):,} of {len(dropped):,} utterances; "
        f"{int(dropped.sum()):,} are left out" + (f" ({why})" if why else "")
    )


def main(argv: list[str] | None = None) -> None:
    """Check the lists and report."""
    args = parse_args(argv)
    dictionary = find_dictionary(args)
    settings = Settings(
        sample_rate=args.sample_rate,
        receptive_field=args.receptive_field,
        frame_stride=args.frame_stride,
        decode=not args.headers_only,
        max_clipped=args.max_clipped,
        symbols=frozenset(Dictionary.read(dictionary).symbols[len(SPECIAL_SYMBOLS) :]) if dictionary else None,
    )
    lists = []
    for path in args.lists:
        manifest, labels, fault = read_list(path, args.labels, args.sample_rate)
        lists.append(CheckedList(path, manifest, check_list(manifest, settings, args.workers), labels, fault))
    find_duplicates([part.manifest for part in lists], [part.found for part in lists])
    limits = [Limit(name, value) for name in LIMITS for value in getattr(args, name) or ()]
    content = list_report.report(
        lists,
        limits or list_report.TYPICAL_LIMITS,
        sample_rate=args.sample_rate,
        decoded=not args.headers_only,
        dictionary=str(dictionary or ""),
    )
    print("\n".join(list_report.text(content)))
    if args.png:
        list_report.draw_lengths(args.png, lists, args.sample_rate)
    problem = verdict(lists)
    if args.json:
        content["status"] = 1 if problem else 0
        program.write_lines(args.json, [json.dumps(content, ensure_ascii=False)])
    if args.fix:
        fix(args, lists[-1])
    sys.stdout.flush()
    if problem:
        raise DataError(problem + ("" if args.fix else "; correct it, or leave out utterances with --fix OUT"))
    print("nothing found that would stop or spoil a run" + (" (headers only)" if args.headers_only else ""))


if __name__ == "__main__":
    program.run(main)
