"""Flags follow from dataclasses, and every mistake on the command line is one line that says what to do."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Optional

import pytest

from common.errors import ConfigError
from common.flags import Parser, add_flags, explicit, flag, from_dict, from_namespace, to_dict


@dataclass(frozen=True)
class Loss:
    mask_prob: float = flag(0.65, "Share of frames masked.", minimum=0, maximum=1)
    num_negatives: int = flag(100, "Negatives per frame.", modes=("pretrain",), minimum=1)
    loss_weights: tuple[float, ...] = flag((0.1, 10.0), "Weights of the terms.", modes=("pretrain",))
    betas: tuple[float, ...] = flag((0.9, 0.98), "Two numbers.", nargs=2)


@dataclass(frozen=True)
class Run:
    output_dir: str = flag("", "Where results go.", required=True, metavar="FOLDER")
    precision: str = flag("fp32", "Number format.", choices=("fp32", "bf16", "fp16"))
    update_freq: int = flag(1, "Micro-batches per update.", minimum=1, aliases=("update_frequency",))
    save_every: int | None = flag(None, "Save at 100 % of these.", minimum=1, metavar="UPDATES")
    ema: Optional[float] = flag(None, "Decay of the average.")  # noqa: UP045 - both spellings must work
    resume: bool = flag(False, "Go on from the newest checkpoint.")
    layers: str = flag("[(512,10,5)]+[(512,3,2)]*4", "Conv layers.")
    milestones: tuple[int, ...] = flag((), "Kept updates.", nargs="*")
    ops: tuple[str, ...] = flag(("layer_norm",), "Operations in fp32.")
    freeze: bool = flag(True, "Freeze the extractor.", modes=("finetune",))


@dataclass(frozen=True)
class Config:
    loss: Loss = field(default_factory=Loss)
    run: Run = field(default_factory=Run)
    version: str = "1"


def make_parser(mode="pretrain"):
    parser = Parser(prog="train.py")
    add_flags(parser, Loss, mode, "Loss")
    add_flags(parser, Run, mode, "Run")
    return parser


def parse(*argv, mode="pretrain"):
    namespace = make_parser(mode).parse_args(["--output_dir", "out", *argv])
    return from_namespace(Config, namespace), namespace


def refused(*argv, mode="pretrain"):
    with pytest.raises(ConfigError) as caught:
        parse(*argv, mode=mode)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- values -------------------------------------------------------------------------------------------------


def test_without_flags_everything_has_its_default():
    config, namespace = parse()
    assert config == Config(run=Run(output_dir="out"))
    assert explicit(namespace) == {"output_dir"}


def test_every_type_is_read():
    config, _ = parse(
        *("--mask_prob", "0.5", "--update_freq", "4", "--precision", "bf16", "--save_every", "10"),
        *("--ema", "1e-3", "--resume", "--loss_weights", "1", "2.5", "--milestones", "3", "4", "--ops", "a", "b"),
        *("--layers", "[(24, 10, 5)]", "--betas", "0.5", "0.6"),
    )
    assert config.loss == Loss(mask_prob=0.5, loss_weights=(1.0, 2.5), betas=(0.5, 0.6))
    assert config.run == Run(
        output_dir="out",
        precision="bf16",
        update_freq=4,
        save_every=10,
        ema=0.001,
        resume=True,
        layers="[(24, 10, 5)]",
        milestones=(3, 4),
        ops=("a", "b"),
    )


def test_dashes_equal_signs_and_aliases_are_the_same_flag():
    for argv in (
        ["--update_freq", "4"],
        ["--update-freq", "4"],
        ["--update-freq=4"],
        ["--update_frequency=4"],
        ["--update-frequency", "4"],
    ):
        config, namespace = parse(*argv)
        assert config.run.update_freq == 4
        assert "update_freq" in explicit(namespace)


def test_a_dash_inside_a_value_is_kept():
    assert parse("--layers=a-b=c")[0].run.layers == "a-b=c"
    assert parse("--ema", "-1e-3")[0].run.ema == -0.001


def test_the_last_of_repeated_flags_wins():
    assert parse("--update_freq", "4", "--update_freq", "8")[0].run.update_freq == 8
    assert parse("--resume", "--no_resume")[0].run.resume is False


@pytest.mark.parametrize(("typed", "value"), [("--freeze", True), ("--no_freeze", False), ("--no-freeze", False)])
def test_switches_have_an_on_and_an_off_form(typed, value):
    config, namespace = parse(typed, mode="finetune")
    assert config.run.freeze is value
    assert "freeze" in explicit(namespace)


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_an_unknown_flag_offers_the_nearest_name():
    assert refused("--mask_porb", "0.5") == "--mask_porb: unknown flag; did you mean --mask_prob?"
    assert refused("--mask-porb=0.5") == "--mask-porb: unknown flag; did you mean --mask_prob?"
    assert refused("--zzzzzz") == "--zzzzzz: unknown flag; see --help"
    assert refused("-x") == "-x: unknown flag; see --help"
    assert refused("stray").startswith("stray: not expected here")


def test_abbreviations_are_unknown_flags():
    assert refused("--mask", "0.5").startswith("--mask: unknown flag")


def test_a_flag_of_another_mode_is_refused_by_name():
    message = "--num_negatives: has no effect in finetune; remove it"
    assert refused("--num_negatives", "5", mode="finetune") == message
    assert refused("--no-freeze") == "--no-freeze: has no effect in pretrain; remove it"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_prob", "1.5"], "--mask_prob 1.5: expected a number from 0 to 1"),
        (["--mask_prob", "-0.5"], "--mask_prob -0.5: expected a number from 0 to 1"),
        (["--mask_prob", "nan"], "--mask_prob nan: expected a number from 0 to 1"),
        (["--ema", "inf"], "--ema inf: expected a number"),
        (["--ema=-inf"], "--ema -inf: expected a number"),
        (["--loss_weights", "1", "nan"], "--loss_weights nan: expected a number"),
        (["--update_freq", "2.0"], "--update_freq 2.0: expected a whole number of at least 1"),
        (["--update_freq", "0"], "--update_freq 0: expected a whole number of at least 1"),
        (["--update_freq", ""], "--update_freq : expected a whole number of at least 1"),
        (["--precision", "bf61"], "--precision bf61: expected one of fp32, bf16, fp16; did you mean bf16?"),
        (["--resume", "true"], "--resume true: a switch takes no value; write --resume or --no_resume alone"),
        (["--resume=False"], "--resume False: a switch takes no value; write --resume or --no_resume alone"),
        (["--no_resume", "0"], "--no_resume 0: a switch takes no value; write --resume or --no_resume alone"),
        (["--update_freq"], "--update_freq: expected one argument; see --help"),
        (["--loss_weights"], "--loss_weights: expected at least one argument; see --help"),
        (["--betas", "1"], "--betas: expected 2 arguments; see --help"),
        (["--milestones", "1", "x"], "--milestones x: expected a whole number"),
        (["--update_freq", "9" * 400, "--ema", "x"], "--ema x: expected a number"),
    ],
)
def test_a_bad_value_names_flag_value_and_what_is_expected(argv, message):
    assert refused(*argv) == message


def test_a_value_is_never_evaluated():
    assert refused("--update_freq", "__import__('os').getpid()").endswith("expected a whole number of at least 1")


def test_a_required_flag_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="^--output_dir: must be given; see --help$"):
        make_parser().parse_args([])


def test_sub_commands_check_their_own_flags():
    parser = Parser(prog="train.py")
    parser.add_argument("--debug", action="store_true")
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("pretrain", "finetune"):
        add_flags(modes.add_parser(mode), Loss, mode, "Loss")
    namespace = parser.parse_args(["--debug", "pretrain", "--num-negatives", "5"])
    assert (namespace.mode, namespace.num_negatives) == ("pretrain", 5)
    assert explicit(namespace) == {"debug", "num_negatives"}
    for argv, message in (
        (["finetune", "--num_negatives", "5"], "--num_negatives: has no effect in finetune; remove it"),
        (["pretrain", "--mask_porb", "5"], "--mask_porb: unknown flag; did you mean --mask_prob?"),
        (["pretrian"], "pretrian: expected one of pretrain, finetune; did you mean pretrain?"),
        (["--debgu", "pretrain"], "--debgu: unknown flag; did you mean --debug?"),
        ([], "mode: must be given; see --help"),
    ):
        with pytest.raises(ConfigError) as caught:
            parser.parse_args(argv)
        assert str(caught.value) == message


def test_a_switch_may_stand_before_a_positional_argument():
    parser = Parser()
    add_flags(parser, Run, "pretrain", "Run")
    parser.add_argument("wav")
    namespace = parser.parse_args(["--output_dir", "o", "--resume", "a.wav"])
    assert (namespace.resume, namespace.wav) == (True, "a.wav")
    with pytest.raises(ConfigError, match="--resume true: a switch takes no value"):
        parser.parse_args(["--output_dir", "o", "--resume", "true"])


def test_field_types_that_flags_cannot_have_and_defaults_out_of_range_are_internal_errors():
    @dataclass(frozen=True)
    class Odd:
        table: dict = flag(None, "A table.")

    with pytest.raises(TypeError, match="field table"):
        add_flags(Parser(), Odd, "pretrain", "Odd")
    with pytest.raises(ValueError, match="default 2"):
        flag(2, "Share.", maximum=1)


# ---- help ---------------------------------------------------------------------------------------------------


def test_help_shows_sections_defaults_units_and_ranges(capsys):
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in (
        "Loss:",
        "Run:",
        "--mask_prob X Share of frames masked. (default: 0.65; a number from 0 to 1)",
        "--loss_weights X [X ...] Weights of the terms. (default: 0.1 10.0)",
        "--output_dir FOLDER Where results go. (required)",
        "--precision {fp32,bf16,fp16} Number format. (default: fp32)",
        "--save_every UPDATES Save at 100 % of these. (default: none; a whole number of at least 1)",
        "--resume, --no_resume Go on from the newest checkpoint. (default: off)",
        "(default: layer_norm)",
    ):
        assert part in text
    assert "--freeze" not in text


# ---- dicts --------------------------------------------------------------------------------------------------


def test_a_configuration_survives_json():
    config, _ = parse("--milestones", "1", "2", "--resume", "--ema", "0.5")
    plain = to_dict(config)
    assert plain["run"]["milestones"] == [1, 2]
    assert json.loads(json.dumps(plain)) == plain
    assert from_dict(Config, json.loads(json.dumps(plain))) == config


def test_missing_keys_take_their_defaults():
    assert from_dict(Config, {"loss": {"mask_prob": 1}}) == Config(loss=Loss(mask_prob=1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"los": {}, "rnu": {}}, "config.json: unknown settings los, rnu; "),
        ({"loss": {"mask": 1}}, "config.json: loss: unknown settings mask; "),
        ({"loss": {"mask_prob": "0.5"}}, "config.json: loss: mask_prob '0.5': expected a number from 0 to 1"),
        ({"loss": {"mask_prob": 2}}, "config.json: loss: mask_prob 2.0: expected a number from 0 to 1"),
        ({"loss": {"mask_prob": None}}, "config.json: loss: mask_prob None: expected"),
        ({"loss": {"loss_weights": 3}}, "config.json: loss: loss_weights 3: expected a list"),
        ({"loss": {"betas": [1.0]}}, "config.json: loss: betas [1.0]: expected a list of 2 values"),
        ({"run": {"update_freq": True}}, "config.json: run: update_freq True: expected a whole number"),
        ({"run": {"precision": "int8"}}, "config.json: run: precision 'int8': expected one of fp32, bf16, fp16"),
        ({"run": 3}, "config.json: run: is int, expected a table of settings"),
    ],
)
def test_settings_of_a_file_are_checked_like_typed_ones(values, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, values, "config.json")
    assert str(caught.value).startswith(message)


def test_fields_of_another_mode_keep_their_default():
    parser = make_parser("finetune")
    namespace = parser.parse_args(["--output_dir", "o"])
    assert not hasattr(namespace, "num_negatives")
    assert from_namespace(Loss, namespace) == Loss()
    assert from_namespace(Loss, argparse.Namespace(mask_prob=0.1)) == dataclasses.replace(Loss(), mask_prob=0.1)


def test_a_help_that_says_what_holds_without_the_flag_is_not_contradicted():
    @dataclass(frozen=True)
    class Section:
        """One section."""

        own: str = flag("", "text (default: that of the list)")
        plain: str = flag("", "another text")

    parser = Parser(prog="x", usage="x", description="x")
    add_flags(parser, Section, "pretrain", "section")
    text = " ".join(parser.format_help().split())
    assert "text (default: that of the list) --plain" in text
    assert "another text (default: none)" in text
