"""The recipes print commands that train.py and inference.py accept, with the values that users are promised."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wav2vec2.arg_parser import parse_inference, parse_train
from wav2vec2.config import ModelConfig
from wav2vec2.inference_config import InferenceConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
# TEST_BASH names another bash to test with, such as macOS's 3.2
BASH = os.environ.get("TEST_BASH") or shutil.which("bash") or "bash"
PRETRAIN = [f"pretrain_{name}" for name in ("base", "large", "xlsr_1b", "xlsr_2b", "tiny", "base_benchmark")]
FINETUNE = [
    *(f"finetune_base_{hours}" for hours in ("1h", "10h", "100h", "960h", "benchmark")),
    *(f"finetune_vox_{hours}" for hours in ("100h", "960h", "960h_cv")),
    "finetune_tiny",
]
INFERENCE = ["inference", "inference_benchmark"]
ALL_SCRIPTS = sorted(
    [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch"), *SCRIPTS.glob("docker/*.sh"), ROOT / ".ci" / "run"]
)


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """A PATH with nothing but the POSIX tools that a dry run may use."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("awk", "dirname", "getconf", "grep", "tr"):
        (folder / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    (folder / "bash").symlink_to(BASH)
    return folder


@pytest.fixture
def call(tools, tmp_path):
    """Run a script with nothing in the environment but the given variables; DRY_RUN=1 and no GPU unless said."""

    def run(script, *arguments, cwd=ROOT, scripts=SCRIPTS, **variables):
        own = {"VENV_DIR": str(tmp_path / "no-environment"), "DRY_RUN": "1", "DEVICE": "cpu"}
        environment = {"PATH": str(tools), "HOME": str(tmp_path), **own, **variables}
        return subprocess.run(
            [BASH, str(Path(scripts) / f"{script}.sh"), *arguments],
            env={name: value for name, value in environment.items() if value is not None},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def command(call):
    """The words of the one line that a dry run prints."""

    def words(script, *arguments, **variables):
        result = call(script, *arguments, **variables)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("\n") == 1
        return shlex.split(result.stdout)

    return words


def program_and_flags(words):
    """(program, its arguments) of a printed command."""
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return Path(words[place]).name, words[place + 1 :]


@pytest.fixture
def config(command, tmp_path):
    """What train.py or inference.py understands from the printed command."""

    def parse(script, *arguments, **variables):
        model = tmp_path / "model.pt"
        model.touch()
        places = {
            "DATASET_DIR": str(tmp_path),
            "PRETRAINED_MODEL": str(model),
            "FINETUNED_MODEL": str(model),
            "OUTPUT_DIR": str(tmp_path / "out"),
        }
        for subset in ("test-other", "test"):
            (tmp_path / f"{subset}.tsv").touch()
            (tmp_path / f"{subset}.ltr").touch()
        program, flags = program_and_flags(command(script, *arguments, **{**places, **variables}))
        return parse_train(flags) if program == "train.py" else parse_inference(flags)

    return parse


@pytest.mark.parametrize("preset", PRETRAIN + FINETUNE)
def test_every_flag_of_a_training_preset_exists_and_has_an_effect(preset, config):
    assert config(preset).mode == preset.split("_")[0]


@pytest.mark.parametrize("preset", INFERENCE)
def test_every_flag_of_an_inference_preset_exists_and_has_an_effect(preset, config):
    assert config(preset).valid_subset == "test-other"


def test_no_preset_was_forgotten():
    presets = {path.stem for path in SCRIPTS.glob("*.sh") if re.match(r"(pretrain|finetune|inference)", path.stem)}
    assert presets == {*PRETRAIN, *FINETUNE, *INFERENCE}


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
def test_every_variable_of_the_launcher_sets_the_flag_beside_it(mode, command):
    """Each `add flag VARIABLE` line passes its variable on; what does not belong to the mode is not passed."""
    source = (SCRIPTS / "train.sh").read_text(encoding="utf-8")
    shared, _, special = source.partition('if [ "$mode" = pretrain ]; then\n')
    own, _, other = special.partition("\nelse\n")
    if mode == "finetune":
        own, other = other, own
    line = re.compile(r"^\s*(?:if .* then )?add(_list|_switch|_switch_off)? (\w+) (\w+)", re.MULTILINE)
    variables = {"MAX_UPDATE": "7", "HOURGLASS_CONFIG": "", "UPDATE_FREQ": "", "BLANK_WEIGHT": "7", "SAVE": "true"}
    wanted = {}
    for kind, flag, variable in line.findall(shared + own):
        if flag in ("hourglass_transformer", "hourglass_resample", "save", "init_from", "resume_from"):
            continue
        value = {"": "7", "_list": "7 8", "_switch": "true", "_switch_off": "false"}[kind]
        variables.setdefault(variable, value)
        wanted[flag] = {"": ["7"], "_list": ["7", "8"], "_switch": [], "_switch_off": []}[kind]
        if kind == "_switch_off":
            wanted[f"no_{flag}"] = wanted.pop(flag)
    for _, flag, variable in line.findall(other):
        if flag != "init_from":
            variables.setdefault(variable, "true")
    wanted["update_freq"] = ["1"]
    words = command("train", mode, **{**variables, "DEVICE": "7"})
    _, flags = program_and_flags(words)
    groups = " ".join(flags[1:]).split("--")[1:]
    assert {group.split()[0]: group.split()[1:] for group in groups} == wanted


@pytest.mark.parametrize(
    ("variables", "given", "left_out"),
    [
        ({"IS_TARRED": "true"}, ["--is_tarred"], ["--train_subset", "--streaming"]),
        ({"STREAMING": "true", "EPOCH_SIZE": "9"}, ["--streaming", "--epoch_size"], ["--train_subset", "--is_tarred"]),
    ],
)
def test_shards_take_the_place_of_a_training_list(variables, given, left_out, command):
    words = command("pretrain_base", TARRED_FILEPATHS="s_{0..3}.tar", **variables)
    assert words[words.index("--tarred_filepaths") + 1] == "s_{0..3}.tar"
    assert all(flag in words for flag in given)
    assert not any(flag in words for flag in left_out)


@pytest.mark.parametrize("variable", ["INIT_FROM", "RESUME_FROM"])
@pytest.mark.parametrize("preset", ["pretrain_base", "pretrain_large", "pretrain_tiny"])
def test_a_model_that_is_there_says_its_own_architecture(preset, variable, config, tmp_path):
    (tmp_path / "theirs.pt").touch()
    found = config(preset, **{variable: str(tmp_path / "theirs.pt")})
    assert found.model == ModelConfig()
    assert getattr(found.run, variable.lower()) == str(tmp_path / "theirs.pt")


TABLE: dict[str, dict[str, object]] = {
    "pretrain_base": {
        "run.output_dir": "results/pretrain_base",
        "data.data": "/datasets/LibriSpeech",
        "data.train_subset": "train-full-960",
        "data.valid_subset": "dev-other",
        "data.max_tokens": 1400000,
        "data.num_concat_batches": 8,
        "data.update_freq": 8,
        "optim.max_update": 400000,
        "optim.lr": 0.0005,
        "precision.name": "fp32",
        "run.seed": 1,
        "run.save_frequency": 1,
        "run.resume": True,
        "model.hourglass_transformer": "[2,(8,4),2]",
    },
    "finetune_base_960h": {
        "run.output_dir": "results/finetune_base_960h",
        "data.data": "/datasets/LibriSpeech",
        "data.train_subset": "train-full-960",
        "data.valid_subset": "dev-other",
        "data.max_tokens": 3200000,
        "data.num_concat_batches": 1,
        "data.update_freq": 8,
        "optim.max_update": 320000,
        "optim.lr": 0.0001,
        "precision.name": "fp32",
        "run.seed": 1,
        "run.save_frequency": 10,
        "run.resume": True,
        "ctc.w2v_path": "results/pretrain_base/wav2vec2_update400000.pt",
        "ctc.freeze_finetune_updates": 0,
    },
}
# Published hyper-parameters of the Base recipes that are not in the table of variables.
PUBLISHED: dict[str, dict[str, object]] = {
    "pretrain_base": {
        "optim.lr_policy": "poly",
        "optim.warmup_updates": 32000,
        "optim.adam_betas": (0.9, 0.98),
        "optim.adam_eps": 1e-6,
        "optim.weight_decay": 0.01,
        "optim.clip_norm": 25.0,
        "mask.mask_prob": 0.65,
        "mask.mask_length": 10,
        "dropout.dropout": 0.1,
        "dropout.attention_dropout": 0.1,
        "dropout.activation_dropout": 0.0,
        "dropout.encoder_layerdrop": 0.05,
        "dropout.dropout_input": 0.1,
        "dropout.dropout_features": 0.1,
        "dropout.feature_grad_mult": 0.1,
        "objective.loss_weights": (0.1, 10.0),
        "objective.latent_temp": (2.0, 0.5, 0.999995),
        "objective.num_negatives": 100,
        "model.final_dim": 256,
        "model.latent_vars": 320,
        "model.latent_groups": 2,
        "data.max_sample_size": 250000,
        "data.min_sample_size": 32000,
    },
    "finetune_base_960h": {
        "optim.lr_policy": "exp",
        "optim.warmup_updates": 32000,
        "optim.hold_updates": 128000,
        "optim.initial_lr_scale": 0.01,
        "optim.final_lr_scale": 0.05,
        "optim.adam_betas": (0.9, 0.98),
        "optim.adam_eps": 1e-8,
        "optim.weight_decay": 0.0,
        "optim.clip_norm": 0.0,
        "mask.mask_prob": 0.5,
        "mask.mask_length": 10,
        "mask.mask_channel_prob": 0.1,
        "mask.mask_channel_length": 64,
        "dropout.dropout": 0.0,
        "dropout.attention_dropout": 0.0,
        "dropout.activation_dropout": 0.1,
        "dropout.encoder_layerdrop": 0.1,
        "dropout.dropout_input": 0.0,
        "dropout.final_dropout": 0.0,
        "dropout.feature_grad_mult": 0.0,
        "ctc.freeze_finetune_updates": 0,
    },
    "pretrain_large": {
        "model.encoder_layers": 24,
        "model.encoder_embed_dim": 1024,
        "model.layer_norm_first": True,
        "model.extractor_mode": "layer_norm",
        "model.conv_bias": True,
        "model.normalize": True,
        "model.hourglass_transformer": "",
        "model.final_dim": 768,
        "objective.loss_weights": (0.1, 0.0),
        "data.update_freq": 128,
        "data.max_tokens": 1200000,
        "data.max_sample_size": 320000,
    },
    "pretrain_xlsr_1b": {
        "model.encoder_layers": 48,
        "model.encoder_embed_dim": 1280,
        "model.encoder_ffn_embed_dim": 5120,
        "model.encoder_attention_heads": 16,
        "model.target_dim": 1024,
        "model.extractor_mode": "layer_norm",
        "model.conv_bias": True,
        "model.normalize": True,
        "model.layer_norm_first": True,
        "data.max_sample_size": 320000,
        "run.parallel": "fsdp",
        "run.checkpoint_activations": True,
        "precision.bf16": True,
    },
    "pretrain_xlsr_2b": {
        "model.encoder_layers": 48,
        "model.encoder_embed_dim": 1920,
        "model.encoder_ffn_embed_dim": 7680,
        "model.encoder_attention_heads": 16,
        "model.target_dim": 1024,
        "run.parallel": "fsdp",
    },
    "finetune_base_10h": {"dropout.encoder_layerdrop": 0.05, "ctc.freeze_finetune_updates": 10000},
    "finetune_base_1h": {"mask.mask_prob": 0.65, "mask.mask_channel_prob": 0.25},
    "finetune_vox_960h": {"data.update_freq": 8, "data.num_concat_batches": 3, "mask.mask_channel_prob": 0.25},
    "finetune_vox_100h": {"data.update_freq": 8, "data.num_concat_batches": 2, "mask.mask_channel_prob": 0.5},
    "finetune_vox_960h_cv": {"mask.mask_prob": 0.25, "ctc.freeze_finetune_updates": 0},
}


def value_of(configuration, path):
    for name in path.split("."):
        configuration = getattr(configuration, name)
    return configuration


@pytest.mark.parametrize("preset", sorted(TABLE))
def test_defaults_are_those_of_the_parameters_table(preset, command, monkeypatch):
    monkeypatch.setattr("wav2vec2.config_checks._check_paths", lambda config: None)
    parsed = parse_train(program_and_flags(command(preset))[1])
    assert {path: value_of(parsed, path) for path in TABLE[preset]} == TABLE[preset]


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_other_values_are_those_of_the_published_recipe(preset, config):
    parsed = config(preset)
    assert {path: value_of(parsed, path) for path in PUBLISHED[preset]} == PUBLISHED[preset]


def test_learning_rates_are_those_of_the_published_recipes(shared, config):
    policies = json.loads((shared("golden_nvidia") / "lr_policies.json").read_text(encoding="utf-8"))
    for case in policies["poly"] + policies["exp"]:
        optim, published = config(case["name"]).optim, case["config"]
        assert (optim.lr, optim.max_update) == (published["lr"], published["num_steps"]), case["name"]
        assert (optim.warmup_updates, optim.hold_updates) == (
            published["warmup_steps"],
            published["hold_steps"] or None,
        )
        assert (optim.initial_lr_scale or 0) == published["initial_lr_scale"]
        assert (optim.final_lr_scale or 0) == published["final_lr_scale"]


def test_inference_defaults(command):
    words = command("inference", DEVICE=None)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags["--w2v_path"] == "results/finetune_base_960h/wav2vec2_best.pt"
    assert (flags["--data"], flags["--valid_subset"]) == ("/datasets/LibriSpeech", "test-other")
    assert (flags["--batch_size"], flags["--device"]) == ("8", "auto")


def test_batches_of_inference_have_a_budget_of_samples_but_not_in_benchmarks(config):
    assert config("inference").max_tokens == InferenceConfig().max_tokens > 0
    assert config("inference_benchmark").max_tokens == 0
    for preset in INFERENCE:
        parsed = config(preset, MAX_TOKENS="7", BATCH_SIZE="0")
        assert (parsed.max_tokens, parsed.batch_size) == (7, 0)


def test_a_single_file_is_transcribed_without_a_subset(config):
    assert config("inference", TRANSCRIBE_WAV=__file__).valid_subset == ""


# ------------------------------------------------------------------------------------- sub-batches per update


@pytest.mark.parametrize(
    ("variables", "update_freq"),
    [
        ({}, "8"),
        ({"NUM_GPUS": "8"}, "1"),
        ({"NUM_GPUS": "4", "NUM_CONCAT_BATCHES": "4"}, "4"),
        ({"NUM_GPUS": "64", "NUM_CONCAT_BATCHES": "1"}, "1"),
        ({"NUM_NODES": "2", "MASTER_ADDR": "a", "NUM_GPUS": "2", "NUM_CONCAT_BATCHES": "2"}, "8"),
        ({"UPDATE_FREQ": "8"}, "8"),
        ({"UPDATE_FREQUENCY": "8"}, "8"),
        ({"NUM_GPUS": "3", "NUM_CONCAT_BATCHES": "1", "WORLD_BATCHES": "66"}, "22"),
        ({"WORLD_BATCHES": "8"}, "1"),
    ],
)
def test_update_freq_is_solved_so_that_the_product_is_the_number_of_sub_batches(variables, update_freq, command):
    words = command("pretrain_base", **variables)
    assert words[words.index("--update_freq") + 1] == update_freq


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"NUM_GPUS": "2", "UPDATE_FREQ": "1"}, 64),
        ({"NUM_GPUS": "3"}, 64),
        ({"NUM_GPUS": "16"}, 64),
        ({"NUM_GPUS": "6", "NUM_CONCAT_BATCHES": "1", "UPDATE_FREQ": "10"}, 64),
        ({"NUM_GPUS": "2", "NUM_CONCAT_BATCHES": "5", "WORLD_BATCHES": "12"}, 12),
    ],
)
def test_values_that_do_not_multiply_stop_with_values_that_do(variables, wanted, call):
    result = call("pretrain_base", **variables)
    assert (result.returncode, result.stdout) == (2, "")
    first, _, *rest = result.stderr.splitlines()
    assert f"{wanted} sub-batches" in first
    assert f"NUM_GPUS={variables['NUM_GPUS']} " in first
    suggestions = [dict(word.split("=") for word in line.split()) for line in rest if line.startswith("  ")]
    assert suggestions
    for suggestion in suggestions:
        gpus, concat, frequency = (int(suggestion[name]) for name in ("NUM_GPUS", "NUM_CONCAT_BATCHES", "UPDATE_FREQ"))
        assert gpus * concat * frequency == wanted
        assert gpus <= int(variables["NUM_GPUS"])
        assert call("pretrain_base", **{**variables, **suggestion}).returncode == 0
    other = re.search(r"WORLD_BATCHES=(\d+)", rest[-1])
    assert other, rest
    assert call("pretrain_base", **{**variables, "WORLD_BATCHES": other[1]}).returncode == 0


def test_another_number_of_sub_batches_leaves_the_learning_rate_and_prints_the_scaled_one(call):
    result = call("pretrain_base", WORLD_BATCHES="16", NUM_CONCAT_BATCHES="4")
    assert "--lr 0.0005 " in result.stdout
    assert "LEARNING_RATE=0.000125" in result.stderr
    assert "LEARNING_RATE" not in call("pretrain_base", WORLD_BATCHES="64").stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"NUM_GPUS": "0"},
        {"NUM_GPUS": "two"},
        {"UPDATE_FREQ": "08"},
        {"NUM_CONCAT_BATCHES": "-1"},
        {"WORLD_BATCHES": "1.5"},
        {"MAX_UPDATE": "a[$(echo oops >&2)]"},
        {"FP16": "maybe"},
        {"RESUME": "maybe"},
        {"WARMUP_PERCENT": "8.5"},
        {"WARMUP_PERCENT": "08"},
        {"WARMUP_PERCENT": "-1"},
        {"WARMUP_PERCENT": "101"},
        {"HOLD_PERCENT": "a[$(echo oops >&2)]"},
        {"WARMUP_PERCENT": "60", "HOLD_PERCENT": "41"},
        {"NUM_WARMUP_EPOCHS": "08", "NUM_EPOCHS": "1"},
        {"NUM_NODES": "2", "NUM_CONCAT_BATCHES": "1"},
        {"MIN_NODES": "3", "NUM_NODES": "2", "NUM_CONCAT_BATCHES": "1", "MASTER_ADDR": "a"},
        {"MIN_NODES": "0", "NUM_NODES": "2", "NUM_CONCAT_BATCHES": "1", "MASTER_ADDR": "a"},
        {"MAX_RESTARTS": "two", "NUM_GPUS": "2"},
        {"MAX_RESTARTS": "2", "NUM_GPUS": "2", "RESUME": "false"},
        {"JOIN_TIMEOUT": "1m", "NUM_NODES": "2", "NUM_CONCAT_BATCHES": "1", "MASTER_ADDR": "a"},
    ],
)
def test_a_value_that_cannot_be_is_a_usage_error_that_names_the_variable(variables, call):
    result = call("pretrain_base", **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: {next(iter(variables))}=")
    assert "\noops" not in result.stderr


# ------------------------------------------------------------------------------------------------- overriding


def test_every_default_can_be_overridden_from_outside(config):
    """Change each `: "${NAME:=value}"` of the presets by itself and find the change in the configuration."""
    assignment = re.compile(r'"\$\{(\w+):?=([^}]*)\}"')
    others = {
        "EXTRACTOR_MODE": "layer_norm",
        "LR_POLICY": "cosine",
        "HOURGLASS_CONFIG": "[1,(4,2),1]",
        "LATENT_TEMP": "1.5 0.5 0.9",
        "ENCODER_EMBED_DIM": "384",
        "RECIPE_BATCHES": None,  # not a user's: WORLD_BATCHES is
        "ENCODER_LAYERS": None,  # has an effect without the Hourglass only
        "NUM_CONCAT_BATCHES": "4",
        "ADAM_BETAS": "0.8 0.9",
        "LOSS_WEIGHTS": "0.3 0.4",
        "OUTPUT_DIR": "elsewhere",
        "LATENT_GROUPS": "4",
        "ENCODER_ATTENTION_HEADS": "6",
    }
    for preset in ("pretrain_base", "finetune_base_960h"):
        usual = config(preset)
        for name, default in assignment.findall((SCRIPTS / f"{preset}.sh").read_text(encoding="utf-8")):
            if name == "PRETRAINED_MODEL" or others.get(name, "") is None:
                continue
            changed = others.get(name) or ("0.25" if "." in default or "e" in default else str(int(default) * 2 + 2))
            assert config(preset, **{name: changed}) != usual, name


def test_warm_up_and_hold_keep_their_share_of_a_shorter_training(config):
    optim = config("finetune_base_960h", MAX_UPDATE="1000").optim
    assert (optim.warmup_updates, optim.hold_updates) == (100, 400)
    assert config("pretrain_base", MAX_UPDATE="1000").optim.warmup_updates == 80
    assert config("pretrain_base", MAX_UPDATE="1000", WARMUP_UPDATES="7").optim.warmup_updates == 7


def test_shares_up_to_the_whole_are_taken_and_need_a_length(call, config):
    optim = config("finetune_base_960h", MAX_UPDATE="1000", WARMUP_PERCENT="0", HOLD_PERCENT="100").optim
    assert (optim.warmup_updates, optim.hold_updates) == (0, 1000)
    # a share that is replaced by a number of updates does not count
    assert call("finetune_base_960h", WARMUP_UPDATES="7", HOLD_PERCENT="95").returncode == 0
    result = call("train", "pretrain", WARMUP_PERCENT="8")
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: MAX_UPDATE=" in result.stderr


def test_what_saves_is_not_passed_on_when_nothing_is_saved(command):
    saving = {"SAVE_FREQUENCY": "2", "SAVE_INTERVAL_UPDATES": "3", "KEEP_MILESTONES": "4 5"}
    flags = {"--save_frequency", "--save_interval_updates", "--keep_milestones"}
    for preset in ("pretrain_base", "finetune_tiny"):
        assert flags <= {*command(preset, **saving)}
        assert flags <= {*command(preset, SAVE="true", **saving)}
        words = {*command(preset, SAVE="false", **saving)}
        assert "--no_save" in words
        assert not flags & words


def test_a_length_of_channel_masks_goes_with_a_probability_above_zero(command):
    for off in ("0", "0.0", "0.00"):
        assert "--mask_channel_length" not in command("finetune_base_960h", MASK_CHANNEL_PROB=off)
    for on in ("0.004", "1", "5e-1"):
        assert "--mask_channel_length" in command("finetune_base_960h", MASK_CHANNEL_PROB=on)
    assert "--mask_channel_length" not in command("pretrain_base", MASK_CHANNEL_LENGTH="7")  # its probability is 0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAX_UPDATES", "MAX_UPDATE"),
        ("LEARNINGRATE", "LEARNING_RATE"),
        ("NUM_GPU", "NUM_GPUS"),
        ("BLANKMODE", "BLANK_MODE"),
        ("HOURGLASS_RE_SAMPLE", "HOURGLASS_RESAMPLE"),
    ],
)
def test_a_variable_that_is_nearly_one_of_the_recipes_is_noted(name, meant, call):
    usual, result = call("pretrain_base"), call("pretrain_base", **{name: "1"})
    assert (result.returncode, result.stdout) == (0, usual.stdout)
    assert result.stderr == f"{name} is set, but nothing reads it; did you mean {meant}?\n" + usual.stderr


def test_no_variable_that_is_read_is_noted(call):
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"`([A-Z][A-Z0-9_]+)`", text))):
        assert "did you mean" not in call("pretrain_base", **{name: ""}).stderr, name


def test_precision_flags_follow_fp16_and_bf16_alone(command):
    plain = {*command("pretrain_base")}
    assert {*command("pretrain_base", BF16="true")} - plain == {"--bf16"}
    assert {*command("pretrain_base", FP16="1")} - plain == {"--fp16"}
    assert {*command("pretrain_base", TF32="false")} - plain == {"--no_allow_tf32"}
    assert {*command("pretrain_base", FP16="false", BF16="false", TF32="true")} == plain


def test_resume_is_on_unless_switched_off(command):
    assert "--resume" in command("finetune_base_960h")
    assert "--resume" not in command("finetune_base_960h", RESUME="false")


def test_speed_and_memory_are_set_by_variables(config):
    for preset in ("pretrain_base", "finetune_base_960h"):
        run = config(preset).run
        assert (run.compile, run.cuda_graphs, run.checkpoint_activations) == (False, False, False)
        assert (run.parallel, config(preset, PARALLEL="fsdp").run.parallel) == ("ddp", "fsdp")
    chosen = {"COMPILE": "true", "CHECKPOINT_ACTIVATIONS": "true", "BUCKET_CAP_MB": "7"}
    run = config("pretrain_base", **chosen).run
    assert (run.compile, run.cuda_graphs, run.checkpoint_activations, run.bucket_cap_mb) == (True, False, True, 7)
    on_a_gpu = {"DEVICE": "cuda", "NUM_GPUS": "1", "COMPILE": "true", "CUDA_GRAPHS": "true", "ENCODER_LAYERDROP": "0"}
    assert config("pretrain_base", **on_a_gpu).run.cuda_graphs


def test_an_empty_hourglass_is_the_plain_transformer(config):
    model = config("pretrain_base", HOURGLASS_CONFIG="").model
    assert (model.hourglass_transformer, model.encoder_layers) == ("", 12)


def test_file_lists_can_lie_apart_from_the_audio(command):
    words = command("pretrain_base", DATASET_DIR="/audio", FILELISTS_DIR="/my lists")
    assert words[words.index("--data") + 1] == "/my lists"


def test_further_arguments_are_passed_on_and_win(config):
    assert config("pretrain_base", "--lr", "0.1", "--no_resume").optim.lr == 0.1
    assert config("finetune_vox_100h", "--batch_size", "3").data.batch_size == 3
    assert config("inference_benchmark", "--num_repeats", "3").num_repeats == 3


@pytest.mark.parametrize("odd", ["a b", "it's", "$HOME", "*", "a;b", "a\\b", "ü", '"', "a&b", "-", "["])
def test_odd_characters_survive_the_way_to_the_command(odd, command):
    words = command("pretrain_base", "--labels", odd, OUTPUT_DIR=odd)
    assert words[words.index("--output_dir") + 1] == odd
    assert words[-1] == odd


def test_benchmarks_save_nothing_and_keep_layouts_apart(config, command):
    parsed = config("pretrain_base_benchmark", NUM_EPOCHS="3", NUM_WARMUP_EPOCHS="1")
    assert (parsed.run.save, parsed.run.resume) == (False, False)
    assert (parsed.run.num_epochs, parsed.run.num_warmup_epochs) == (4, 1)
    words = command("finetune_base_benchmark", NUM_GPUS="4", BF16="true")
    assert words[words.index("--output_dir") + 1] == "results/finetune_base_benchmark_4x3200000x1x2_bf16"
    words = command("inference_benchmark", FP16="true")
    assert words[words.index("--output_dir") + 1] == "results/inference_benchmark_bs1_fp16"
    words = command("inference_benchmark", BATCH_SIZE="0", MAX_TOKENS="3200000", BF16="true")
    assert words[words.index("--output_dir") + 1] == "results/inference_benchmark_bs0x3200000_bf16"


# -------------------------------------------------------------------------------------- processes and machines


def test_one_process_is_started_by_python_and_several_by_the_launcher(command):
    assert command("pretrain_base")[:3] == ["python3", "train.py", "pretrain"]
    words = command("pretrain_base", NUM_GPUS="2")
    assert words[1:6] == ["utils/launch.py", "--standalone", "--nproc_per_node", "2", "train.py"]
    words = command("inference", NUM_GPUS="2")
    assert words[4:6] == ["2", "inference.py"]
    words = command("pretrain_base", NUM_GPUS="1", MAX_RESTARTS="3")
    assert words[3:8] == ["--nproc_per_node", "1", "--max_restarts", "3", "train.py"]


def test_several_machines_meet_at_the_address_of_one(command):
    machines = {"NUM_NODES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234", "NUM_GPUS": "8", "SLURM_JOB_ID": "42"}
    words = command("multinode", str(SCRIPTS / "finetune_vox_100h.sh"), "--lr", "1", NUM_CONCAT_BATCHES="1", **machines)
    launcher = words[: words.index("train.py")]
    assert launcher[1] == "utils/launch.py"
    given = dict(zip(launcher[2::2], launcher[3::2], strict=True))
    assert given == {
        "--nnodes": "2:2",
        "--nproc_per_node": "8",
        "--max_restarts": "0",
        "--rdzv_backend": "c10d",
        "--rdzv_endpoint": "node0:1234",
        "--rdzv_id": "42",
    }
    assert words[words.index("--update_freq") + 1] == "1"
    assert words[-2:] == ["--lr", "1"]


def test_where_machines_may_be_lost_the_program_shares_the_sub_batches(command, call):
    machines = {"NUM_NODES": "3", "MIN_NODES": "1", "MASTER_ADDR": "node0", "NUM_GPUS": "8", "JOIN_TIMEOUT": "60"}
    words = command("pretrain_base", **machines)
    launcher = words[: words.index("train.py")]
    given = dict(zip(launcher[2::2], launcher[3::2], strict=True))
    assert given["--nnodes"] == "1:3"
    assert given["--max_restarts"] == "10"
    assert given["--rdzv_conf"] == "join_timeout=60"
    assert words[words.index("--world_batches") + 1] == "64"  # of the recipe, which 3 x 8 x 8 does not divide
    assert "--update_freq" not in words
    assert call("pretrain_base", UPDATE_FREQ="1", **machines).returncode == 2


@pytest.mark.parametrize("missing", ["NUM_NODES", "MASTER_ADDR"])
def test_a_machine_that_is_not_described_is_a_usage_error(missing, call):
    machines = {"NUM_NODES": "2", "MASTER_ADDR": "node0", "NUM_CONCAT_BATCHES": "1", missing: None}
    result = call("multinode", str(SCRIPTS / "pretrain_base.sh"), **machines)
    assert result.returncode == 2
    assert missing in result.stderr


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_a_slurm_job_that_was_stopped_is_put_back_into_the_queue(status, requeued, tmp_path):
    """With stubs for Slurm's programs."""
    stubs = {
        "srun": f'echo "$NUM_NODES $MIN_NODES $MASTER_ADDR $*"; exit {status}',
        "scontrol": 'if [ "$1" = show ]; then printf "node4\\nnode7\\n"; else echo "scontrol $*"; fi',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[4,7]"}
    done = subprocess.run(
        [BASH, str(SCRIPTS / "slurm_pretrain.sbatch"), "--lr", "1"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **job},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    started, *more = done.stdout.splitlines()
    assert started.startswith("2 1 node4 ")
    assert started.endswith(" bash scripts/multinode.sh scripts/pretrain_base.sh --lr 1")
    assert more == (["scontrol requeue 42"] if requeued else [])


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"DEVICE": "cpu"}, None),
    ],
)
def test_processes_are_the_visible_cuda_devices(variables, processes, call, tools, tmp_path):
    """Here without torch, so that nvidia-smi (a stub of three devices) is asked."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: B\\nGPU 2: C\\n'\n", encoding="utf-8")
    smi.chmod(0o755)
    sub_batches = {"NUM_CONCAT_BATCHES": "1", "WORLD_BATCHES": "6"}
    variables = {"DEVICE": None, "PATH": f"{tmp_path}:{tools}", **sub_batches, **variables}
    words = shlex.split(call("pretrain_base", **variables).stdout)
    assert (words[words.index("--nproc_per_node") + 1] if "--nproc_per_node" in words else None) == processes


def test_torch_is_asked_for_the_devices_when_it_is_there(command, tools, tmp_path):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2\n", encoding="utf-8")
    python.chmod(0o755)
    words = command("pretrain_base", DEVICE=None, PYTHON=str(python), PATH=f"{tmp_path}:{tools}")
    assert words[0] == str(python)
    assert words[words.index("--nproc_per_node") + 1] == "2"


def test_recipes_run_with_the_active_environment_or_the_one_of_the_checkout(command, tmp_path):
    checkout = tmp_path / "my checkout"
    shutil.copytree(SCRIPTS, checkout / "scripts")

    def python_in(folder):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        return str(folder / "bin" / "python")

    def chosen(**variables):
        return command("pretrain_base", scripts=checkout / "scripts", cwd=checkout, VENV_DIR=None, **variables)[0]

    assert chosen() == "python3"
    own = python_in(checkout / ".venv")
    assert chosen() == own
    active = python_in(tmp_path / "active")
    assert chosen(VIRTUAL_ENV=str(tmp_path / "active")) == active
    assert chosen(CONDA_PREFIX=str(tmp_path / "active")) == active
    assert chosen(VIRTUAL_ENV=str(tmp_path / "active"), PYTHON="python3.12") == "python3.12"


@pytest.mark.parametrize("script", ["pretrain_base", "inference"])
def test_a_python_that_is_not_there_is_a_usage_error_but_not_for_a_dry_run(script, call, tmp_path):
    (tmp_path / "file").touch()
    for python in ("/no/such/python", "nopython", str(tmp_path), str(tmp_path / "file")):
        result = call(script, PYTHON=python, DRY_RUN=None)
        assert (result.returncode, result.stdout) == (2, "")
        assert f"error: PYTHON={python}: " in result.stderr
        assert call(script, PYTHON=python).returncode == 0
    assert "PYTHON" in call(script, DRY_RUN=None).stderr  # nor is there a python3 on this PATH


def test_scripts_work_from_any_folder_and_below_folders_with_spaces(command, tmp_path):
    checkout = tmp_path / "a b" / "it's"
    shutil.copytree(SCRIPTS, checkout / "scripts")
    for preset in ("finetune_vox_100h", "inference_benchmark"):
        words = command(preset, scripts=checkout / "scripts", cwd=tmp_path)
        assert Path(words[1]).parent == checkout
        words = command(preset, scripts="scripts", cwd=checkout)
        assert Path(words[1]).name == words[1]


def test_the_command_that_is_printed_is_the_command_that_runs(call, tools, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word; do printf "<%s>" "$word"; done\n', encoding="utf-8")
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "NUM_GPUS": "2", "OUTPUT_DIR": "a b"}
    printed = shlex.split(call("pretrain_base", "--x", "", **variables).stdout)
    ran = call("pretrain_base", "--x", "", DRY_RUN=None, **variables)
    assert ran.returncode == 0
    assert ran.stdout == "".join(f"<{word}>" for word in printed[1:])


def test_nothing_is_created_by_a_dry_run(call, tmp_path):
    before = sorted(tmp_path.iterdir())
    for preset in PRETRAIN + FINETUNE + INFERENCE:
        assert call(preset, cwd=tmp_path).returncode == 0
    assert sorted(tmp_path.iterdir()) == before


# --------------------------------------------------------------------------------------------------- quickstart


def test_a_dry_run_of_the_quickstart_prints_all_its_commands_and_writes_nothing(call, tmp_path):
    result = call("quickstart", cwd=tmp_path, QUICKSTART_WORK="my work", PRETRAIN_UPDATES="7", PYTHON="/no/python")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    lines = [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("# ")]
    programs = [next(Path(word).name for word in words if word.endswith((".py", ".sh"))) for words in lines]
    making = ["setup_env.sh", "synthesize_corpus.py", "generate_filelists.sh"]
    assert programs == [*making, "train.py", "train.py", "inference.py"]
    work = f"{tmp_path}/my work"
    assert lines[2][2:] == [f"{work}/corpus", f"{work}/filelists"]
    pretrain, finetune, inference = lines[3:]
    assert (pretrain[0], pretrain[2]) == ("/no/python", "pretrain")
    assert pretrain[pretrain.index("--max_update") + 1] == "7"
    assert finetune[finetune.index("--w2v_path") + 1] == f"{work}/pretrain/wav2vec2_update7.pt"
    assert inference[inference.index("--w2v_path") + 1] == f"{work}/finetune/wav2vec2_best.pt"


def test_a_dry_run_of_the_quickstart_takes_a_corpus_as_it_is(call, tmp_path):
    for subset in ("train", "dev", "test"):
        (tmp_path / "corpus" / subset).mkdir(parents=True)
    result = call("quickstart", cwd=tmp_path, QUICKSTART_DIR="corpus")
    assert result.returncode == 0, result.stderr
    assert "synthesize" not in result.stdout
    assert f"{tmp_path}/corpus {tmp_path}/quickstart/filelists\n" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("arguments", [["--hlep"], ["my_corpus"], ["--help", "x"], [""]])
def test_the_quickstart_takes_no_other_arguments(arguments, call, tmp_path):
    result = call("quickstart", *arguments, cwd=tmp_path, DRY_RUN=None)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_the_quickstart_that_cannot_be_written_is_named(call, tmp_path):
    (tmp_path / "file").touch()
    for work in ("file", "file/deep"):
        result = call("quickstart", cwd=tmp_path, DRY_RUN=None, QUICKSTART_WORK=work, PATH=os.environ["PATH"])
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"error: QUICKSTART_WORK={work}: ")


# --------------------------------------------------------------------------------------------------- containers


def test_the_container_sees_the_data_where_recipes_look_for_it(command, tools, tmp_path):
    words = command("docker/run", DATASET_DIR="/my data", RESULTS_DIR="/r")
    volumes = [words[place + 1] for place, word in enumerate(words) if word == "--volume"]
    assert volumes == ["/my data:/datasets", f"{ROOT}:/workspace/wav2vec2", "/r:/workspace/wav2vec2/results"]
    assert words[-2:] == ["wav2vec2:latest", "bash"]
    assert "--gpus" not in command("docker/run", "nvidia-smi", GPUS="")
    relative = command("docker/run", DATASET_DIR="data", cwd=tmp_path)
    assert f"{tmp_path}/data:/datasets" in relative


def test_docker_is_not_left_to_make_folders(call, tmp_path):
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n', encoding="utf-8")
    docker.chmod(0o755)
    places = {
        "PATH": f"{docker.parent}:{os.environ['PATH']}",
        "DRY_RUN": None,
        "RESULTS_DIR": str(tmp_path / "a" / "r"),
    }
    refused = call("docker/run", DATASET_DIR="/no/such data", **places)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("error: DATASET_DIR=/no/such data: ")
    assert not (tmp_path / "a").exists()
    ran = call("docker/run", DATASET_DIR=str(tmp_path), **places)
    assert ran.returncode == 0, ran.stderr
    assert f"<{tmp_path}:/datasets>" in ran.stdout
    assert (tmp_path / "a" / "r").is_dir()


def test_the_base_of_the_container_can_be_named(command):
    words = command("docker/build", "--no-cache", FROM_IMAGE_NAME="nvcr.io/nvidia/pytorch:26.02-py3")
    assert words[:2] == ["docker", "build"]
    assert "FROM_IMAGE_NAME=nvcr.io/nvidia/pytorch:26.02-py3" in words
    assert words[-2:] == ["--no-cache", str(ROOT)]


# ------------------------------------------------------------------------------------------------------- style


NEWER_THAN_BASH_3_2 = {
    "associative arrays": r"\b(declare|local|typeset)\s+-\w*[An]",
    "readarray, mapfile": r"\b(readarray|mapfile)\b",
    "case conversion": r"\$\{\w+(\[[^]]*\])?(,|\^)",
    "transformations": r"\$\{\w+(\[[^]]*\])?@\w\}",
    "|& and &>>": r"\|&|&>>",
    ";& and ;;&": r";;?&",
    "coproc": r"\bcoproc\b",
    "-v": r"\[\[? -v ",
    "negative index": r"\[-\d+\]",
    "negative length": r"\$\{\w+:\s*\d[^}]*:\s*-",
    "wait -n": r"\bwait -n\b",
    "printf %()T": r"printf.*%\(",
    "variables": r"\$\{?(EPOCH\w+|BASHPID|SRANDOM|BASH_ARGV0)",
    "padded ranges": r"\{0\d+\.\.",
    "globstar, lastpipe": r"\b(globstar|lastpipe|inherit_errexit)\b",
}
GNU_ONLY = {
    "sed": r"\bsed\s+(-\w*[ir]|--)",
    "grep": r"\bgrep\s+(-\w*P|--)",
    "paths": r"\b(realpath|readlink)\b",
    "date": r"\bdate\s+(-d|--|\S*%N)",
    "stat": r"\bstat\s+(-c|--)",
    "sums": r"\b(md5sum|sha\d+sum)\b",
    "cores": r"\bnproc\b(?!_)",
    "timeout": r"^\s*timeout\b",
    "xargs": r"\bxargs\s+.*(-r|-d)\b",
    "head": r"\b(head|tail)\s+(-n|-c)\s*-",
    "sort": r"\bsort\s+-\w*V",
    "mktemp": r"\bmktemp\s+(--|-t|-p)|\bmktemp\s*$",
    "tac, seq": r"\b(tac|seq)\b",
    "base64": r"\bbase64\s+-w",
    "cp": r"\b(cp|mv|ln|tar|find|awk)\s+--\w",
}


def code_lines(path):
    """Lines of a script without comments and without embedded Python."""
    text = re.sub(
        r"<<'PYTHON_END'.*?^PYTHON_END$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


@pytest.mark.parametrize("path", ALL_SCRIPTS, ids=lambda path: path.name)
def test_scripts_use_only_what_bash_3_2_and_bsd_tools_have(path):
    for line in code_lines(path):
        for what, pattern in {**NEWER_THAN_BASH_3_2, **GNU_ONLY}.items():
            assert not re.search(pattern, line), f"{what}: {line}"


@pytest.mark.parametrize("path", ALL_SCRIPTS, ids=lambda path: path.name)
def test_empty_arrays_are_guarded_as_bash_3_2_needs(path):
    """There, "${a[@]}" of an empty array is an unset variable: guard it, or look at ${#a[@]} first."""
    lines = code_lines(path)
    counted = set(re.findall(r"\$\{#(\w+)\[@\]\}", "\n".join(lines)))
    for line in lines:
        unguarded = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}', "", line)
        assert {*re.findall(r"\$\{(\w+)\[[@*]\]", unguarded)} <= counted, line


@pytest.mark.parametrize("path", ALL_SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_what_it_is_for(path):
    first, second, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first == "#!/usr/bin/env bash"
    assert re.match(r"# [A-Z].{20,}[.:]", second)
    assert "# SPDX-License-Identifier: Apache-2.0" in rest[:40]


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    # every file by itself: following the sources, as lint.sh does, takes ten times as long
    alone = [shellcheck, "--norc", "--exclude=SC1091", *map(str, ALL_SCRIPTS)]
    result = subprocess.run(alone, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
