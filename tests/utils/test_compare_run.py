"""Published figures as data, logs as they come, verdicts that follow from them, and a picture that shows the run."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from common.errors import ConfigError
from utils import compare_run, curve_plot, record_reference
from utils.curve_verdicts import collapsed, compare, judge
from utils.reference_curves import FOLDER, choose, read_reference, shipped
from utils.run_log import read_run
from wav2vec2.health_config import HealthConfig

BASE = {"encoder_embed_dim": 768, "latent_groups": 2}
# Written down a second time, from NVIDIA's README: update -> average, standard deviation, minimum, maximum, median
ACCURACY = {
    50000: (0.491, 0.011, 0.471, 0.514, 0.493),
    100000: (0.537, 0.009, 0.518, 0.550, 0.539),
    150000: (0.564, 0.009, 0.544, 0.577, 0.564),
    200000: (0.580, 0.009, 0.558, 0.589, 0.583),
    250000: (0.599, 0.008, 0.586, 0.607, 0.602),
    300000: (0.610, 0.010, 0.589, 0.622, 0.611),
    350000: (0.619, 0.009, 0.607, 0.634, 0.617),
    400000: (0.629, 0.007, 0.614, 0.636, 0.633),
}
WER = {
    50000: (11.198, 0.303, 10.564, 11.628, 11.234),
    100000: (10.825, 0.214, 10.574, 11.211, 10.763),
    150000: (10.507, 0.160, 10.224, 10.778, 10.518),
    200000: (9.567, 0.186, 9.235, 9.836, 9.530),
    250000: (9.115, 0.193, 8.764, 9.339, 9.194),
    300000: (8.885, 0.201, 8.507, 9.151, 8.972),
    320000: (8.827, 0.188, 8.440, 9.043, 8.878),
}


def make_run(folder, values, mode="pretrain", max_update=400000, model=BASE, hours=None, per_epoch=1000, **sections):
    """A run's folder with a log of (update, {metric: value}); with `hours` its lines tell so much speech per epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"mode": mode, "model": model, "optim": {"max_update": max_update}, "objective": {"num_negatives": 100}}
    config |= sections
    (folder / "config.json").write_text(json.dumps({"config": config | {"run": {"seed": 1}}}))
    lines = [json.dumps({"type": "LOG", "step": "PARAMETER", "data": config})]
    lines.append(json.dumps({"type": "METADATA", "metric": "train_loss", "metadata": {"unit": "bits"}}))
    before = 0
    for update, data in values:
        if hours:
            data = {**data, "train_speech_rate": hours / per_epoch * (update - before) * 3600, "train_took": 1.0}
            before = update
        lines.append(json.dumps({"type": "LOG", "step": [-(-update // per_epoch), update], "data": data}))
    (folder / "nvlog.json").write_text("".join(f"DLLL {line}\n" for line in lines))
    return folder


def like(table, column, shift=0.0):
    """A log that follows a column of a published table."""
    return [(update, {"val_accuracy": row[column] + shift}) for update, row in table.items()]


def verdict_of(folder, name="librispeech_base_pretrain"):
    run = read_run(folder)
    reference = choose(run, name)
    compared = compare(run, reference)
    return compared, judge(run, reference, compared)


def status_of(*argv):
    try:
        compare_run.main([str(argument) for argument in argv])
    except SystemExit as end:
        return end.code
    return 0


# ---- Data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metric", "table"),
    [("librispeech_base_pretrain", "val_accuracy", ACCURACY), ("librispeech_base_finetune", "val_wer", WER)],
)
def test_published_figures(name, metric, table):
    entry = json.loads((FOLDER / f"{name}.json").read_text())
    (curve,) = entry["curves"]
    assert curve["metric"] == metric
    found = {p["update"]: (p["mean"], p["std"], p["low"], p["high"], p["median"]) for p in curve["points"]}
    assert found == table
    for mean, deviation, low, high, median in found.values():
        assert low <= mean <= high
        assert low <= median <= high
        # of n values the sample's deviation is at most range / 2 * sqrt(n / (n - 1)), and at least range / sqrt(2 n)
        assert (high - low) / 4 - 0.001 <= deviation <= (high - low) / 2 * math.sqrt(8 / 7) + 0.001


def test_every_shipped_reference_is_sound_and_says_where_it_comes_from():
    references = shipped()
    assert len({reference.name for reference in references}) == len(references) >= 2
    for reference in references:
        assert (FOLDER / f"{reference.name}.json").is_file()
        assert reference.source
        assert reference.band
        assert reference.mode in ("pretrain", "finetune")
        assert reference.match["hours"][0] < reference.match["hours"][1]
        for curve in reference.curves:
            last = max(point.update for point in curve.points)
            assert last <= reference.match["max_update"]
            assert curve.window >= 1
            if curve.metric.endswith("accuracy"):
                assert all(0 <= point.low <= point.high <= 1 for point in curve.points)


def test_no_run_fits_two_references():
    """Else none of them would be chosen without being asked for."""
    seen = {}
    for reference in shipped():
        key = reference.mode, reference.match["encoder_embed_dim"], reference.match["max_update"]
        for low, high in seen.get(key, ()):
            assert reference.match["hours"][1] < low or high < reference.match["hours"][0]
        seen.setdefault(key, []).append(reference.match["hours"])


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(schema=2),
        lambda entry: entry.pop("source"),
        lambda entry: entry["curves"][0]["points"][0].update(low=0.6),
        lambda entry: entry["curves"][0]["points"].reverse(),
        lambda entry: entry["curves"][0].update(better="up"),
        lambda entry: entry["curves"][0]["points"].clear(),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, change):
    entry = json.loads((FOLDER / "librispeech_base_pretrain.json").read_text())
    change(entry)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match=r"mine\.json.*"):
        read_reference(path)


# ---- Verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "shift", "standing"),
    [
        (0, 0, "within"),
        (2, 0, "within"),
        (3, 0, "within"),
        (4, 0, "within"),
        (2, -0.005, "outside"),
        (3, 0.005, "better"),
    ],
)
def test_columns_of_the_table_lie_where_they_should(tmp_path, column, shift, standing):
    _, verdict = verdict_of(make_run(tmp_path / "run", like(ACCURACY, column, shift)))
    assert verdict.standing == standing


def test_words_of_the_issue(tmp_path, capsys):
    run = make_run(tmp_path / "run", [(50000, {"val_accuracy": 0.470})])
    assert status_of(run, "--reference", "librispeech_base_pretrain") == 1
    out = capsys.readouterr().out.splitlines()
    assert "update 50000: accuracy (validation) 0.470, reference 0.471 to 0.514: slightly below" in out
    assert out[-1] == "verdict: accuracy (validation) below the reference band from update 50000"


def test_lower_is_better_for_word_error_rates(tmp_path):
    for shift, standing, words in ((-3.0, "better", "below (better)"), (3.0, "outside", "above")):
        values = [(update, {"val_wer": row[0] + shift}) for update, row in WER.items()]
        folder = make_run(tmp_path / standing, values, mode="finetune", max_update=320000)
        compared, verdict = verdict_of(folder, "librispeech_base_finetune")
        assert verdict.standing == standing
        assert {item.words for item in compared} == {words}


def test_what_counts_is_where_a_run_ends(tmp_path):
    dip = [(u, {"val_accuracy": row[0] - (0.2 if u in (100000, 150000) else 0)}) for u, row in ACCURACY.items()]
    _, verdict = verdict_of(make_run(tmp_path / "dip", dip))
    assert verdict.standing == "within"
    assert "100000" in verdict.text
    assert "150000" in verdict.text
    falls = [
        (u, {"val_accuracy": row[0] - (0.2 if u in (100000, 350000, 400000) else 0)}) for u, row in ACCURACY.items()
    ]
    _, verdict = verdict_of(make_run(tmp_path / "falls", falls))
    assert verdict.standing == "outside"
    assert verdict.text.endswith("from update 350000")


def test_values_are_taken_from_the_nearest_line_within_the_window(tmp_path):
    values = [(48500, {"val_accuracy": 0.1}), (49300, {"val_accuracy": 0.49}), (97000, {"val_accuracy": 0.5})]
    compared, _ = verdict_of(make_run(tmp_path / "run", values))
    assert [(item.point.update, item.update, item.value) for item in compared] == [(50000, 49300, 0.49)]
    assert "(logged at 49300)" in compared[0].line()


def test_collapses(tmp_path):
    chance = math.log2(101)
    updates = range(1000, 60000, 1000)

    def log(data, mode="pretrain", max_update=200000, **sections):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return read_run(make_run(folder, [(u, data(u)) for u in updates], mode, max_update, **sections))

    def pinned(distance, max_update=60000, **sections):
        return log(lambda u: {"train_loss_0": chance + distance, "train_loss": 6.0}, max_update=max_update, **sections)

    same = log(
        lambda u: (
            {"train_accuracy": 0.99 if u > 30000 else 0.3, "train_loss": 0.1, "train_loss_0": 0.02}
            | {"train_code_perplexity": 2.0 if u > 30000 else 200.0}
        )
    )
    assert collapsed(same).startswith("collapsed from update 31000: codebook collapse; code_share 0 (below")
    assert status_of(same.folder, "--reference", "librispeech_base_pretrain") == 1
    assert "at chance" in collapsed(pinned(0.0005))
    assert collapsed(pinned(0.0005, max_update=200000)) == ""
    # with the run's own negatives and thresholds
    assert collapsed(pinned(0.0005, objective={"num_negatives": 100, "codebook_negatives": 27})) == ""
    assert collapsed(pinned(0.1)) == ""
    assert "--chance_margin 0.2" in collapsed(pinned(0.1, health={"chance_margin": 0.2}))
    broken = log(lambda u: {"train_loss": None if u > 40000 else 5.0})
    assert "not finite from update 41000" in collapsed(broken)
    blanks = {"val_blank_share": 1.0, "val_length_ratio": 0.0, "train_loss": 5.0}
    assert "blanks" in collapsed(log(lambda u: blanks, "finetune"))
    late = log(lambda u: blanks | {"val_blank_share": 1.0 if u < 59000 else 0.7}, "finetune")
    sound = log(
        lambda u: {"train_accuracy": 0.97, "train_code_perplexity": 300.0, "train_loss_0": 2.0, "train_loss": 2}
    )
    assert collapsed(late) == collapsed(sound) == ""


def test_settings_of_another_version(tmp_path):
    run = read_run(make_run(tmp_path / "run", [], health={"chance_margin": 0.5, "abolished": 3}))
    assert run.settings().health == HealthConfig(chance_margin=0.5)
    for wrong in ("0.5", None, {"chance_margin": "much"}):
        with pytest.raises(ConfigError, match=r"config\.json: health"):
            read_run(make_run(tmp_path / "wrong", [], health=wrong)).settings()


# ---- Logs -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_forgets_what_it_made_again(tmp_path):
    values = [(10, {"val_accuracy": 0.1}), (20, {"val_accuracy": 0.2}), (30, {"val_accuracy": 0.3})]
    values += [(20, {"val_accuracy": 0.25}), (24, {"val_accuracy": 0.26})]
    assert read_run(make_run(tmp_path / "run", values)).curves["val_accuracy"] == {10: 0.1, 20: 0.25, 24: 0.26}


def test_a_log_that_is_being_written(tmp_path):
    folder = make_run(tmp_path / "run", like(ACCURACY, 0)[:3])
    whole = read_run(folder)
    text = (folder / "nvlog.json").read_text()
    line = 'DLLL {"type": "LOG", "step": [9, 200000], "data": {"val_accuracy": 0.5}}\n'
    for end in range(len(line) - 1):
        (folder / "nvlog.json").write_text(text + line[:end])
        assert end == len(line) - 2 or read_run(folder).curves == whole.curves
    for strange in (
        "[1]",
        '"x"',
        "DLLL 3",
        'DLLL {"type": "LOG", "step": [], "data": {"wer": 1}}',
        "\x00\xff",
        "DLLL {}",
    ):
        (folder / "nvlog.json").write_text(f"{text}{strange}\n")
        assert read_run(folder).curves == whole.curves
    (folder / "nvlog.json").write_text(text + line)
    assert read_run(folder).last_update == 200000


def test_a_run_with_nothing_to_compare_says_so(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [(100, {"val_accuracy": 0.1})])
    assert status_of(folder, "--reference", "librispeech_base_pretrain", "--png", tmp_path / "x.png") == 0
    assert "nothing to compare: the log ends at update 100, the reference begins at 50000" in capsys.readouterr().out
    (folder / "nvlog.json").write_text("")
    assert status_of(folder, "--reference", "librispeech_base_pretrain") == 0


def test_the_log_of_a_real_run_is_read(tmp_path):
    from tiny import MODEL_FLAGS, corpus

    import train

    data, out = corpus(tmp_path / "corpus"), tmp_path / "out"
    flags = [*MODEL_FLAGS, "--num_workers", "0", "--device", "cpu", "--max_tokens", "40000", "--num_negatives", "10"]
    flags += ["--mask_length", "3", "--max_update", "12", "--log_frequency", "1", "--data", str(data)]
    train.main(["pretrain", "--output_dir", str(out), *flags])
    run = read_run(out)
    assert (run.mode, run.last_update, list(run.curves["train_loss"])) == ("pretrain", 12, list(range(1, 13)))
    lengths = [int(line.split("\t")[1]) for line in (data / "train.tsv").read_text().splitlines()[1:]]
    # crops to the shortest of a sub-batch leave less than all of it
    least, most = run.hours()
    assert least <= 1.001 * sum(lengths) / 16000 / 3600
    assert most > 0.5 * sum(lengths) / 16000 / 3600


# ---- Choice ---------------------------------------------------------------------------------------------------------


def test_the_reference_is_chosen_by_mode_width_updates_and_hours(tmp_path):
    values = [(update, {"train_loss": 5.0}) for update in range(100, 3000, 100)]
    run = read_run(make_run(tmp_path / "a", values, hours=955.0, per_epoch=620))
    assert run.hours()[0] <= 955 <= run.hours()[1]
    assert run.hours() == pytest.approx((955, 955), rel=0.15)
    assert choose(run, "").name == "librispeech_base_pretrain"
    run = read_run(make_run(tmp_path / "b", values, "finetune", 320000, hours=955.0, per_epoch=620))
    assert choose(run, "").name == "librispeech_base_finetune"
    run = read_run(make_run(tmp_path / "young", values[:3], hours=955.0, per_epoch=620))  # in its first epoch
    assert run.hours()[1] == math.inf
    assert choose(run, "").name == "librispeech_base_pretrain"
    others = {
        "short": {"max_update": 100000},
        "narrow": {"model": {"encoder_embed_dim": 512}},
        "little": {"hours": 100.0, "per_epoch": 620},
    }
    names = {mode: [one.name for one in shipped() if one.mode == mode] for mode in ("pretrain", "finetune")}
    for name, change in others.items():
        run = read_run(make_run(tmp_path / name, values, **change))
        with pytest.raises(ConfigError) as error:
            choose(run, "")
        assert all(known in str(error.value) for known in names["pretrain"])
        assert not any(known in str(error.value) for known in names["finetune"])


def test_usage_errors_have_status_2_and_one_line(tmp_path):
    run = make_run(tmp_path / "run", like(ACCURACY, 0))
    (tmp_path / "empty").mkdir()
    for argv, words in (
        ([run, "--reference", "librispeech_base_pretrian"], "did you mean librispeech_base_pretrain?"),
        ([run, "--reference", "librispeech_base_finetune"], "--reference"),
        ([tmp_path / "empty"], "config.json"),
        ([tmp_path / "absent"], "no such folder"),
        ([run, "--pgn", "x"], "--png"),
    ):
        command = [sys.executable, compare_run.__file__, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_file_of_ones_own_is_a_reference(tmp_path):
    run = make_run(tmp_path / "run", like(ACCURACY, 0))
    path = tmp_path / "mine.json"
    path.write_text((FOLDER / "librispeech_base_pretrain.json").read_text().replace("librispeech_base", "mine"))
    assert choose(read_run(run), str(path)).name == "mine_pretrain"


# ---- Results --------------------------------------------------------------------------------------------------------


def test_json_tells_what_is_printed(tmp_path):
    run, out = make_run(tmp_path / "run", like(ACCURACY, 2, -0.1)), tmp_path / "out.json"
    assert status_of(run, "--reference", "librispeech_base_pretrain", "--json", out) == 1
    written = json.loads(out.read_text())
    assert (written["standing"], written["status"], written["last_update"]) == ("outside", 1, 400000)
    assert [item["milestone"] for item in written["milestones"]] == list(ACCURACY)
    assert all(item["outside"] and item["place"] == "below" for item in written["milestones"])


def rows_of(path, text):
    """Rows of the picture, from the top, above the legend, that have this colour."""
    from matplotlib.image import imread

    image = np.round(255 * imread(path)[..., :3]).astype(int)
    assert image.shape[0] > 400
    assert image.shape[1] > 600
    wanted = [int(text[place : place + 2], 16) for place in (1, 3, 5)]
    above_legend = image[: int(0.82 * len(image))]
    return np.flatnonzero((above_legend == wanted).all(axis=2).any(axis=1))


def test_the_picture_shows_the_run_where_its_values_are(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = {}
    for name, values in {"inside": like(ACCURACY, 0), "below": like(ACCURACY, 2, -0.2), "empty": []}.items():
        pictures[name] = tmp_path / f"{name}.png"
        folder = make_run(tmp_path / name, values)
        status_of(folder, "--reference", "librispeech_base_pretrain", "--png", pictures[name])
    run = {name: rows_of(path, curve_plot.RUN) for name, path in pictures.items()}
    mean = {name: rows_of(path, curve_plot.BAND) for name, path in pictures.items()}
    outside = {name: rows_of(path, curve_plot.MARKS["outside"][1]) for name, path in pictures.items()}
    assert len(run["empty"]) == 0 < len(mean["empty"])
    # the line of the run hides that of the mean, which it follows
    assert abs(np.median(run["inside"]) - np.median(mean["empty"])) < 20
    assert abs(np.ptp(run["inside"]) - np.ptp(mean["empty"])) < 20
    assert run["below"].max() > mean["below"].max()
    assert np.median(run["below"]) > np.median(mean["below"]) + 50
    assert len(outside["inside"]) == 0 < len(outside["below"])


# ---- Making references ----------------------------------------------------------------------------------------------


def record(tmp_path, series, mode="pretrain"):
    metrics = record_reference.QUANTITIES[mode]
    folders = [
        make_run(
            tmp_path / f"seed{n}",
            [(u, dict.fromkeys(metrics, v)) for u, v in values],
            max_update=100,
            model=BASE | {"latent_vars": 1},  # whose perplexity says nothing
            hours=0.5,
            per_epoch=20,
        )
        for n, values in enumerate(series)
    ]
    out = tmp_path / "made.json"
    record_reference.main([*map(str, folders), "--name", "made", "--title", "made", "--out", str(out)])
    return folders, read_reference(out)


def test_a_recorded_reference_holds_its_own_runs_and_not_others(tmp_path):
    series = [[(u, 0.5 + 0.001 * u + 0.05 * seed) for u in range(10, 101, 10)] for seed in range(3)]
    folders, reference = record(tmp_path, series)
    for folder in folders:
        run = read_run(folder)
        compared = compare(run, reference)
        assert len(compared) == 4 * 10
        assert judge(run, reference, compared).standing == "within"
    curve = next(c for c in reference.curves if c.metric == "train_code_perplexity")
    # at update 10: 0.51, 0.56, 0.61, and half of 0.1 on both sides
    assert (curve.points[0].low, curve.points[0].high) == pytest.approx((0.46, 0.66))
    far = make_run(tmp_path / "far", [(u, {"train_accuracy": 0.1}) for u in range(10, 101, 10)], max_update=100)
    assert judge(read_run(far), reference, compare(read_run(far), reference)).standing == "outside"


def test_one_run_gets_a_band_that_says_what_it_is(tmp_path):
    _, reference = record(tmp_path, [[(u, 0.5) for u in range(10, 101, 10)]])
    assert "one run or two" in reference.band
    assert (reference.curves[0].points[0].low, reference.curves[0].points[0].high) == pytest.approx((0.35, 0.65))


def test_floor_of_error_rates():
    assert record_reference.band([3.0, 3.1, 3.2], "val_wer") == pytest.approx({"low": 2.1, "high": 4.1, "mean": 3.1})
    assert record_reference.band([3.0, 3.2], "val_wer") == pytest.approx({"low": 0.1, "high": 6.1, "mean": 3.1})
    assert record_reference.band([0.2, 0.2], "val_wer")["low"] == 0
    assert record_reference.band([0.99, 0.98], "val_accuracy")["high"] == 1


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    one = make_run(tmp_path / "one", [(10, {"train_loss": 1.0})])
    two = make_run(tmp_path / "two", [(10, {"train_nll_loss": 1.0})], mode="finetune")
    for folders, words in (([one, two], "modes"), ([one], "no update in common")):
        argv = [*map(str, folders), "--name", "x", "--title", "x", "--out", str(tmp_path / "x.json")]
        with pytest.raises(ConfigError, match=words):
            record_reference.main(argv)
    assert not (tmp_path / "x.json").exists()
