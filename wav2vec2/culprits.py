"""Losses, gradients and weights that are not finite: which update did it, and which update is left out since.

In fp16 only gradients and weights count: an overflow is skipped, and too many in a row are for the rules of health.
Nothing is read from the device while all is well: the sums of the metrics are kept as they were behind every update,
and looked at when the log line finds them spoilt.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common import distributed
from common.data.collate import Batch
from common.metrics import Metrics

_SHOWN_IDS = 8
_SPOILS = ("loss", "grad_norm")  # once not finite, their sums remain so


@dataclass(frozen=True)
class Tried:
    """An update: updates finished before it, its place in the data, its utterances in this process."""

    step: int
    epoch: int
    position: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Culprit:
    """The first update that went wrong, the processes whose own loss did (or all), and their utterances."""

    update: Tried
    ranks: tuple[int, ...]
    ids: tuple[str, ...]

    @property
    def text(self) -> str:
        """For a message."""
        update, which = self.update, f"process{'es' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        more = f" and {len(self.ids) - _SHOWN_IDS} more" if len(self.ids) > _SHOWN_IDS else ""
        return (
            f"update {update.step + 1} (epoch {update.epoch}, {which}, utterances "
            f"{', '.join(self.ids[:_SHOWN_IDS])}{more})"
        )


def not_finite(sums: Mapping[str, float], *, fp16: bool) -> list[str]:
    """What is not finite in the sums of a log line. In fp16 a loss may be: that update was skipped."""
    names = ("grad_norm", "weight_norm") if fp16 else ("loss", "grad_norm", "weight_norm")
    return [name for name in names if not math.isfinite(sums.get(name, 0.0))]


class WentBack(Exception):
    """The run stands at its newest checkpoint again."""


class Faults:
    """Remembers the updates since the last log line, and for good the one that is left out since a rollback."""

    def __init__(self) -> None:
        self.left_out: tuple[int, int] | None = None  # epoch and position
        self._current: Tried | None = None
        self._tried: list[tuple[Tried, dict[str, Tensor]]] = []

    def begin(self, step: int, place: tuple[int, int], batches: Sequence[Batch]) -> None:
        """An update is being made of these batches."""
        self._current = Tried(step, *place, ids=tuple(utterance for batch in batches for utterance in batch.ids))

    def end(self, metrics: Metrics) -> None:
        """It has been made."""
        if self._current is not None:
            self._tried.append((self._current, metrics.so_far(_SPOILS)))

    def forget(self) -> None:
        """All is well up to here, or is no longer of interest."""
        self._current, self._tried = None, []

    def culprit(self, broken: Collection[str]) -> Culprit | None:
        """The first update that spoilt one of these sums, the same on all ranks, which call it together; None: none."""
        every = distributed.gather_objects((self._first_bad(broken), self._first_bad({"loss"} & set(broken))))
        found = [first for first, _ in every if first is not None]
        if not found:
            return None
        first = min(found)
        update = self._tried[first][0]
        ranks = tuple(rank for rank, (_, own) in enumerate(every) if own == first) or tuple(range(len(every)))
        ids = distributed.gather_objects(update.ids)
        return Culprit(update, ranks, tuple(name for rank in ranks for name in ids[rank]))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"left_out": None if self.left_out is None else list(self.left_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` (see state_dict)."""
        self.left_out = None if state["left_out"] is None else (state["left_out"][0], state["left_out"][1])
        self.forget()

    def _first_bad(self, names: Collection[str]) -> int | None:
        """Index of the first update behind which one of these sums is not finite in this process; reads the device."""
        for index, (_, sums) in enumerate(self._tried):
            if any(not math.isfinite(sums[name].item()) for name in names if name in sums):
                return index
        return None
