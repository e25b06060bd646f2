"""Learning-rate policies against hand-made tables, stored tables of the originals, and their own shape."""

# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest

from common.errors import ConfigError
from common.schedules import cosine, exp, gumbel_temperature, make_schedule, noam, poly

POLY = {"lr": 1.0, "warmup_updates": 4, "max_update": 12, "power": 1.0}
EXP = {"lr": 1.0, "warmup_updates": 4, "hold_updates": 4, "max_update": 12}
COSINE = {"lr": 2.0, "warmup_updates": 2, "hold_updates": 2, "max_update": 8}


def close(value):
    return pytest.approx(value, rel=1e-6, abs=1e-12)


def test_poly_follows_a_table_made_by_hand():
    rates = [poly(step, initial_lr_scale=0.0, final_lr_scale=0.0, hold_updates=0, **POLY) for step in range(15)]
    assert rates == close([0, 0.25, 0.5, 0.75, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0, 0])


def test_poly_with_hold_power_and_scales_follows_a_table_made_by_hand():
    settings = {**POLY, "power": 2.0, "hold_updates": 4, "initial_lr_scale": 0.2, "final_lr_scale": 0.1}
    rates = [poly(step, **settings) for step in range(14)]
    decay = [0.1 + 0.9 * (left / 4) ** 2 for left in (4, 3, 2, 1, 0)]
    assert rates == close([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, *decay, 0.1])


def test_exp_halves_per_step_when_the_end_is_a_sixteenth():
    rates = [exp(step, initial_lr_scale=0.5, final_lr_scale=1 / 16, **EXP) for step in range(14)]
    assert rates == close([0.5, 0.625, 0.75, 0.875, 1, 1, 1, 1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])


def test_exp_with_a_decay_factor_stops_at_the_final_scale_and_at_max_update():
    floored = [exp(step, lr_exp_decay=0.5, initial_lr_scale=0, final_lr_scale=0.2, **EXP) for step in (9, 10, 11)]
    assert floored == close([0.5, 0.25, 0.2])
    frozen = [exp(step, lr_exp_decay=0.9, initial_lr_scale=0, final_lr_scale=0, **EXP) for step in (11, 12, 50)]
    assert frozen == close([0.9**3, 0.9**4, 0.9**4])


def test_cosine_follows_a_table_made_by_hand():
    rates = [cosine(step, **COSINE) for step in range(10)]
    middle = 0.2 + 1.8 * 0.5
    quarter = 1.8 * 0.5 * math.sqrt(0.5)
    assert rates == close([0, 1, 2, 2, 2, middle + quarter, middle, middle - quarter, 0.2, 0.2])


def test_noam_follows_a_table_made_by_hand():
    rates = [noam(step, lr=8.0, d_model=16, warmup_updates=4, min_lr=0.3) for step in (0, 1, 2, 4, 9, 16, 100)]
    assert rates == close([2 / 8, 2 / 8, 4 / 8, 1, 2 / 3, 0.5, 0.3])


@pytest.mark.parametrize("policy", ["poly", "exp", "cosine"])
@pytest.mark.parametrize("hold", [0, 70])
def test_curves_are_continuous_rise_then_hold_then_fall(policy, hold):
    lr, warmup, end = 0.01, 100, 1000
    rate = make_schedule(policy, lr=lr, warmup_updates=warmup, hold_updates=hold, max_update=end, final_lr_scale=0.05)
    rates = [rate(step) for step in range(end + 10)]
    assert max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False)) < 1.1 * lr / warmup
    assert all(a < b for a, b in zip(rates[:warmup], rates[1 : warmup + 1], strict=True))
    assert set(rates[warmup : warmup + hold + 1]) == {lr}
    assert all(a > b for a, b in zip(rates[warmup + hold : end], rates[warmup + hold + 1 : end + 1], strict=True))
    assert rates[end:] == close([0.05 * lr] * 10)


def test_a_curve_without_warm_up_starts_at_the_peak():
    assert make_schedule("poly", lr=0.1, warmup_updates=0, max_update=10)(0) == 0.1


def test_a_curve_that_ends_with_its_hold_drops_after_max_update():
    rate = make_schedule("poly", lr=0.1, warmup_updates=5, hold_updates=5, max_update=10)
    assert [rate(10), rate(11)] == [0.1, 0.0]


def test_settings_that_are_none_keep_the_default_of_the_policy():
    rate = make_schedule("cosine", lr=1.0, warmup_updates=1, max_update=9, final_lr_scale=None, power=None)
    assert rate(9) == close(0.1)


def test_temperature_decays_to_its_end():
    assert gumbel_temperature(0, 2.0, 0.5, 0.5) == 2.0
    assert gumbel_temperature(1, 2.0, 0.5, 0.5) == 1.0
    assert gumbel_temperature(9, 2.0, 0.5, 0.5) == 0.5


CURVE = {"lr": 0.1, "warmup_updates": 5, "max_update": 10}


@pytest.mark.parametrize(
    ("policy", "settings", "flags"),
    [
        ("linear", CURVE, ["--lr_policy linear", "poly, exp, cosine, noam"]),
        ("poly", {**CURVE, "hold_updates": 6}, ["--warmup_updates 5", "--hold_updates 6", "--max_update 10"]),
        ("exp", {**CURVE, "warmup_updates": 11}, ["--warmup_updates 11", "--max_update 10"]),
        ("poly", {**CURVE, "lr": -0.1}, ["--lr -0.1"]),
        ("poly", {**CURVE, "lr": math.nan}, ["--lr nan"]),
        ("poly", {**CURVE, "max_update": 0, "warmup_updates": 0}, ["--max_update 0"]),
        ("poly", {**CURVE, "final_lr_scale": 1.5}, ["--final_lr_scale 1.5"]),
        ("poly", {**CURVE, "power": -1}, ["--lr_poly_power -1"]),
        ("exp", {**CURVE, "final_lr_scale": 0}, ["--final_lr_scale 0", "--lr_exp_decay"]),
        ("exp", {**CURVE, "lr_exp_decay": 1.5}, ["--lr_exp_decay 1.5"]),
        ("exp", {**CURVE, "power": 2.0}, ["--lr_poly_power", "no effect", "--lr_policy exp"]),
        ("noam", {"lr": 1.0, "warmup_updates": 5}, ["--encoder_embed_dim", "noam needs"]),
        ("noam", {"lr": 1.0, "warmup_updates": 0, "d_model": 8}, ["--warmup_updates 0"]),
        ("poly", {"warmup_updates": 5, "max_update": 10}, ["--lr:"]),
    ],
)
def test_impossible_values_are_refused_by_the_name_of_their_flag(policy, settings, flags):
    with pytest.raises(ConfigError) as error:
        make_schedule(policy, **settings)
    for flag in flags:
        assert flag in str(error.value)


def test_poly_and_exp_match_the_tables_of_the_concatenating_reference(shared):
    tables = json.loads((shared("golden_nvidia") / "lr_policies.json").read_text())
    names = {"warmup_steps": "warmup_updates", "hold_steps": "hold_updates", "num_steps": "max_update"}
    names["decay"] = "lr_exp_decay"
    checked = 0
    for policy in ("poly", "exp"):
        for table in tables[policy]:
            settings = {names.get(name, name): value for name, value in table["config"].items()}
            rate = make_schedule(policy, **settings)
            assert [rate(step) for step in table["steps"]] == close(table["lr"])
            checked += 1
    assert checked == 9
    stored = tables["temperature"]
    rates = [gumbel_temperature(update, *stored["latent_temp"]) for update in stored["updates"]]
    assert rates == close(stored["temperature"])


def test_poly_and_exp_match_the_tables_of_the_original(shared):
    tables = json.loads((shared("golden") / "schedule.json").read_text())
    for table in tables["polynomial_decay"]:
        config = table["config"]
        rate = make_schedule(
            "poly",
            lr=config["lr"],
            warmup_updates=config["warmup_updates"],
            max_update=config["total_num_update"],
            power=config["power"],
            final_lr_scale=config["end_learning_rate"] / config["lr"],
        )
        assert [rate(step) for step in table["steps"]] == close(table["lr"])
    for table in tables["tri_stage"]:
        config = table["config"]
        rate = make_schedule(
            "exp",
            lr=config["lr"],
            warmup_updates=table["warmup_steps"],
            hold_updates=table["hold_steps"],
            max_update=config["max_update"],
            initial_lr_scale=config["init_lr_scale"],
            final_lr_scale=config["final_lr_scale"],
        )
        assert [rate(step) for step in table["steps"]] == close(table["lr"])


def test_temperature_matches_the_table_of_the_original(shared):
    for table in json.loads((shared("golden") / "gumbel_temp.json").read_text()):
        temperatures = [gumbel_temperature(step, *table["latent_temp"]) for step in table["steps"]]
        assert temperatures == close(table["temp"])


def test_cosine_and_noam_match_the_stored_tables(shared):
    tables = json.loads((shared("golden_ssl") / "data_pipeline.json").read_text())["lr"]
    table = tables["noam"]
    rate = make_schedule(
        "noam",
        lr=table["lr"],
        d_model=table["d_model"],
        warmup_updates=table["warmup_steps"],
        min_lr=table["min_lr"],
    )
    assert [rate(step) for step, _ in table["values"]] == close([value for _, value in table["values"]])
    for name in ("cosine_one_based_warmup", "cosine_one_based_warmup_hold"):
        table = tables[name]
        rate = make_schedule(
            "cosine",
            lr=table["lr"],
            warmup_updates=table["warmup_steps"],
            hold_updates=table["hold_steps"],
            max_update=table["num_steps"],
            final_lr_scale=table["final_lr_scale"],
        )
        assert [rate(step) for step, _ in table["values"]] == close([value for _, value in table["values"]])


def test_a_warm_up_counted_from_one_is_an_initial_scale(shared):
    table = json.loads((shared("golden_ssl") / "data_pipeline.json").read_text())["lr"]["cosine_zero_based_warmup"]
    rate = make_schedule(
        "cosine",
        lr=table["lr"],
        warmup_updates=table["warmup_steps"],
        max_update=table["max_steps"],
        initial_lr_scale=1 / (table["warmup_steps"] + 1),
        final_lr_scale=table["min_lr"] / table["lr"],
    )
    assert [rate(step) for step, _ in table["values"]] == close([value for _, value in table["values"]])
