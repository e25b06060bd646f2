"""The log file has DLLogger's format, the console has one aligned line per log, bars need a terminal."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import io
import json
import logging
import math
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest

from common import distributed, logger
from common.errors import ConfigError, TrainingError
from common.logger import JsonLines, MetricInfo, RunLogger, open_lines, progress, setup_console

METRICS = {
    "loss": MetricInfo("bits", ".3f", "Loss per masked frame.", "MINIMIZE"),
    "accuracy": MetricInfo("", ".2f", "Share of frames whose target scores best.", "MAXIMIZE"),
    "ntokens/s": MetricInfo("tokens/s", ",.0f", "Masked frames per second."),
    "eta": MetricInfo("s", "duration", "Time left."),
}


def read_lines(path):
    lines = path.read_text().splitlines()
    assert all(line.startswith("DLLL {") for line in lines)
    return [json.loads(line[5:]) for line in lines]


def make_logger(folder, **changes):
    return RunLogger(folder, **{"metrics": METRICS, "enabled": True, "tensorboard": False, **changes})


@pytest.fixture
def no_dllogger(monkeypatch):
    monkeypatch.setattr(logger, "_dllogger_backend", lambda: None)


def real_dllogger():
    if importlib.util.find_spec("dllogger") is None:
        pytest.skip("the dllogger package is not installed")
    import dllogger

    if not hasattr(dllogger, "JSONStreamBackend"):
        pytest.skip("the dllogger package is PyPI's placeholder")
    return dllogger


# ---- the file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["ours", "installed"])
def test_lines_have_the_keys_and_types_of_dllogger(tmp_path, monkeypatch, writer):
    if writer == "ours":
        monkeypatch.setattr(logger, "_dllogger_backend", lambda: None)
    else:
        real_dllogger()
    run = make_logger(tmp_path)
    run.parameters({"lr": 0.1, "layers": [[512, 10, 5]], "name": None})
    run.log("train", (1, 20), {"loss": 2.5, "ntokens/s": 10})
    run.close()
    parameters, *metadata, logged = read_lines(tmp_path / "nvlog.json")
    log_keys = ["timestamp", "datetime", "elapsedtime", "type", "step", "data"]
    assert list(parameters) == list(logged) == log_keys
    assert (parameters["type"], parameters["step"]) == ("LOG", "PARAMETER")
    assert parameters["data"] == {"lr": 0.1, "layers": [[512, 10, 5]], "name": None}
    assert (logged["type"], logged["step"]) == ("LOG", [1, 20])
    assert logged["data"] == {"train_loss": 2.5, "train_ntokens/s": 10.0}
    for entry in metadata:
        assert list(entry) == ["timestamp", "elapsedtime", "datetime", "type", "metric", "metadata"]
        assert entry["type"] == "METADATA"
    assert [entry["metric"] for entry in metadata] == ["train_loss", "train_ntokens/s"]
    assert metadata[0]["metadata"] == {
        "unit": "bits",
        "format": ":.3f",
        "GOAL": "MINIMIZE",
        "description": "Loss per masked frame.",
    }
    for entry in (parameters, *metadata, logged):
        assert abs(float(entry["timestamp"]) - datetime.now().timestamp()) < 60
        assert 0 <= float(entry["elapsedtime"]) < 60
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", entry["datetime"])


def test_our_writer_and_the_real_package_write_the_same_lines(tmp_path):
    dllogger = real_dllogger()
    real = dllogger.JSONStreamBackend(1, str(tmp_path / "real"), append=True)
    ours = JsonLines(tmp_path / "ours")
    now = datetime(2024, 5, 6, 7, 8, 9, 123456)
    for writer in (real, ours):
        writer.metadata(now, 1.5, "train_loss", {"unit": "bits", "format": ":.3f"})
        writer.log(now, 1.5, (1, 2), {"train_loss": 0.1, "é": None})
        writer.log(now, 1.5, "PARAMETER", {"lr": [1, 2.0]})
        writer.log(now, 1.5, (), {})
        writer.flush()
        writer.file.close()
    # 1.0 writes the date without the time zone, 1.1 with it
    zone = re.compile(r"(\d\d:\d\d:\d\d\.\d{6})[+-]\d\d:\d\d")
    lines = [zone.sub(r"\1", (tmp_path / name).read_text()) for name in ("real", "ours")]
    assert lines[0] == lines[1]


def test_the_installed_package_is_used_unless_it_is_a_placeholder(tmp_path, monkeypatch):
    package = tmp_path / "dllogger"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "dllogger", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(open_lines(tmp_path / "a.json"), JsonLines)
    monkeypatch.delitem(sys.modules, "dllogger")
    (package / "__init__.py").write_text(
        "class JSONStreamBackend:\n    def __init__(self, verbosity, filename, append=False):\n"
        "        self.given = verbosity, filename, append\n"
    )
    importlib.invalidate_caches()
    assert open_lines(tmp_path / "a.json").given == (1, str(tmp_path / "a.json"), True)
    monkeypatch.delitem(sys.modules, "dllogger")


def test_resume_appends_and_a_half_written_line_spoils_no_other(tmp_path, no_dllogger):
    for update in (1, 2):
        run = make_logger(tmp_path)
        run.log("train", (1, update), {"loss": update})
        run.close()
    path = tmp_path / "nvlog.json"
    logged = [entry for entry in read_lines(path) if entry["type"] == "LOG"]
    assert [entry["step"] for entry in logged] == [[1, 1], [1, 2]]
    with path.open("a") as file:
        file.write('DLLL {"timestamp": "17')
    run = make_logger(tmp_path)
    run.log("train", (1, 3), {"loss": 3})
    run.close()
    assert json.loads(path.read_text().splitlines()[-1][5:])["step"] == [1, 3]


def test_every_line_is_in_the_file_before_the_run_is_closed(tmp_path, no_dllogger):
    run = make_logger(tmp_path)
    run.log("train", (1, 1), {"loss": 1.0})
    assert len(read_lines(tmp_path / "nvlog.json")) == 2
    run.close()


def test_numbers_that_json_does_not_know_become_null(tmp_path, no_dllogger, caplog):
    caplog.set_level(logging.INFO)
    run = make_logger(tmp_path)
    run.log("train", (1, 1), {"loss": math.nan, "accuracy": math.inf})
    run.close()
    text = (tmp_path / "nvlog.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_lines(tmp_path / "nvlog.json")[-1]["data"] == {"train_loss": None, "train_accuracy": None}
    assert "loss nan bits" in caplog.text


def test_metadata_is_written_once_per_metric_and_scope(tmp_path, no_dllogger):
    run = make_logger(tmp_path)
    for scope in ("train", "val", "train"):
        run.log(scope, (1, 1), {"loss": 1.0})
    run.close()
    entries = read_lines(tmp_path / "nvlog.json")
    assert [e["metric"] for e in entries if e["type"] == "METADATA"] == ["train_loss", "val_loss"]


def test_metrics_outside_the_table_and_impossible_formats_are_internal_errors(tmp_path):
    run = make_logger(tmp_path)
    with pytest.raises(KeyError, match="los"):
        run.log("train", (1, 1), {"los": 1.0})
    run.close()
    with pytest.raises(ValueError, match="format"):
        make_logger(tmp_path, metrics={"loss": MetricInfo("", "d", "A whole number.")})


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output_dir .*file: nvlog.json cannot be written"):
        make_logger(tmp_path / "file")


def test_a_full_disk_ends_the_run_in_one_line_and_can_still_be_closed(tmp_path, caplog, no_dllogger):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "nvlog.json").symlink_to("/dev/full")
    run = make_logger(tmp_path)
    with pytest.raises(TrainingError, match=r"nvlog\.json: could not be written \(No space left.*--resume"):
        run.log("train", (1, 1), {"loss": 1.0})
    run.close()
    assert "its end could not be written (No space left" in caplog.text
    run.close()


def test_parameters_as_a_file_are_whole_or_as_before(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    run = make_logger(tmp_path)
    run.parameters({"lr": 1}, "config.json")
    (tmp_path / ".config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"/config\.json: could not be written \(No space left"):
        run.parameters({"lr": 2}, "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1}
    (tmp_path / ".config.json.tmp").unlink()
    run.parameters({"lr": 2}, "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 2}
    run.close()


def test_other_ranks_write_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = make_logger(tmp_path / "run", enabled=False, tensorboard=True)
    run.log("train", (1, 1), {"loss": 1.0})
    run.parameters({"lr": 1})
    run.console("hello")
    run.close()
    assert not (tmp_path / "run").exists()
    assert caplog.text == ""


# ---- TensorBoard --------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_same_values_by_update(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_logger(tmp_path, tensorboard=True)
    run.parameters({"lr": 0.5})
    run.log("train", (1, 10), {"loss": 2.0})
    run.log("train", (1, 20), {"loss": 1.5})
    run.log("val", (1,), {"loss": 1.0})
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.0), (20, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(20, 1.0)]


def test_tensorboard_that_is_missing_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed .*pip install"):
        make_logger(tmp_path, tensorboard=True)


# ---- the console --------------------------------------------------------------------------------------------


def test_console_lines_follow_the_table_and_stay_aligned(tmp_path, caplog, no_dllogger):
    caplog.set_level(logging.INFO)
    run = make_logger(tmp_path, total_updates=4000)
    run.log("train", (1, 200), {"eta": 3723, "ntokens/s": 12345.6, "loss": 10.25, "accuracy": 0.5})
    run.log("train", (1, 1400), {"loss": 9.5, "accuracy": 0.25, "ntokens/s": 45.6, "eta": 59.6})
    run.log("train_avg", (1,), {"loss": 9.5})
    run.close()
    assert [record.message for record in caplog.records] == [
        "train | epoch 1 | update  200/4000 | loss 10.250 bits | accuracy 0.50 | ntokens/s 12,346 tokens/s"
        " | eta 1:02:03",
        "train | epoch 1 | update 1400/4000 | loss  9.500 bits | accuracy 0.25 | ntokens/s     46 tokens/s"
        " | eta    1:00",
        "train_avg | epoch 1 | loss 9.500 bits",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (-3, "0:00"), (61, "1:01"), (3600, "1:00:00"), (183845, "2 d 03:04"), (math.inf, "?")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert METRICS["eta"].text(seconds) == text


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield root
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_the_console_is_set_up_once_and_warnings_are_marked(root_logger):
    stream = io.StringIO()
    setup_console()
    setup_console(stream=stream)
    logging.getLogger("common.some").info("a line")
    logging.getLogger("common.some").debug("not shown")
    logging.getLogger("common.some").warning("look out")
    assert stream.getvalue() == "a line\nWARNING: look out\n"


def test_other_ranks_tell_errors_only(root_logger):
    stream = io.StringIO()
    setup_console(is_main=False, stream=stream)
    logging.getLogger("common.some").warning("a warning")
    logging.getLogger("common.some").error("an error")
    assert stream.getvalue() == "ERROR: an error\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_shown_on_a_terminal_of_rank_0_only(monkeypatch):
    for stream, main, shown in ((Terminal(), True, True), (io.StringIO(), True, False), (Terminal(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(distributed, "is_main", lambda main=main: main)
        assert list(progress(iter([1, 2, 3]), desc="decoding", total=3, unit="file")) == [1, 2, 3]
        assert ("decoding" in stream.getvalue()) is shown
