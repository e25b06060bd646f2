"""The log and the configuration of a run, as they lie in its folder; also while the run is still going on."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import flags
from common.errors import ConfigError, one_line
from wav2vec2.config import Config

Curve = dict[int, float]  # update -> value, in order of updates


@dataclass(frozen=True)
class RunLog:
    """What a run has logged.

    curves: "train_loss" -> values by update; epochs: update -> epoch, of the lines of training; config: the sections
    of config.json.
    """

    folder: Path
    config: dict[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """pretrain or finetune."""
        return str(self.config.get("mode", ""))

    @property
    def updates(self) -> list[int]:
        """All updates with a line, in order."""
        return sorted({update for curve in self.curves.values() for update in curve})

    @property
    def last_update(self) -> int:
        """The last update with a line, 0 without any."""
        return max(self.updates, default=0)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def settings(self) -> Config:
        """All settings; what another version of the toolkit knew is left out, what it did not know has its default.

        Raises ConfigError for a value that no version takes.
        """
        return flags.from_dict(Config, _known(Config(self.mode), self.config), f"{self.folder / 'config.json'}")

    def at(self, update: int) -> dict[str, float]:
        """All values of one update by name, those of training without their prefix."""
        values = {name: curve[update] for name, curve in self.curves.items() if update in curve}
        return {name.removeprefix("train_"): value for name, value in values.items()}

    def hours(self) -> tuple[float, float]:
        """Least and most speech that one pass over the data can have, in hours, by what the log tells so far.

        Update u in epoch e says that an epoch has at least u / e updates, and exactly so many at its end; and fewer
        than u / (e - 1).
        """
        rate, took = self.curves.get("train_speech_rate", {}), self.curves.get("train_took", {})
        total = sum(rate[update] * took.get(update, 0.0) for update in rate) / 3600
        if not math.isfinite(total) or total <= 0:
            return 0.0, math.inf
        least = max((update / epoch for update, epoch in self.epochs.items() if epoch), default=0.0)
        most = min((update / (epoch - 1) for update, epoch in self.epochs.items() if epoch > 1), default=math.inf)
        per_update = total / max(rate)
        return per_update * least, per_update * most


def _known(section: Any, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - any section
    """The values that a section has a setting for."""
    known = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {
        name: _known(known[name], value) if dataclasses.is_dataclass(known[name]) and isinstance(value, dict) else value
        for name, value in values.items()
        if name in known
    }


def read_run(folder: Path) -> RunLog:
    """Read nvlog.json and config.json of a run. Raises ConfigError where they are missing or no such files."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: has no config.json; name the --output_dir of a run") from None
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: {one_line(error)}; name the --output_dir of a run") from None
    config = described.get("config") if isinstance(described, dict) else None
    if not isinstance(config, dict) or config.get("mode") not in ("pretrain", "finetune"):
        raise ConfigError(f"{folder / 'config.json'}: has no `config` with a mode; name the --output_dir of a run")
    run = RunLog(folder, config)
    try:
        text = (folder / "nvlog.json").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ConfigError(f"{folder}: has no nvlog.json; name the --output_dir of a run that has begun") from None
    for line in text.splitlines():
        _take(line, run)
    return run


def _take(line: str, run: RunLog) -> None:
    """Add a line of the log; one that is cut off, as the last of a killed run, is left out."""
    try:
        entry = json.loads(line.removeprefix("DLLL "))
    except ValueError:
        return
    if not isinstance(entry, dict) or entry.get("type") != "LOG":
        return
    step, data = entry.get("step"), entry.get("data")
    if not (isinstance(step, list) and len(step) == 2 and isinstance(data, dict)):
        return  # the configuration, a summary of the whole run
    if not all(isinstance(number, int) for number in step):
        return
    epoch, update = step
    if any(name.startswith("train_") and not name.startswith("train_avg_") for name in data):
        _put(run.epochs, update, epoch)
    for name, value in data.items():
        if value is None or isinstance(value, (int, float)):  # null stands for what is not finite
            _put(run.curves.setdefault(name, {}), update, math.nan if value is None else float(value))


def _put(curve: dict[int, Any], update: int, value: float) -> None:
    """Add the newest value. A run that resumed before it made the later updates again: what they were is past."""
    for later in [known for known in curve if known >= update]:
        del curve[later]
    curve[update] = value
