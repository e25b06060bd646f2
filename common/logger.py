"""What a run tells: the console of rank 0, DLLogger's JSON lines, TensorBoard, progress bars."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import inspect
import io
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from common import distributed
from common.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

DURATION = "duration"

Item = TypeVar("Item")


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown: unit, Python format of the number (".3f", or "duration" for seconds), meaning.

    `goal` is DLLogger's GOAL: "MINIMIZE", "MAXIMIZE", or empty.
    """

    unit: str
    format: str
    description: str
    goal: str = ""

    def text(self, value: float) -> str:
        """The value as the console shows it, without its unit."""
        if self.format == DURATION:
            return _duration(value)
        return format(float(value), self.format)

    def metadata(self) -> dict[str, str]:
        """The value of `metadata` in DLLogger's METADATA lines."""
        number_format = ".1f" if self.format == DURATION else self.format
        entries = {"unit": self.unit, "format": f":{number_format}", "GOAL": self.goal}
        return {**{key: entry for key, entry in entries.items() if entry}, "description": self.description}


class LineWriter(Protocol):
    """A backend of DLLogger (the real JSONStreamBackend, or JsonLines)."""

    file: Any

    def log(
        self, timestamp: datetime, elapsedtime: float, step: tuple[int, ...] | str, data: Mapping[str, Any]
    ) -> None:
        """Write a LOG line."""

    def metadata(self, timestamp: datetime, elapsedtime: float, metric: str, metadata: Mapping[str, Any]) -> None:
        """Write a METADATA line."""

    def flush(self) -> None:
        """Hand what was written to the operating system."""


class JsonLines:
    """Appends lines in DLLogger's format: "DLLL " and a JSON object with all times as text."""

    def __init__(self, path: str | Path) -> None:
        self.file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def log(
        self, timestamp: datetime, elapsedtime: float, step: tuple[int, ...] | str, data: Mapping[str, Any]
    ) -> None:
        """Write a LOG line; `step` is a tuple of numbers or "PARAMETER"."""
        times = {
            "timestamp": str(timestamp.timestamp()),
            "datetime": str(timestamp.astimezone()),
            "elapsedtime": str(elapsedtime),
        }
        self._write({**times, "type": "LOG", "step": step, "data": data})

    def metadata(self, timestamp: datetime, elapsedtime: float, metric: str, metadata: Mapping[str, Any]) -> None:
        """Write a METADATA line: unit, format and so on of one metric."""
        times = {
            "timestamp": str(timestamp.timestamp()),
            "elapsedtime": str(elapsedtime),
            "datetime": str(timestamp.astimezone()),
        }
        self._write({**times, "type": "METADATA", "metric": metric, "metadata": metadata})

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self.file.flush()

    def _write(self, entry: Mapping[str, Any]) -> None:
        self.file.write(f"DLLL {json.dumps(entry)}\n")


class RunLogger:
    """Writes every logged set of values to the console, to nvlog.json and to TensorBoard."""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        metrics: Mapping[str, MetricInfo],
        enabled: bool,
        total_updates: int | None = None,
        tensorboard: bool = True,
        log_file: str = "nvlog.json",
    ) -> None:
        """Open the log files for appending; on ranks where `enabled` is False every call does nothing.

        Args:
            output_dir: folder of the run; TensorBoard's files go to `tensorboard` inside it.
            metrics: every metric that may be logged; their order is that of the console line.
            enabled: whether this is the process that logs.
            total_updates: shown behind the update number.
            tensorboard: whether to write TensorBoard files.
            log_file: DLLogger's file, inside `output_dir` unless absolute.

        Raises:
            ConfigError: the folder cannot be written, or TensorBoard is wanted but not installed.
        """
        for info in metrics.values():
            info.text(0.0)  # a format that cannot show a float shall fail here, not hours later
        self._metrics = dict(metrics)
        self._enabled = enabled
        self._total_updates = total_updates
        self._started = datetime.now()
        self._described: set[str] = set()
        self._widths: dict[str, int] = {}
        self._update = 0
        self._lines: LineWriter | None = None
        self._board: Any = None
        if not enabled:
            return
        folder = Path(output_dir)
        self._path = folder / log_file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = open_lines(self._path)
        except OSError as error:
            raise ConfigError(
                f"--output_dir {folder}: {log_file} cannot be written ({error.strerror}); "
                "choose another folder, or change its permissions"
            ) from error
        if tensorboard:
            self._board = _open_tensorboard(folder / "tensorboard")

    def log(self, scope: str, step: tuple[int, ...], values: Mapping[str, float], *, console: bool = True) -> None:
        """Log one set of values, to the console too unless the caller shows them its own way.

        Args:
            scope: "train", "train_avg", "val", ...: joined with the metric's name, as in `train_loss`.
            step: (epoch, update), (epoch,) or () for the whole run.
            console: False where the caller shows the values its own way.
            values: name -> value; a KeyError names a metric that is not in the table.

        Raises:
            TrainingError: the disk is full or fails.
        """
        unknown = [name for name in values if name not in self._metrics]
        if unknown:
            raise KeyError(f"metrics {unknown} are not in the table of metrics")
        if self._lines is None:
            return
        if len(step) > 1:
            self._update = step[1]
        ordered = {name: float(values[name]) for name in self._metrics if name in values}
        if console:
            self.console(self._line(scope, step, ordered))
        now, elapsed = self._now()
        # JSON knows no NaN and no infinity
        data = {f"{scope}_{name}": value if math.isfinite(value) else None for name, value in ordered.items()}
        with self._writing(self._path):
            for name in ordered:
                self._describe(f"{scope}_{name}", name, now, elapsed)
            self._lines.log(now, elapsed, step, data)
            # a killed run keeps all its lines
            self._lines.flush()
            if self._board is not None:
                for name, value in ordered.items():
                    self._board.add_scalar(f"{scope}/{name}", value, self._update)

    def parameters(self, values: Mapping[str, Any], file: str = "") -> None:
        """Log what is needed to repeat the run (plain values that JSON can hold), with a name also as that file."""
        if self._lines is None:
            return
        if file:
            path = self._path.with_name(file)
            partial = path.with_name(f".{file}.tmp")
            with self._writing(path):
                partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
                partial.replace(path)
        with self._writing(self._path):
            self._lines.log(*self._now(), "PARAMETER", dict(values))
            self._lines.flush()
            if self._board is not None:
                text = json.dumps(values, indent=2)
                self._board.add_text("parameters", "\n".join("    " + line for line in text.splitlines()))

    def console(self, line: str) -> None:
        """Print a line, without a file entry."""
        if self._enabled:
            log.info("%s", line)

    def close(self) -> None:
        """Write out everything and close the files; later calls do nothing. What cannot be written is told."""
        lines, board = self._lines, self._board
        self._lines = self._board = None
        for file in (lines.file if lines else None, board):
            try:
                if file is not None:
                    file.close()
            except OSError as error:  # by now it is known how the run ended, which counts more
                log.warning("%s: its end could not be written (%s)", self._path.parent, error.strerror)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Let a full disk end the run in one line that names the file."""
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{path}: could not be written ({error.strerror}); free some space and go on with --resume "
                "(checkpoints are untouched)"
            ) from error

    def _now(self) -> tuple[datetime, float]:
        now = datetime.now()
        return now, (now - self._started).total_seconds()

    def _describe(self, key: str, name: str, now: datetime, elapsed: float) -> None:
        """Write a metric's metadata before its first value."""
        if self._lines is not None and key not in self._described:
            self._lines.metadata(now, elapsed, key, self._metrics[name].metadata())
            self._described.add(key)

    def _line(self, scope: str, step: tuple[int, ...], values: Mapping[str, float]) -> str:
        """One console line; columns keep the widest width seen, so that lines stay aligned."""
        parts = [self._aligned("scope", scope, left=True)]
        if len(step) > 0:
            parts.append(f"epoch {self._aligned('epoch', str(step[0]))}")
        if len(step) > 1:
            total = "" if self._total_updates is None else f"/{self._total_updates}"
            self._widths.setdefault("update", max(0, len(total) - 1))
            parts.append(f"update {self._aligned('update', str(step[1]))}{total}")
        for name, value in values.items():
            info = self._metrics[name]
            text = self._aligned(f"{scope}/{name}", info.text(value))
            parts.append(f"{name} {text}" + (f" {info.unit}" if info.unit and info.format != DURATION else ""))
        return " | ".join(parts)

    def _aligned(self, column: str, text: str, left: bool = False) -> str:
        width = self._widths[column] = max(self._widths.get(column, 0), len(text))
        return text.ljust(width) if left else text.rjust(width)


def open_lines(path: str | Path) -> LineWriter:
    """A writer of DLLogger lines that appends to `path`: the dllogger package where it is installed.

    The package of that name on PyPI is a placeholder, and releases before 1.0 cannot append: both are passed by.
    """
    path = Path(path)
    _end_last_line(path)
    backend = _dllogger_backend()
    if backend is None:
        return JsonLines(path)
    return backend(1, str(path), append=True)


def progress(iterable: Iterable[Item], *, desc: str, total: int | None = None, unit: str) -> Iterable[Item]:
    """Show a bar while iterating, on rank 0 and if stderr is a terminal; else give back the iterable."""
    if not (distributed.is_main() and sys.stderr.isatty()):
        return iterable
    try:
        from tqdm import tqdm  # only here: a run without a terminal needs none
    except ImportError as error:
        raise ConfigError(
            f"tqdm is not installed ({error}); install it with: pip install -r requirements.txt"
        ) from error
    return tqdm(iterable, desc=desc, total=total, unit=unit, file=sys.stderr)


def setup_console(*, is_main: bool = True, stream: TextIO | None = None) -> None:
    """Send log messages of this process to the console; ranks other than 0 tell errors only.

    May be called again: the earlier setting is replaced. `stream`: standard output if not given.
    """
    level = logging.INFO if is_main else logging.ERROR
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _ConsoleHandler)]:
        root.removeHandler(handler)
    handler = _ConsoleHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(_ConsoleFormatter())
    root.addHandler(handler)
    root.setLevel(level)


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bars instead of through them."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:  # else there is no bar
                sys.modules["tqdm"].tqdm.write(line, file=stream)
            else:
                stream.write(line + "\n")
            stream.flush()
        except OSError:  # a closed pipe must not end a run; logging itself reports it
            self.handleError(record)


class _ConsoleFormatter(logging.Formatter):
    """The message alone; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname}: {text}"


def _dllogger_backend() -> Any:
    if importlib.util.find_spec("dllogger") is None:
        return None
    module = importlib.import_module("dllogger")
    backend = getattr(module, "JSONStreamBackend", None)
    if backend is None or "append" not in inspect.signature(backend).parameters:
        return None
    return backend


def _end_last_line(path: Path) -> None:
    """Complete a line that a killed run left half written, so that ours begin at the start of a line."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, io.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _open_tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard is not installed ({error}); install it with: pip install -r requirements.txt"
        ) from error
    return SummaryWriter(str(folder))


def _duration(seconds: float) -> str:
    """Seconds as "4:07", "1:02:03" or "2 d 03:04"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
