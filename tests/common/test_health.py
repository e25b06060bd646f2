"""Rules against made sequences of figures: sick ones, and healthy ones that have been published or measured."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from conftest import ROOT

from common.errors import TrainingError
from common.health import MIN_HISTORY, SKIPPED, Health, Limit, Rule
from wav2vec2 import health_rules
from wav2vec2.config import Config, CtcConfig, ModelConfig, ObjectiveConfig, OptimConfig, PrecisionConfig
from wav2vec2.health_config import HealthConfig
from wav2vec2.run_config import RunConfig

LOW = Rule(
    "too low", (Limit("x", "below", 1.0, "min_x"),), ("more of it", "less"), patience=100, grace=50, shown=("y",)
)
BASE = Config(
    mode="pretrain", optim=OptimConfig(max_update=400000, warmup_updates=32000), run=RunConfig(output_dir="out")
)
QUICKSTART = Config(
    mode="pretrain",
    model=ModelConfig(latent_vars=64),
    optim=OptimConfig(max_update=500, warmup_updates=40),
    run=RunConfig(output_dir="out"),
)
# accuracy by update over eight seeds of Base: average, smallest, largest (NVIDIA DeepLearningExamples)
PUBLISHED = {
    50: (0.491, 0.471, 0.514),
    100: (0.537, 0.518, 0.550),
    150: (0.564, 0.544, 0.577),
    200: (0.580, 0.558, 0.589),
    250: (0.599, 0.586, 0.607),
    300: (0.610, 0.589, 0.622),
    350: (0.619, 0.607, 0.634),
    400: (0.629, 0.614, 0.636),
}
# update, loss_0, accuracy, code_perplexity, grad_norm of scripts/quickstart.sh, 2 x 64 codes: a plateau, then learning
MEASURED = [
    (25, 6.7199, 0.0390, 86.9, 4.736),
    (50, 6.6596, 0.0370, 113.0, 0.178),
    (75, 6.6581, 0.0427, 114.2, 0.177),
    (100, 6.6579, 0.0429, 114.3, 0.161),
    (125, 6.6575, 0.0411, 114.2, 0.163),
    (150, 6.6567, 0.0386, 114.4, 0.164),
    (175, 6.6198, 0.0540, 102.2, 0.519),
    (200, 6.4241, 0.0943, 85.6, 0.689),
    (250, 6.1006, 0.1149, 68.1, 0.896),
    (300, 5.8150, 0.1612, 56.8, 1.234),
    (400, 5.3231, 0.2146, 47.9, 1.877),
    (500, 5.0545, 0.2583, 55.2, 1.882),
]


def feed(health: Health, updates: Iterable[int], **figures: float) -> None:
    for update in updates:
        health.check(update, figures)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def end(look: Callable[[int], None], updates: Iterable[int]) -> tuple[int, str]:
    """The update at which looking ends the run, and what it says."""
    for update in updates:
        try:
            look(update)
        except TrainingError as error:
            return update, str(error)
    raise AssertionError("the run has not been ended")


def pretraining(health: Health, config: Config, update: int, **values: float) -> None:
    health.check(update, health_rules.training_figures(config, values))


# ---- What every rule does --------------------------------------------------------------------------------------------


def test_a_sickness_is_warned_of_at_half_its_patience_and_ends_the_run_at_all_of_it(caplog):
    health = Health([LOW], "stop", "out")
    health.saved(40)
    feed(health, range(10, 100, 10), x=0.5, y=7.0)  # grace until 50, found at 60
    assert warnings(caplog) == []
    feed(health, range(100, 160, 10), x=0.5, y=7.0)
    (told,) = warnings(caplog)
    assert "too low at update 110" in told
    assert "if it lasts, until update 160;" in told
    with pytest.raises(TrainingError) as error:
        health.check(160, {"x": 0.5, "y": 7.0})
    message = str(error.value)
    for part in ("too low at update 160", "x 0.5 (below --min_x 1)", "y 7", "for 100 updates"):
        assert part in message
    for part in ("out/wav2vec2_update40.pt", "1. more of it, 2. less", "--health warn"):
        assert part in message
    assert "\n" not in message


def test_one_healthy_figure_starts_the_patience_again(caplog):
    caplog.set_level(logging.INFO)
    health = Health([LOW], "stop", "out")
    for start in (100, 300, 500):
        feed(health, range(start, start + 100, 10), x=0.5)
        health.check(start + 100, {"x": 2.0})
    assert len(warnings(caplog)) == 3
    assert sum("too low is over" in record.getMessage() for record in caplog.records) == 3


def test_the_warning_comes_first_even_if_the_log_is_written_seldom(caplog):
    health = Health([LOW], "stop", "out")
    feed(health, (1000, 2000), x=0.5)
    assert len(warnings(caplog)) == 1
    with pytest.raises(TrainingError):
        health.check(3000, {"x": 0.5})


def test_warn_never_ends_the_run_and_off_does_not_look(caplog):
    feed(Health([LOW], "off", "out"), range(100, 1000, 10), x=0.5)
    assert warnings(caplog) == []
    feed(Health([LOW], "warn", "out"), range(100, 1000, 10), x=0.5)
    assert len(warnings(caplog)) == 1


def test_a_rule_waits_for_its_figures_and_ignores_what_is_not_finite(caplog):
    health = Health([LOW], "stop", "out")
    feed(health, range(100, 150, 10), x=0.5)
    feed(health, range(150, 400, 10), y=1.0)
    feed(health, range(150, 400, 10), x=math.nan)
    assert len(warnings(caplog)) == 0
    with pytest.raises(TrainingError):
        feed(health, range(400, 420, 10), x=0.5)


def test_all_limits_of_a_rule_have_to_be_passed():
    both = Rule("both", (Limit("a", "above", 0.9, "max_a"), Limit("b", "below", 0.1, "min_b")), ("c",))
    health = Health([both], "stop", "out")
    feed(health, range(1, 9), a=0.95, b=0.1)
    feed(health, range(1, 9), a=0.89, b=0.0)
    with pytest.raises(TrainingError):
        health.check(9, {"a": 0.9, "b": 0.05})


def test_a_relative_limit_is_a_multiple_of_the_median_of_healthy_figures():
    rule = Rule("jump", (Limit("x", "above", 10.0, "max_jump", relative=True),), ("less",))
    health = Health([rule], "warn", "out")
    feed(health, range(1, MIN_HISTORY), x=1.0)
    health.check(20, {"x": 1e9})  # nothing to compare with yet; the median does not mind one such value
    assert not health.state_dict()["since"]
    feed(health, range(30, 60), x=2.0)
    health.check(60, {"x": 19.9})
    assert not health.state_dict()["since"]
    feed(health, range(61, 300), x=20.1)  # never becomes what is usual
    assert health.state_dict()["since"] == {"jump": 61}


def test_the_checkpoint_from_before_the_sickness_is_kept():
    health = Health([LOW], "warn", "out")
    assert health.kept == ()
    assert "no healthy checkpoint" in health.last_healthy
    for update in range(10, 310, 10):
        health.check(update, {"x": 2.0 if update < 95 or update > 250 else 0.5})
        health.saved(update)
        assert health.kept == ((90,) if 95 < update <= 250 else (update,))


def test_a_resumed_judge_decides_as_the_uninterrupted_one():
    rules = [LOW, Rule("jump", (Limit("z", "above", 3.0, "max_z", relative=True),), ("less",), patience=80)]
    figures = {update: {"x": 0.5 if update > 130 else 3.0, "z": 1.0 + update % 7} for update in range(10, 300, 10)}

    def run(stop: int) -> tuple[str, dict[str, Any]]:
        health = Health(rules, "stop", "out")
        for update, values in figures.items():
            if update == stop:
                state = json.loads(json.dumps(health.state_dict()))  # plain containers, and exact
                health = Health(rules, "stop", "out")
                health.load_state_dict(state)
            try:
                health.check(update, values)
            except TrainingError as error:
                return str(error), health.state_dict()
            health.saved(update)
        return "", health.state_dict()

    expected = run(stop=0)
    assert "update 240" in expected[0]
    assert all(run(stop) == expected for stop in figures if stop <= 240)


# ---- The rules of pre-training ---------------------------------------------------------------------------------------


def test_the_published_curve_and_a_slow_start_are_healthy(caplog):
    for column in range(3):
        health = health_rules.make_health(BASE)
        points = [(0, 0.01), *((1000 * update, row[column]) for update, row in PUBLISHED.items())]
        for (first, low), (last, high) in zip(points, points[1:], strict=False):
            for update in range(first + 200, last + 1, 200):
                accuracy = low + (high - low) * (update - first) / (last - first)
                at_chance = update < 12000  # within 0.01 bits, for the first quarter of them within 0.0005
                loss = math.log2(101) - (0.0004 if update < 3000 else 0.008) if at_chance else 6.0 - 4 * accuracy
                codes = 17.8 + 0.0003 * update  # as in reports of healthy runs: 17.8 at 1,000, 25.8 at 22,000
                norm = 0.2 if at_chance else 1.5
                values = {"loss_0": loss, "accuracy": accuracy, "code_perplexity": codes, "grad_norm": norm}
                pretraining(health, BASE, update, **values)
    assert warnings(caplog) == []


def test_the_measured_quickstart_is_healthy(caplog):
    health = health_rules.make_health(QUICKSTART)
    for update, loss, accuracy, codes, norm in MEASURED:
        values = {"loss_0": loss, "accuracy": accuracy, "code_perplexity": codes, "grad_norm": norm}
        pretraining(health, QUICKSTART, update, **values)
    assert warnings(caplog) == []
    assert health.kept == ()


@pytest.mark.parametrize("name", ["quickstart_pretrain", "digits_pretrain"])
def test_recorded_runs_of_three_seeds_are_healthy(caplog, name):
    curves = json.loads((ROOT / f"docs/reference_curves/{name}.json").read_text())["curves"]
    curves = [curve for curve in curves if curve["metric"].startswith("train_")]
    assert {"train_accuracy", "train_code_perplexity"} <= {curve["metric"] for curve in curves}
    for seed in range(3):
        health = health_rules.make_health(QUICKSTART)
        for points in zip(*(curve["points"] for curve in curves), strict=True):
            metrics = [curve["metric"].removeprefix("train_") for curve in curves]
            values = dict(zip(metrics, (point["values"][seed] for point in points), strict=True))
            pretraining(health, QUICKSTART, points[0]["update"], **values)
    assert warnings(caplog) == []


HEALTHY = {"loss_0": 4.0, "accuracy": 0.3, "code_perplexity": 100.0, "grad_norm": 1.0}
SICK = {
    "codebook collapse": {"code_perplexity": 2.0},
    "trivial contrastive task": {"accuracy": 0.9999, "loss_0": 0.0013},
    "pinned at chance": {"loss_0": 6.658},
    "vanishing": {"grad_norm": 1e-9},
    "exploding": {"grad_norm": 1e4},
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_base_run_ends_within_a_twentieth_of_it(name):
    health = health_rules.make_health(BASE)

    def look(update: int) -> None:
        pretraining(health, BASE, update, **{**HEALTHY, **(SICK[name] if update > 12000 else {})})

    update, message = end(look, range(200, 40000, 200))
    assert name in message
    assert update == 12200 + (8000 if name == "pinned at chance" else 2000)


@pytest.mark.parametrize(("groups", "codes"), [(2, 320), (2, 10), (1, 8), (4, 2)])
def test_collapse_is_told_for_codebooks_of_any_size(groups, codes):
    model, health = ModelConfig(latent_groups=groups, latent_vars=codes), HealthConfig(health_patience=0)
    config = Config(mode="pretrain", model=model, health=health)
    used = groups + 0.3 * (groups * codes - groups)
    pretraining(health_rules.make_health(config), config, 10, code_perplexity=used)
    with pytest.raises(TrainingError, match="collapse"):
        pretraining(health_rules.make_health(config), config, 10, code_perplexity=float(groups))


def test_the_limits_are_those_that_users_know():
    codes = {"code_perplexity": 2 + 0.0125 * 638}
    assert codes["code_perplexity"] == pytest.approx(10, abs=0.1)
    assert health_rules.training_figures(BASE, codes)["code_share"] == pytest.approx(0.0125)
    assert health_rules.chance(BASE) == pytest.approx(6.658, abs=0.0005)
    more = Config(mode="pretrain", objective=ObjectiveConfig(num_negatives=50, cross_sample_negatives=13))
    assert health_rules.chance(more) == 6.0
    assert "code_share" not in health_rules.training_figures(Config(mode="pretrain"), {"loss_0": 3.0})
    one_code = Config(mode="pretrain", model=ModelConfig(latent_vars=1))
    assert "code_share" not in health_rules.training_figures(one_code, {"code_perplexity": 2.0})


def test_a_short_run_is_warned_and_not_ended(caplog):
    health = health_rules.make_health(QUICKSTART)
    for update in range(25, 501, 25):
        pretraining(health, QUICKSTART, update, **{**HEALTHY, "code_perplexity": 2.1})
    assert len(warnings(caplog)) == 1


# ---- fp16, fine-tuning -----------------------------------------------------------------------------------------------


def fp16(**health: int) -> Config:
    return Config(mode="pretrain", precision=PrecisionConfig(fp16=True), health=HealthConfig(**health))


def test_overflows_are_fatal_only_in_a_row_and_after_the_search_for_the_first_scale(caplog):
    caplog.set_level(logging.INFO)
    health = health_rules.make_health(fp16())
    for _ in range(40):
        health.count(0, skipped=True)
    for update in range(1, 200):
        health.count(update, skipped=False)
        for _ in range(11 if update == 100 else 5 if update % 20 == 0 else 0):
            health.count(update, skipped=True)
    (warning,) = warnings(caplog)
    assert f"{SKIPPED} 6 (--max_overflows 12); ends the run if it lasts; " in warning
    assert "over at update 101" in caplog.text
    health.saved(200)
    assert health.kept == (200,)
    health.count(200, skipped=False)
    tried, message = end(lambda tried: health.count(200, skipped=True), range(1, 20))
    assert tried == 12
    assert f"{SKIPPED} 12 (not below --max_overflows 12)" in message


def ctc(**options: int) -> Config:
    return Config(mode="finetune", optim=OptimConfig(max_update=20000), ctc=CtcConfig(**options))


def validate(health: Health, update: int, blanks: float, length: float) -> None:
    values = {"blank_share": blanks, "length_ratio": length, "wer": 100.0, "loss": 50.0}
    health.check(update, health_rules.validation_figures(values))


def test_the_blank_plateau_is_normal_while_the_encoder_is_frozen_and_some_time_after(caplog):
    health = health_rules.make_health(ctc(freeze_finetune_updates=10000))
    for update in range(500, 11001, 500):
        validate(health, update, 1.0, 0.0)
    for update, blanks, length in ((11500, 0.97, 0.2), (12000, 0.7, 0.8), (20000, 0.4, 1.0)):
        validate(health, update, blanks, length)
    assert warnings(caplog) == []
    update, message = end(lambda update: validate(health, update, 1.0, 0.0), range(500, 20000, 500))
    assert update == 12500
    assert "blank plateau" in message
    assert "--freeze_finetune_updates" in message


def test_many_blanks_are_healthy_where_the_letters_are_there():
    health = health_rules.make_health(ctc())
    for update in range(500, 20000, 500):
        validate(health, update, 0.99, 0.9)  # recordings that are silent for the most part
    assert health.state_dict()["since"] == {}
