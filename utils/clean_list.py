"""A list without some of its utterances, with the labels that stand beside it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from common.data.manifest import Manifest
from common.errors import ConfigError, DataError
from utils import program
from utils.list_report import line_number


def label_files(path: Path, extension: str | None) -> list[Path]:
    """The label files beside a list: the usual ones, and those of this extension."""
    suffixes = dict.fromkeys([".ltr", ".wrd", *([f".{extension}"] if extension else [])])
    return [labels for suffix in suffixes if (labels := path.with_suffix(suffix)).is_file()]


def check_output(out: Path, path: Path, inputs: list[Path], extension: str | None) -> None:
    """ConfigError where `out`, which is to be `path` without some lines, or its labels would destroy an input."""
    if out.suffix != path.suffix:
        raise ConfigError(
            f"--fix {out}: the clean list has the format of {path.name}; let its name end in {path.suffix}"
        )
    written = [out, *(out.with_suffix(labels.suffix) for labels in label_files(path, extension))]
    for target in written:
        if any(program.same_file(target, own) for own in inputs):
            raise ConfigError(f"--fix {out}: would overwrite {target}, which is an input; choose another name")


def write_clean(out: Path, path: Path, manifest: Manifest, keep: np.ndarray, extension: str | None) -> list[Path]:
    """Write the utterances of a list where `keep` (N,) is true, and their labels; the files written.

    Every label file beside the list must have a line for every utterance.
    """
    if not keep.any():
        raise DataError(f"--fix {out}: no utterance of {path} is left; nothing was written")
    lines = _lines(path)
    chosen = [line_number(manifest, index) - 1 for index in np.flatnonzero(keep).tolist()]
    kept = [lines[row] for row in chosen]
    files: dict[Path, list[str]] = {out: kept}
    if path.suffix == ".tsv":
        files[out] = [str((path.parent / lines[0].strip()).absolute()), *kept]
    elif out.parent.resolve() != path.parent.resolve():
        files[out] = [_with_absolute_path(line, path.parent) for line in kept]
    for labels in label_files(path, extension):
        rows = _lines(labels)
        if len(rows) != len(manifest):
            raise DataError(
                f"{labels}: {len(rows)} lines for {len(manifest)} utterances; make it anew, or move it away for --fix"
            )
        files[out.with_suffix(labels.suffix)] = [rows[index] for index in np.flatnonzero(keep).tolist()]
    for target, content in files.items():
        program.write_lines(target, content)
    return list(files)


def _lines(path: Path) -> list[str]:
    """Lines of a text file, which only a line feed ends; empty ones are lines of labels, too."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _with_absolute_path(line: str, folder: Path) -> str:
    """A line of a JSON list, readable from another folder."""
    entry = json.loads(line)
    return json.dumps(
        {**entry, "audio_filepath": str((folder / entry["audio_filepath"]).absolute())}, ensure_ascii=False
    )
