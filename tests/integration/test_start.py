"""Runs that start from checkpoints of other programs, from fine-tuned ones, and where another program stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import corpus
from tiny_contents import SYMBOLS, adam, finetuned, pretrained
from tiny_model import HOURGLASS, MODEL

import inference
import train
from common import checkpoint
from common.entry import run_program
from common.errors import CheckpointError, ConfigError, DataError
from common.labels import SPECIAL_SYMBOLS
from wav2vec2.config import PrecisionConfig
from wav2vec2.convert import fairseq, native, nvidia
from wav2vec2.convert.load_any import WRITERS

QUICK = ["--num_workers", "0", "--device", "cpu", "--lr", "0"]  # a rate of 0 shows the weights a run started with
PRETRAIN = ["--max_tokens", "40000", "--num_negatives", "10", "--mask_length", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


def run(mode: str, data: Path, output: Path, *more: str, updates: int = 1) -> dict[str, Any]:
    """Train and give the last checkpoint."""
    command = [mode, "--data", str(data), "--output_dir", str(output), *QUICK, *more, "--max_update", str(updates)]
    train.main(command + (PRETRAIN if mode == "pretrain" else ["--max_tokens", "60000"]))
    return checkpoint.load(checkpoint.update_path(output, updates))


def fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The error, which must be one line."""
    with pytest.raises(SystemExit):
        run_program(train.main, list(command))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("program", WRITERS)
def test_fine_tuning_starts_from_a_pretrained_model_of_any_program(data, tmp_path, program):
    before = pretrained()
    WRITERS[program](tmp_path / "w2v", before)
    state = run("finetune", data, tmp_path / "run", "--w2v_path", str(tmp_path / "w2v"))
    trunk = {f"w2v.{name}" for name in before.weights if not name.startswith(("quantizer", "project_q", "final_proj"))}
    assert {name for name in state["model"] if name.startswith("w2v.")} == trunk
    for name in trunk:
        assert torch.equal(state["model"][name], before.weights[name.removeprefix("w2v.")]), name


@pytest.mark.parametrize("program", ["native", "nvidia"])
def test_the_hourglass_is_fine_tuned_from_every_program_that_has_it(data, tmp_path, program):
    before = pretrained(HOURGLASS)
    WRITERS[program](tmp_path / "w2v", before)
    state = run("finetune", data, tmp_path / "run", "--w2v_path", str(tmp_path / "w2v"))
    name = "encoder.hourglass_layers.0.self_attn.qkv_proj.weight"
    assert torch.equal(state["model"][f"w2v.{name}"], before.weights[name])


@pytest.mark.parametrize("program", WRITERS)
def test_another_vocabulary_keeps_the_rows_of_shared_symbols(data, tmp_path, program, caplog):
    before = finetuned()
    WRITERS[program](tmp_path / "w2v", before)
    caplog.set_level("INFO")
    state = run("finetune", data, tmp_path / "run", "--w2v_path", str(tmp_path / "w2v"))
    labels = state["labels"]
    assert labels == [*SPECIAL_SYMBOLS, *sorted({"|", *"ONETWOSIXTEN"})]
    for row, symbol in enumerate(labels):
        for name in ("proj.weight", "proj.bias"):
            if symbol in SYMBOLS:
                assert torch.equal(state["model"][name][row], before.weights[name][SYMBOLS.index(symbol)]), symbol
            else:
                assert not (before.weights[name] == state["model"][name][row]).all(-1).any(), symbol
    table = {line.split()[0]: line.split()[1:] for line in caplog.messages if line.startswith("  ")}
    assert table["kept"] == ["8", *SPECIAL_SYMBOLS, "E", "N", "O", "|"]
    assert table["new"] == ["5", "I", "S", "T", "W", "X"]
    assert table["dropped"] == ["1", "Ä"]


def test_an_output_layer_without_symbols_is_left_out_and_told(data, tmp_path, caplog):
    fairseq.write(tmp_path / "w2v", finetuned(labels=None))
    state = run("finetune", data, tmp_path / "run", "--w2v_path", str(tmp_path / "w2v"))
    assert len(state["model"]["proj.weight"]) == 4 + len({"|", *"ONETWOSIXTEN"})
    assert "does not tell the symbols of its output layer" in caplog.text
    assert "--dictionary" in caplog.text


@pytest.mark.parametrize("program", WRITERS)
def test_pretraining_continues_with_all_weights_and_a_fresh_optimizer(data, tmp_path, program, caplog):
    before = pretrained(step=500, best=3.0)
    WRITERS[program](tmp_path / "w2v", before)
    state = run("pretrain", data, tmp_path / "run", "--init_from", str(tmp_path / "w2v"))
    assert state["model"].keys() == before.weights.keys()
    assert all(torch.equal(state["model"][name], before.weights[name]) for name in before.weights)
    assert state["progress"]["step"] == 1
    assert {entry["step"] for entry in state["optimizer"].values()} == {1}
    assert "quantizer" not in caplog.text
    again = run("pretrain", data, tmp_path / "run", "--init_from", str(tmp_path / "w2v"), "--resume", updates=2)
    assert again["progress"]["step"] == 2  # its own checkpoint comes first when the same command runs again


def test_a_model_without_quantizer_gets_a_fresh_one_and_that_is_told(data, tmp_path, caplog):
    before = finetuned()
    native.write(tmp_path / "w2v", before)
    state = run("pretrain", data, tmp_path / "run", "--init_from", str(tmp_path / "w2v"))
    assert "has no quantizer and projections of pre-training; they begin with fresh weights" in caplog.text
    assert state["model"]["quantizer.vars"].shape == (1, 20, 6)
    assert torch.equal(state["model"]["layer_norm.weight"], before.weights["w2v.layer_norm.weight"])


@pytest.mark.parametrize("program", ["native", "fairseq", "nvidia"])
def test_training_goes_on_where_another_program_stopped(data, tmp_path, program, monkeypatch):
    moments = adam(pretrained().weights, step=40)
    where = {"epoch": 3, "position": 0}
    before = pretrained(step=41, best=2.5, optimizer=moments, loader=where)
    WRITERS[program](tmp_path / "theirs", before)
    seen = {}
    load = train.build_run

    def watched(*arguments: Any, **options: Any) -> Any:
        built = load(*arguments, **options)
        seen["at"] = built.progress.step, built.progress.best, built.train_loader.epoch, built.schedule(41)
        seen["moments"] = {name: entry["exp_avg"].clone() for name, entry in built.optimizer.state_dict().items()}
        return built

    monkeypatch.setattr(train, "build_run", watched)
    more = ["--resume_from", str(tmp_path / "theirs"), "--lr", "0.1", "--warmup_updates", "42"]
    state = run("pretrain", data, tmp_path / "run", *more, updates=42)
    assert seen["at"] == (41, None, 3, pytest.approx(0.1 * 41 / 42))
    assert all(torch.equal(seen["moments"][name], moments[name]["exp_avg"]) for name in moments)
    assert {entry["step"] for entry in state["optimizer"].values()} == {41}
    assert state["progress"]["step"] == 42


def test_fine_tuning_goes_on_with_the_dictionary_of_the_data_where_the_file_has_none(data, tmp_path):
    labels = (*SPECIAL_SYMBOLS, *sorted({"|", *"ONETWOSIXTEN"}))
    before = finetuned(labels=None, num_symbols=len(labels), step=7)
    fairseq.write(tmp_path / "theirs", replace(before, optimizer=adam(before.weights, 7)))
    state = run("finetune", data, tmp_path / "run", "--resume_from", str(tmp_path / "theirs"), updates=8)
    assert tuple(state["labels"]) == labels
    assert torch.equal(state["model"]["proj.weight"], before.weights["proj.weight"])
    short = finetuned(labels=None, num_symbols=12, step=7)
    fairseq.write(tmp_path / "short", replace(short, optimizer=adam(short.weights, 7)))
    with pytest.raises(DataError, match=r"dict\.ltr\.txt: has 13 symbols .* 12 rows"):
        run("finetune", data, tmp_path / "other", "--resume_from", str(tmp_path / "short"), updates=8)


def test_a_file_without_optimizer_cannot_go_on(data, tmp_path):
    fairseq.write(tmp_path / "theirs", pretrained(step=41))
    with pytest.raises(CheckpointError, match="has no optimizer state, .*--init_from"):
        run("pretrain", data, tmp_path / "run", "--resume_from", str(tmp_path / "theirs"), updates=42)


def test_averaged_weights_are_what_a_run_starts_from(data, tmp_path):
    before = pretrained()
    average = {name: tensor + 0.001 for name, tensor in before.weights.items()}
    native.write(tmp_path / "a.pt", replace(before, averaged=average))
    state = run("pretrain", data, tmp_path / "pretrain", "--init_from", str(tmp_path / "a.pt"))
    assert torch.equal(state["model"]["quantizer.vars"], average["quantizer.vars"])
    state = run("finetune", data, tmp_path / "finetune", "--w2v_path", str(tmp_path / "a.pt"))
    assert torch.equal(state["model"]["w2v.layer_norm.weight"], average["layer_norm.weight"])


def test_the_recipes_resume_reads_the_other_file_while_the_folder_is_empty(data, tmp_path, caplog):
    before = pretrained(step=41)
    fairseq.write(tmp_path / "theirs.pt", replace(before, optimizer=adam(before.weights, 40)))
    more = ["--resume_from", str(tmp_path / "theirs.pt"), "--resume"]
    run("pretrain", data, tmp_path / "run", *more, updates=42)
    caplog.set_level("INFO")
    assert run("pretrain", data, tmp_path / "run", *more, updates=43)["progress"]["step"] == 43
    assert "was read when the run began" in caplog.text
    with pytest.raises(ConfigError, match="--init_from .* is of a run that began without it"):
        run("pretrain", data, tmp_path / "run", "--init_from", str(tmp_path / "theirs.pt"), "--resume", updates=44)


def test_averages_and_moments_of_frozen_weights_are_left_out(data, tmp_path):
    before = finetuned(labels=(*SPECIAL_SYMBOLS, *sorted({"|", *"ONETWOSIXTEN"})), step=7)
    average = {name: tensor + 1 for name, tensor in before.weights.items()}
    theirs = replace(before, optimizer=adam(before.weights, 7), averaged=average, best=9.0)
    nvidia.write(tmp_path / "theirs.pt", theirs)
    more = ["--feature_grad_mult", "0", "--ema", "0.5", "--resume_from", str(tmp_path / "theirs.pt")]
    state = run("finetune", data, tmp_path / "run", *more, updates=8)
    assert not any("feature_extractor" in name for name in state["ema"])
    middle = (before.weights["proj.weight"] + average["proj.weight"]) / 2
    torch.testing.assert_close(state["ema"]["proj.weight"], middle)
    assert state["progress"]["best"] is None or state["progress"]["best"] != 9.0


def test_the_loss_scale_of_another_program_is_gone_on_with(data, tmp_path):
    before = pretrained(step=41)
    scaler = {"scale": 16.0, "num_skipped": 3, "since_overflow": 1, "since_change": 1, "overflows_since_change": 0}
    config = replace(before.config, precision=PrecisionConfig(fp16=True))
    theirs = replace(before, config=config, optimizer=adam(before.weights, 40), scaler=scaler)
    fairseq.write(tmp_path / "theirs.pt", theirs)
    more = ["--fp16", "--resume_from", str(tmp_path / "theirs.pt")]
    assert run("pretrain", data, tmp_path / "run", *more, updates=42)["scaler"]["scale"] == 16.0


def test_codes_as_negatives_need_a_model_with_a_quantizer(data, tmp_path):
    native.write(tmp_path / "a.pt", pretrained(replace(MODEL, quantize_targets=False)))
    with pytest.raises(ConfigError, match="--codebook_negatives: needs a model with a quantizer"):
        run("pretrain", data, tmp_path / "run", "--init_from", str(tmp_path / "a.pt"), "--codebook_negatives", "3")


def test_the_mode_of_the_file_must_be_that_of_the_run(data, tmp_path):
    before = finetuned(step=7)
    native.write(tmp_path / "a.pt", replace(before, optimizer=adam(before.weights, 7)))
    with pytest.raises(CheckpointError, match="--resume_from .*: is of finetune, this is pretrain; .*--init_from"):
        run("pretrain", data, tmp_path / "run", "--resume_from", str(tmp_path / "a.pt"), updates=8)


def test_wrong_uses_of_the_flags(data, tmp_path, capsys):
    native.write(tmp_path / "a.pt", pretrained())
    common = ["--data", str(data), "--output_dir", str(tmp_path / "run")]
    start = ["--init_from", str(tmp_path / "a.pt")]
    assert "--encoder_layers: has an effect only without --init_from" in fails(
        capsys, "pretrain", *common, *start, "--encoder_layers", "3"
    )
    assert "--init_from --resume_from: only one" in fails(
        capsys, "pretrain", *common, *start, "--resume_from", str(tmp_path / "a.pt")
    )
    assert "--init_from none.pt: no such file" in fails(capsys, "pretrain", *common, "--init_from", "none.pt")
    assert "--resume_from none.pt: no such file" in fails(capsys, "finetune", *common, "--resume_from", "none.pt")
    assert "--w2v_path: is missing" in fails(capsys, "finetune", *common)
    assert "--w2v_path: is missing" in fails(capsys, "finetune", *common, "--resume")
    assert "--w2v_path --resume_from: only one" in fails(
        capsys, "finetune", *common, "--w2v_path", str(tmp_path / "a.pt"), "--resume_from", str(tmp_path / "a.pt")
    )


@pytest.mark.parametrize("program", WRITERS)
def test_inference_reads_every_program(data, tmp_path, program, capsys):
    before = finetuned()
    texts = {}
    for name in ("native", program):
        path = tmp_path / f"{name}.model"
        if not path.exists():
            WRITERS[name](path, before)
        inference.main(["--w2v_path", str(path), "--transcribe_filelist", str(data / "valid.tsv"), *QUICK[:4]])
        texts[name] = capsys.readouterr().out
    assert texts[program] == texts["native"]
    assert len(texts[program].split()) > 14


def test_a_model_without_symbols_needs_its_dictionary(data, tmp_path, capsys):
    before = finetuned()
    fairseq.write(tmp_path / "model.pt", replace(before, labels=None))
    command = ["--w2v_path", str(tmp_path / "model.pt"), "--transcribe_filelist", str(data / "valid.tsv"), *QUICK[:4]]
    with pytest.raises(CheckpointError, match="--dictionary"):
        inference.main(command)
    (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in SYMBOLS[4:]))
    inference.main([*command, "--dictionary", str(tmp_path / "dict.txt")])
    found = capsys.readouterr().out
    native.write(tmp_path / "native.pt", before)
    inference.main(["--w2v_path", str(tmp_path / "native.pt"), *command[2:]])
    assert found == capsys.readouterr().out
    with pytest.raises(DataError, match="name the dictionary that it was trained with"):
        inference.main([*command, "--dictionary", str(data / "dict.ltr.txt")])
    (tmp_path / "swapped.txt").write_text("".join(f"{symbol} 1\n" for symbol in SYMBOLS[:3:-1]))
    command = ["--w2v_path", str(tmp_path / "native.pt"), *command[2:], "--dictionary", str(tmp_path / "swapped.txt")]
    with pytest.raises(DataError, match="has other symbols than"):
        inference.main(command)
