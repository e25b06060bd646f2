"""train_step and what follows an update, against plain float64 arithmetic and a fake clock."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL_FLAGS, corpus

import train
from common import checkpoint
from common.errors import CheckpointError, ConfigError, DataError, TrainingError
from wav2vec2.arg_parser import parse_train
from wav2vec2.build import build_run
from wav2vec2.run import Run
from wav2vec2.task import PretrainTask

COMMON = [
    *("--num_workers", "0", "--device", "cpu", "--save_frequency", "1000"),
    *("--dropout", "0", "--attention_dropout", "0", "--validate_frequency", "1000"),
]
FLAGS = [*MODEL_FLAGS, *COMMON, "--max_tokens", "40000", "--num_negatives", "10", "--mask_length", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


def build(data: Path, output: Path, *more: str, mode: str = "pretrain") -> Run:
    flags = FLAGS if mode == "pretrain" else [*COMMON, "--max_tokens", "60000"]
    config = parse_train([mode, "--data", str(data), "--output_dir", str(output), *flags, *more])
    return build_run(config, torch.device("cpu"), ["test"])


def test_updates_follow_the_formulas(data, tmp_path):
    """Learning rate of u - 1, division by the count of the whole update, clipping, Adam with decay, EMA."""
    lr, decay, clip, average, betas, eps = 0.01, 0.1, 0.7, 0.6, (0.9, 0.98), 1e-6
    run = build(
        data,
        tmp_path,
        *("--lr", str(lr), "--warmup_updates", "4", "--max_update", "10", "--weight_decay", str(decay)),
        *("--clip_norm", str(clip), "--ema", str(average), "--update_freq", "2"),
    )
    names = dict(run.task.model.named_parameters())
    weights = {name: p.detach().double().clone() for name, p in names.items()}
    ema = {name: w.clone() for name, w in weights.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(6):
        batches = run.train_loader.next_update()
        # the plain arithmetic, from gradients of the undivided sums
        run.set_step(step)
        for batch in batches:
            noise, negatives = run.task._draw(batch)
            run.task.losses(batch, noise, negatives)[0].backward()
        count = sum(batch.num_masked for batch in batches)
        gradients = {name: p.grad.double() / count for name, p in names.items()}
        run.optimizer.zero_grad()
        norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
        rate = lr * step / 4 if step < 4 else lr * (10 - step) / 6
        for name, weight in weights.items():
            g = gradients[name] * min(1.0, clip / (norm.item() + 1e-6))
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            size = rate * (1 - betas[1] ** (step + 1)) ** 0.5 / (1 - betas[0] ** (step + 1))
            weight -= rate * decay * weight + size * first[name] / (second[name].sqrt() + eps)
            ema[name] = average * ema[name] + (1 - average) * weight
        assert norm > clip
        assert train.train_step(run, batches, step)
        for name, weight in weights.items():
            torch.testing.assert_close(names[name].detach().double(), weight, atol=2e-5, rtol=1e-3)
            torch.testing.assert_close(run.ema.weights()[name].double(), ema[name], atol=2e-5, rtol=1e-3)
            weight.copy_(names[name].detach())  # so that float32's rounding does not add up
            ema[name].copy_(run.ema.weights()[name])
    assert (weights["final_proj.weight"] - ema["final_proj.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("interval", ["10", "9", "3"])
def test_speed_does_not_depend_on_when_checkpoints_are_saved(data, tmp_path, monkeypatch, interval):
    run = build(data, tmp_path, "--max_update", "100", "--log_frequency", "10", "--save_interval_updates", interval)
    now, logged = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run.logger, "log", lambda scope, step, values: logged.append(values))
    monkeypatch.setattr(checkpoint, "save", lambda path, state: now.__setitem__(0, now[0] + 1000.0))
    run._clock = 0.0
    for step in range(20):
        batches = run.train_loader.next_update()
        train.train_step(run, batches, step)
        now[0] += 2.0
        run.after_update(True)
    assert sum(values["took"] for values in logged) == pytest.approx(40.0)
    assert all(values["took"] % 2 == 0 for values in logged)
    assert logged[0]["eta"] == pytest.approx((100 - min(10, int(interval))) * 2.0)


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_replaces_a_checkpoint(data, tmp_path, monkeypatch):
    command = ["pretrain", "--data", str(data), "--output_dir", str(tmp_path), *FLAGS]
    command += ["--max_update", "20", "--save_interval_updates", "2"]
    losses = PretrainTask.losses

    def broken(task: PretrainTask, *args: Any) -> Any:
        total, stats, results = losses(task, *args)
        return (
            (total * torch.nan, {**stats, "loss": stats["loss"] * torch.nan}, results)
            if task.step >= 5
            else (total, stats, results)
        )

    monkeypatch.setattr(PretrainTask, "losses", broken)
    with pytest.raises(TrainingError, match="loss.*not finite"):
        train.main(command)
    path, state = checkpoint.load_newest(tmp_path)
    assert path.name == "wav2vec2_update5.pt"  # a milestone
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_a_run_in_which_nothing_is_masked_is_refused(data, tmp_path):
    with pytest.raises(TrainingError, match="no frame was masked"):
        train.main(
            ["pretrain", "--data", str(data), "--output_dir", str(tmp_path), *FLAGS, "--no_mask_overlap"]
            + ["--mask_length", "70", "--max_update", "4"]
        )


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("saved")
    train.main(["pretrain", "--data", str(data), "--output_dir", str(output), *FLAGS, "--max_update", "2"])
    return checkpoint.update_path(output, 2)


def change(source: Path, target: Path, **entries: Any) -> Path:
    """A copy of a checkpoint with other entries (None removes one)."""
    state = {**checkpoint.load(source), **entries}
    checkpoint.save(target, {key: value for key, value in state.items() if value is not None})
    return target


def test_incomplete_and_unfitting_checkpoints_are_refused_by_name(data, saved, tmp_path):
    state = checkpoint.load(saved)
    weights = dict(state["model"])
    gap = {name: w for name, w in weights.items() if name != "encoder.layers.0.fc1.weight"}
    other = {**weights, "encoder.layers.0.fc1.weight": torch.zeros(3, 3)}
    strange = {**state["config"], "model": {**state["config"]["model"], "foo": 1}}
    for entries, word in (({"model": gap}, "fc1"), ({"model": other}, "fc1"), ({"config": strange}, "foo")):
        path = change(saved, tmp_path / "made.pt", **entries)
        with pytest.raises(CheckpointError, match=rf"made\.pt.*{word}"):
            build(data, tmp_path / "finetune", "--w2v_path", str(path), mode="finetune")
        resumed = change(saved, checkpoint.update_path(tmp_path / word, 2), **entries)
        with pytest.raises(CheckpointError, match=rf"{resumed.name}.*{word}"):
            build(data, resumed.parent, "--resume")


def test_a_published_file_without_optimizer_state_starts_fine_tuning_but_is_not_resumed(data, saved, tmp_path):
    bare = {"optimizer": None, "scaler": None, "ema": None, "loader": None, "progress": None}
    path = change(saved, checkpoint.update_path(tmp_path, 2), **bare)
    build(data, tmp_path / "finetune", "--w2v_path", str(path), mode="finetune")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        build(data, tmp_path, "--resume")


def test_combinations_that_cannot_work_are_refused_by_flag(data, tmp_path):
    cases = [
        (("--adam_betas", "0.9", "1.0"), "--adam_betas"),
        (("--ema", "1"), "--ema"),
        (("--lr_policy", "noam"), "--warmup_updates"),
        (("--lr_policy", "cosine", "--lr_poly_power", "2"), "--lr_poly_power"),
        (("--warmup_updates", "9", "--hold_updates", "9", "--max_update", "10"), "--max_update"),
        (("--mask_channel_length", "7"), "--mask_channel_length"),
        (("--no_mask_channel_overlap",), "--no_mask_channel_overlap"),
        (("--mask_channel_selection", "uniform", "--mask_channel_other", "1"), "--mask_channel_selection"),
        (("--mask_other", "1"), "--mask_other"),
        (("--mask_min_space", "2"), "--mask_min_space"),
        (("--num_epochs", "2", "--num_warmup_epochs", "2"), "--num_warmup_epochs"),
        (
            ("--mask_channel_prob", "0.1", "--mask_channel_selection", "uniform", "--mask_channel_other", "99"),
            "--mask_channel_other",
        ),
        (("--no_save", "--save_interval_updates", "1"), "--save_"),
        (("--fp16", "--bf16"), "--fp16 --bf16"),
        (("--amp",), "--amp"),
        (("--bf16", "--fp16_init_scale", "2"), "--fp16_init_scale"),
        (("--bf16", "--fp32_ops", "everything"), "--fp32_ops"),
        (("--no_quantize_targets",), "--latent_vars"),
        (("--encoder_layers", "3"), "--encoder_layers"),
        (("--num_negatives", "0"), "--num_negatives"),
        (("--max_tokens", "3000"), "--max_tokens"),
        (("--final_dropout", "0.1"), "--final_dropout"),
        (("--mask_porb", "0.1"), "--mask_prob"),
    ]
    for more, flag in cases:
        with pytest.raises(ConfigError, match=flag) as error:
            build(data, tmp_path / "out", *more)
        assert "\n" not in str(error.value)


def test_a_bad_file_does_not_cost_what_was_learnt_before_it(data, tmp_path):
    lines = (data / "train.tsv").read_text().splitlines()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "valid.tsv").write_text((data / "valid.tsv").read_text())
    (folder / "train.tsv").write_text("\n".join([*lines, "absent.wav\t9000"]) + "\n")
    with pytest.raises(DataError, match=rf"train\.tsv:{len(lines) + 1}.*absent\.wav"):
        train.main(
            ["pretrain", "--data", str(folder), "--output_dir", str(tmp_path / "out"), *FLAGS, "--max_update", "50"]
            + ["--seed", "4"]
        )
    path, state = checkpoint.load_newest(tmp_path / "out")
    assert state["progress"]["step"] >= 1
    assert path == checkpoint.update_path(tmp_path / "out", state["progress"]["step"])


def test_transcripts_that_do_not_fit_their_audio_are_told(data, saved, tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.glob("*.*"):
        (folder / path.name).write_text(path.read_text())
    lines = (data / "train.ltr").read_text().splitlines()
    (folder / "train.ltr").write_text("\n".join([*lines[:2], lines[2] + " O O" * 60, *lines[3:]]) + "\n")
    build(folder, tmp_path / "some", "--w2v_path", str(saved), mode="finetune")
    assert "train.ltr:3" in caplog.text
    assert "1 of 14" in caplog.text
    (folder / "train.ltr").write_text("\n".join(line + " O O" * 60 for line in lines) + "\n")
    with pytest.raises(DataError, match=r"train\.ltr:1.*14 of 14"):
        build(folder, tmp_path / "all", "--w2v_path", str(saved), mode="finetune")


def test_flags_of_precision_and_masks_reach_the_run(data, saved, tmp_path):
    def half(*more: str) -> set[str]:
        run = build(data, tmp_path / "_".join(more), "--bf16", *more)
        assert {weight.dtype for weight in run.optimizer.master_weights().values()} == {torch.float32}
        return {name for name, p in run.task.model.named_parameters() if p.dtype == torch.float32}

    assert {name.split(".")[1] for name in half()} == {"pos_conv"}
    assert half("--fp32_ops", "none") == set()
    kept = half("--fp32_ops", "conv_norms", "transformer_layernorm")
    assert kept
    assert all("norm" in name for name in kept)
    run = build(data, tmp_path / "amp", "--bf16", "--amp")
    assert {p.dtype for p in run.task.model.parameters()} == {torch.float32}
    assert run.task.amp_dtype == torch.bfloat16
    run = build(data, tmp_path / "fp32", "--bf16", "--fp32_ops", "mha_softmax")
    assert all(layer.self_attn.fp32_softmax for layer in run.task.model.encoder.layers)
    assert not run.task.fp32_cosine
    run = build(data, tmp_path / "channels", "--mask_channel_prob", "0.5", "--mask_channel_length", "2")
    assert run.train_loader.next_update()[0].channel_mask_BD.any()
    run = build(data, tmp_path / "labels", "--w2v_path", str(saved), "--mask_prob", "0", mode="finetune")
    batch = run.train_loader.next_update()[0]
    assert batch.mask_BT is None
    assert batch.labels_BL is not None
    assert all(batch.mask_BT is None for batch in run.valid_loader)
