"""The utterances of one or several lists with their labels: millions of them in a few arrays.

Lists are `.tsv` files (the root folder in the first line, then one `path<TAB>samples` per utterance, labels in a file
of their own, line by line) or JSON lines (`.json`, `.jsonl`; one object per utterance). What is held per utterance is
its path and some 8 bytes; an `Utterance` is made only when it is asked for. Nothing is ever changed after reading, and
no Python object belongs to a single utterance, so forked workers share all of it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.data import manifest_files
from common.data.audio import Clip
from common.data.manifest_files import SHARD_PATH, Columns
from common.errors import DataError

log = logging.getLogger(__name__)

JSON_SUFFIXES = (".json", ".jsonl")
FORMATS = {"auto": (".tsv", *JSON_SUFFIXES), "tsv": (".tsv",), "json": JSON_SUFFIXES}


@dataclass(frozen=True)
class Utterance:
    """One entry of a list; `where` names it for messages ("train.tsv:17").

    `num_samples` is its length at the model's rate, which the audio has to have up to `tolerance` samples.
    """

    id: str
    clip: Clip
    num_samples: int
    text: str | None
    where: str
    tolerance: int = 0


class Manifest:
    """The utterances of lists, by position; cheap to select from and to share with forked workers.

    `num_samples` [N] are their lengths at the model's rate, `datasets` [N] the numbers of their lists (None: one list).
    """

    def __init__(
        self,
        lists: tuple[Columns, ...],
        num_samples: np.ndarray,
        *,
        name: str,
        rows: np.ndarray | None = None,
        datasets: np.ndarray | None = None,
    ) -> None:
        """`rows` are those of the utterances in all lists one after another; None: all, in this order."""
        self.name = name
        self.num_samples = num_samples
        self.datasets = datasets
        self.has_text = all(columns.texts is not None for columns in lists)
        self._lists = lists
        self._bounds = np.cumsum([0, *(len(columns.paths) for columns in lists)])
        self._rows = rows

    def __len__(self) -> int:
        return len(self.num_samples)

    def __getitem__(self, index: int) -> Utterance:
        columns, row = self._find(index)
        path, copy = columns.paths[row], 0 if columns.copies is None else columns.copies[row]
        shard = SHARD_PATH.match(path)
        file, key = (shard[1], shard[4]) if shard else (path, path)
        num_samples = int(self.num_samples[index])
        start = seconds = None
        if columns.starts is not None and not np.isnan(columns.starts[row]):
            start, seconds = float(columns.starts[row]), num_samples / columns.sample_rate
        return Utterance(
            id=os.path.splitext(key)[0] + (f"-sub{copy}" if copy else ""),  # noqa: PTH122 - pathlib fails on ".."
            clip=Clip(
                columns.root / file,
                (int(shard[2]), int(shard[3])) if shard else None,
                start,
                seconds,
                shard[4] if shard else "",
            ),
            num_samples=num_samples,
            text=columns.text(row),
            where=columns.where(row),
            tolerance=columns.tolerance,
        )

    def _find(self, index: int) -> tuple[Columns, int]:
        """The list of an utterance and its row there."""
        row = range(len(self))[index] if self._rows is None else int(self._rows[index])
        if len(self._lists) == 1:
            return self._lists[0], row
        number = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._lists[number], row - int(self._bounds[number])

    def where(self, index: int) -> str:
        """File and line of an utterance, for messages."""
        columns, row = self._find(index)
        return columns.where(row)

    def text_where(self, index: int) -> str:
        """File and line of its labels, for messages."""
        columns, row = self._find(index)
        return columns.text_where(row)

    def text(self, index: int) -> str | None:
        """The label line of an utterance: as it stands in its file, or that of a JSON manifest's words; or None."""
        columns, row = self._find(index)
        return columns.text(row)

    def hours(self, sample_rate: int) -> float:
        """Hours of audio."""
        return float(self.num_samples.sum(dtype=np.int64)) / sample_rate / 3600

    def select(self, indices: Sequence[int] | np.ndarray) -> Manifest:
        """The utterances at these positions (or of a boolean mask), in this order, sharing the text."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if len(chosen) != len(self):
                raise IndexError(f"a mask of {len(chosen)} for {len(self)} utterances")
            if chosen.all():
                return self
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.intp, copy=False)  # an empty list is float64
        rows = _as_rows(chosen % len(self), len(self)) if self._rows is None else self._rows[chosen]
        return Manifest(
            self._lists,
            self.num_samples[chosen],
            name=self.name,
            rows=rows,
            datasets=None if self.datasets is None else self.datasets[chosen],
        )

    def neighbours(self) -> np.ndarray:
        """Whether utterance i + 1 follows i in its list and has the same speaker: bool [N - 1].

        A speaker is what JSON entries name as "speaker"; where they do not, all of one folder (of the path, or of the
        key in a shard) are one speaker.
        """
        same = np.concatenate([np.append(columns.same_speaker(), False) for columns in self._lists])
        if self._rows is None:
            return same[:-1]
        return (np.diff(self._rows) == 1) & same[self._rows[:-1]]

    @property
    def nbytes(self) -> int:
        """Bytes held for all utterances, those of the lists included that are not selected."""
        arrays = [array for array in (self.num_samples, self.datasets, self._rows) if array is not None]
        return sum(array.nbytes for array in arrays) + sum({id(part): part.nbytes for part in self._lists}.values())


def read_manifest(path: Path, labels: Path | None = None, *, sample_rate: int = 16000, text: bool = False) -> Manifest:
    """Read a list and, when given, its file of labels; DataError with file:line for anything malformed.

    A relative root, or a relative path of a JSON manifest, is relative to the folder of the list. `sample_rate` turns
    the seconds of a JSON manifest into samples, and with `text` its texts are the labels, which then every entry needs;
    a file of labels goes before them.
    """
    path = Path(path)
    if path.suffix in JSON_SUFFIXES:
        columns, num_samples = manifest_files.read_json(path, sample_rate=sample_rate, text=text and labels is None)
        if columns.textless is not None:
            raise DataError(
                f"{columns.where(columns.textless)}: no text, but labels are needed; add it, or remove the line"
            )
    else:
        columns, num_samples = manifest_files.read_tsv(path)
    if labels is not None:
        lines = manifest_files.read_labels(Path(labels), path, len(num_samples))
        columns = replace(columns, texts=lines, text_path=Path(labels))
    return Manifest((columns,), num_samples, name=path.stem)


def join_manifests(manifests: Sequence[Manifest], *, name: str = "") -> Manifest:
    """All utterances of several lists, one list after another; `datasets` has the number of the list of each.

    With a `name` they are the parts of one list of that name, and are not numbered.
    """
    if len(manifests) == 1:
        return manifests[0]
    sizes = [int(manifest._bounds[-1]) for manifest in manifests]
    rows = None
    if any(manifest._rows is not None for manifest in manifests):
        first = np.cumsum([0, *sizes]).tolist()
        chosen = [_all_rows(manifest) + start for manifest, start in zip(manifests, first, strict=False)]
        rows = _as_rows(np.concatenate(chosen), first[-1])
    numbers = np.arange(len(manifests), dtype=np.uint8 if len(manifests) <= 256 else np.int32)
    return Manifest(
        tuple(columns for manifest in manifests for columns in manifest._lists),
        np.concatenate([manifest.num_samples for manifest in manifests]),
        name=name or "+".join(manifest.name for manifest in manifests),
        rows=rows,
        datasets=None if name else np.repeat(numbers, [len(manifest) for manifest in manifests]),
    )


def find_list(folder: Path, subset: str, manifest_format: str = "auto") -> Path:
    """The list of a subset: SUBSET.tsv ("tsv"), SUBSET.json or SUBSET.jsonl ("json"), or any of them ("auto").

    The first one in this order, with a warning where there are others. DataError when there is none.
    """
    candidates = [Path(folder) / f"{subset}{suffix}" for suffix in FORMATS[manifest_format]]
    found = [path for path in candidates if path.is_file()]
    if not found:
        others = " or ".join(path.name for path in candidates[1:])
        raise DataError(
            f"{candidates[0]}: no such file{f', nor {others}' if others else ''} "
            f"(--manifest_format {manifest_format}); check the folder and the name, or make it with "
            "utils/generate_filelist.py (a list) or utils/convert_manifest.py (a manifest of a list)"
        )
    for other in found[1:]:
        log.warning("%s is read, and %s beside it is not; remove the one that is out of date", found[0], other.name)
    return found[0]


def _all_rows(manifest: Manifest) -> np.ndarray:
    """The rows of all utterances, int64."""
    return np.arange(len(manifest)) if manifest._rows is None else manifest._rows.astype(np.int64)


def _as_rows(rows: np.ndarray, number: int) -> np.ndarray:
    """As int32 where the rows of so many lines fit."""
    return rows.astype(np.int32 if number <= 2**31 else np.int64)
