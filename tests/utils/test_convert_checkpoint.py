"""Conversions in every direction: nothing changes, nothing is lost without a word, nothing half is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contents import SYMBOLS, adam, finetuned, pretrained
from tiny_model import HOURGLASS, LARGE, MODEL

from common.errors import CheckpointError, ConfigError, DataError
from utils import convert_checkpoint, inspect_checkpoint
from wav2vec2.config import DataConfig, OptimConfig
from wav2vec2.convert import native
from wav2vec2.convert.contents import Contents
from wav2vec2.convert.load_any import WRITERS, load_any

ARCHITECTURES = {
    "base": MODEL,
    "large": LARGE,
    "same width": replace(MODEL, encoder_embed_dim=16, conv_pos=7),
    "code width": replace(MODEL, latent_dim=6, latent_groups=3),
    "wide code": replace(LARGE, latent_vars=3, final_dim=10, latent_dim=20),
}
OTHERS = [name for name in list(WRITERS) if name != "native"]


def converted(source: Path, target: Path, to: str, *more: str) -> Contents:
    convert_checkpoint.main([str(source), str(target), "--to", to, *more])
    return load_any(target)


def same_weights(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("make", [pretrained, finetuned])
@pytest.mark.parametrize("program", OTHERS)
def test_a_round_trip_is_the_identity_tensor_for_tensor(tmp_path, program, make, name):
    before = make(ARCHITECTURES[name])
    native.write(tmp_path / "a.pt", before)
    there = converted(tmp_path / "a.pt", tmp_path / "there", program)
    assert there.source == program
    back = converted(tmp_path / "there", tmp_path / "back.pt", "native")
    same_weights(back.weights, before.weights)
    assert back.labels == before.labels
    assert back.config.mode == before.config.mode
    assert back.config.model == before.config.model
    assert back.origin == f"{program}: there"


@pytest.mark.parametrize("make", [pretrained, finetuned])
def test_the_hourglass_goes_to_nvidia_and_back(tmp_path, make):
    for architecture in (
        HOURGLASS,
        replace(HOURGLASS, hourglass_resample="linear", hourglass_transformer="[0,(2,4),1]"),
    ):
        before = make(architecture)
        folder = tmp_path / architecture.hourglass_resample
        folder.mkdir()
        native.write(folder / "a.pt", before)
        converted(folder / "a.pt", folder / "there", "nvidia")
        back = converted(folder / "there", folder / "back.pt", "native")
        same_weights(back.weights, before.weights)
        assert back.config.model == before.config.model


@pytest.mark.parametrize("program", ["fairseq", "huggingface"])
def test_the_hourglass_is_refused_where_there_is_none(tmp_path, program):
    native.write(tmp_path / "a.pt", pretrained(HOURGLASS))
    with pytest.raises(CheckpointError, match=rf"--to {program}: .* have no Hourglass"):
        converted(tmp_path / "a.pt", tmp_path / "there", program)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("program", ["fairseq", "nvidia"])
def test_options_and_training_state_survive_where_there_is_a_place(tmp_path, program):
    before = pretrained(step=40, best=2.5, loader={"epoch": 3, "position": 0})
    optimizer = adam(before.weights, 40)
    averaged = {name: tensor + 1 for name, tensor in before.weights.items()}
    config = replace(
        before.config,
        dropout=replace(before.config.dropout, dropout=0.3, feature_grad_mult=0.25, encoder_layerdrop=0.05),
        mask=replace(before.config.mask, mask_prob=0.5, mask_length=7, no_mask_overlap=True),
        objective=replace(
            before.config.objective, num_negatives=17, latent_temp=(1.5, 0.25, 0.9), loss_weights=(0.2, 3.0)
        ),
    )
    native.write(tmp_path / "a.pt", replace(before, config=config, optimizer=optimizer, averaged=averaged))
    converted(tmp_path / "a.pt", tmp_path / "there", program)
    back = converted(tmp_path / "there", tmp_path / "back.pt", "native")
    for section in ("model", "dropout", "mask", "objective"):
        assert getattr(back.config, section) == getattr(config, section)
    assert (back.step, back.best, back.epoch) == (40, 2.5, 3)
    assert back.optimizer.keys() == optimizer.keys()
    for name, entry in optimizer.items():
        assert back.optimizer[name]["step"] == 40
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(back.optimizer[name][moment], entry[moment]), name
    same_weights(back.averaged, averaged)


def test_what_hugging_face_has_no_place_for_is_told(tmp_path, capsys):
    before = pretrained(step=40, best=2.5)
    averaged = {name: tensor + 1 for name, tensor in before.weights.items()}
    state = replace(before, optimizer=adam(before.weights, 40), averaged=averaged)
    native.write(tmp_path / "a.pt", state)
    there = converted(tmp_path / "a.pt", tmp_path / "there", "huggingface")
    same_weights(there.weights, averaged)  # what inference and fine-tuning take, too
    told = capsys.readouterr().out
    for what in ("optimizer state", "count of updates", "weights that are not averaged"):
        assert f"note: huggingface has no place for the {what}" in told
    there = converted(tmp_path / "a.pt", tmp_path / "own", "huggingface", "--no_ema")
    same_weights(there.weights, before.weights)
    assert "no place for the averaged weights" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("program", OTHERS)
def test_16_bit_weights_stay_16_bit_and_are_exact_in_32(tmp_path, program, dtype):
    before = finetuned()
    short = {name: tensor.to(dtype) for name, tensor in before.weights.items()}
    WRITERS[program](tmp_path / "there", replace(before, weights=short))
    other = "nvidia" if program == "fairseq" else "fairseq"
    same_weights(converted(tmp_path / "there", tmp_path / "other", other).weights, short)
    back = converted(tmp_path / "there", tmp_path / "back.pt", "native")
    same_weights(back.weights, {name: tensor.float() for name, tensor in short.items()})


def test_a_quantizer_is_needed_by_hugging_face_alone(tmp_path):
    architecture = replace(MODEL, quantize_targets=False)
    before = pretrained(architecture)
    native.write(tmp_path / "a.pt", before)
    for program in ("fairseq", "nvidia"):
        converted(tmp_path / "a.pt", tmp_path / program, program)
        back = converted(tmp_path / program, tmp_path / f"{program}.pt", "native")
        same_weights(back.weights, before.weights)
        assert not back.config.model.quantize_targets
    with pytest.raises(CheckpointError, match="--to huggingface: .*quantizer"):
        converted(tmp_path / "a.pt", tmp_path / "there", "huggingface")


def careless_weight(contents: Contents) -> Contents:
    """One number of one bias is another one."""
    weights = dict(contents.weights)
    weights["w2v.encoder.layers.1.fc2.bias"] = weights["w2v.encoder.layers.1.fc2.bias"].clone()
    weights["w2v.encoder.layers.1.fc2.bias"][0] += 0.001
    return replace(contents, weights=weights)


def careless_option(contents: Contents) -> Contents:
    """The weights are right, but the heads are cut otherwise."""
    model = replace(contents.config.model, encoder_attention_heads=2)
    return replace(contents, config=replace(contents.config, model=model))


@pytest.mark.parametrize("careless", [careless_weight, careless_option])
def test_a_writer_that_changes_the_smallest_thing_is_found_and_leaves_no_output(
    tmp_path, monkeypatch, capsys, careless
):
    native.write(tmp_path / "a.pt", finetuned())
    write = WRITERS["fairseq"]
    monkeypatch.setitem(WRITERS, "fairseq", lambda path, contents: write(path, careless(contents)))
    with pytest.raises(CheckpointError, match=r"--to fairseq: .*; nothing was written"):
        converted(tmp_path / "a.pt", tmp_path / "there", "fairseq")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert "largest difference on one waveform: " in capsys.readouterr().out


@pytest.mark.parametrize("program", list(WRITERS))
def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch, program):
    native.write(tmp_path / "a.pt", finetuned())
    write = WRITERS[program]

    def dying(path: Path, contents: Contents) -> None:
        write(path, contents)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setitem(WRITERS, program, dying)
    with pytest.raises(DataError, match="cannot be written"):
        converted(tmp_path / "a.pt", tmp_path / "there", program)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_fairseq_gets_its_dictionary_beside_the_file(tmp_path):
    native.write(tmp_path / "a.pt", finetuned())
    converted(tmp_path / "a.pt", tmp_path / "out" / "there.pt", "fairseq")
    lines = (tmp_path / "out" / "dict.ltr.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == list(SYMBOLS[4:])
    content = torch.load(tmp_path / "out" / "there.pt", weights_only=True)
    assert content["cfg"]["task"]["data"] == str(tmp_path / "out")
    converted(tmp_path / "a.pt", tmp_path / "out" / "again.pt", "fairseq")  # the same dictionary is no obstacle
    other = finetuned(labels=(*SYMBOLS[:-1], "X"))
    native.write(tmp_path / "b.pt", other)
    with pytest.raises(ConfigError, match=r"dict\.ltr\.txt: is another model's dictionary"):
        converted(tmp_path / "b.pt", tmp_path / "out" / "b.pt", "fairseq")
    assert not (tmp_path / "out" / "b.pt").exists()


def test_the_next_epoch_is_told_where_one_has_ended(tmp_path, capsys):
    plan = {"utterances": 9, "sub_batches": 9, "sub_batches_per_update": 2, "seed": 1}  # 4 updates per epoch
    for position, epoch in ((3, 2), (4, 3)):
        before = pretrained(step=8, loader={"epoch": 2, "position": position, **plan})
        native.write(tmp_path / f"{position}.pt", before)
        for program in ("fairseq", "nvidia"):
            there = converted(tmp_path / f"{position}.pt", tmp_path / f"{position}.{program}", program)
            assert there.epoch == epoch
        assert ("the position within the epoch" in capsys.readouterr().out) == (position == 3)


def test_options_without_a_place_are_told(tmp_path, capsys):
    before = pretrained(step=8)
    optim = OptimConfig(lr_policy="noam", warmup_updates=10, ema=0.9)
    config = replace(before.config, optim=optim, data=DataConfig(num_concat_batches=4, update_freq=2))
    native.write(tmp_path / "a.pt", replace(before, config=config))
    there = converted(tmp_path / "a.pt", tmp_path / "there.pt", "fairseq")
    assert there.config.data.update_freq == 8
    told = capsys.readouterr().out
    assert "no place for this curve of the learning rate (--lr_policy noam)" in told
    assert "no place for the decay of the averaged weights" in told


def test_a_dictionary_names_the_symbols_of_a_file_without(tmp_path):
    before = finetuned()
    WRITERS["fairseq"](tmp_path / "a.pt", replace(before, labels=None))
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in SYMBOLS[4:]))
    for program in ("nvidia", "huggingface"):
        with pytest.raises(CheckpointError, match=f"--to {program}: .*--dictionary"):
            converted(tmp_path / "a.pt", tmp_path / program, program)
        there = converted(
            tmp_path / "a.pt", tmp_path / program, program, "--dictionary", str(tmp_path / "dict.ltr.txt")
        )
        assert there.labels == SYMBOLS


def test_mistakes_of_the_user_name_what_to_do(tmp_path, capsys):
    native.write(tmp_path / "a.pt", finetuned())
    with pytest.raises(ConfigError, match="--no_ema: has an effect only with"):
        converted(tmp_path / "a.pt", tmp_path / "b.pt", "fairseq", "--no_ema")
    with pytest.raises(ConfigError, match="is the name of the dictionary"):
        converted(tmp_path / "a.pt", tmp_path / "dict.ltr.txt", "fairseq")
    broken = finetuned()
    broken.weights["proj.bias"][1] = float("nan")
    native.write(tmp_path / "nan.pt", broken)
    with pytest.raises(CheckpointError, match=r"nan\.pt: holds weights that are not finite: proj\.bias"):
        converted(tmp_path / "nan.pt", tmp_path / "b.pt", "fairseq")
    native.write(tmp_path / "pre.pt", pretrained())
    with pytest.raises(DataError, match="is a pre-trained model without output layer"):
        converted(tmp_path / "pre.pt", tmp_path / "b.pt", "fairseq", "--dictionary", str(tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match="none"):
        inspect_checkpoint.main([str(tmp_path / name) for name in ("none.pt", "a.pt")])
    assert "fine-tuned (CTC)" in capsys.readouterr().out  # one bad file does not hide the others
    with pytest.raises(ConfigError, match="is there already; remove it or name another"):
        converted(tmp_path / "a.pt", tmp_path / "a.pt", "native")
    with pytest.raises(CheckpointError, match="there is no such file"):
        converted(tmp_path / "none.pt", tmp_path / "b.pt", "native")
    with pytest.raises(CheckpointError, match=r"is a folder without config\.json"):
        converted(tmp_path, tmp_path / "b.pt", "native")


@pytest.mark.parametrize("program", list(WRITERS))
def test_inspection_says_what_a_file_is(tmp_path, capsys, program):
    before = finetuned(LARGE, step=40)
    WRITERS[program](tmp_path / "model", before)
    inspect_checkpoint.main([str(tmp_path / "model")])
    lines = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    lines = {topic: text.strip() for topic, text in lines.items()}
    assert lines["format"] == program
    assert lines["kind"] == "fine-tuned (CTC)"
    assert lines["output symbols"] == "9: " + " ".join(SYMBOLS)
    assert lines["audio"] == "16000 Hz, normalised"
    assert lines["transformer"].startswith(
        "2 layers, width 24, feed-forward 48, 4 heads, pre-LN, positional convolution 8"
    )
    assert lines["feature extractor"].startswith("7 blocks ")
    assert lines["feature extractor"].endswith("layer norm in every block, biases")
    number = sum(tensor.numel() for tensor in before.weights.values())
    assert f"weights: {number / 1e6:.2f} M float32" in lines["size"]
    assert "optimizer state" in lines["missing"]
    if program != "huggingface":
        assert lines["training"].startswith("40 updates")


def test_inspection_tells_what_is_missing(tmp_path, capsys):
    architecture = replace(HOURGLASS, quantize_targets=False)
    before = pretrained(architecture, step=7, best=1.25, loader={"epoch": 2, "position": 3})
    native.write(tmp_path / "a.pt", replace(before, optimizer=adam(before.weights, 7)))
    WRITERS["fairseq"](tmp_path / "b.pt", finetuned(labels=None))
    inspect_checkpoint.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")])
    told = capsys.readouterr().out
    for text in (
        "1 + 1 + 1 layers, the middle ones at 1/3 of the frame rate (Hourglass, naive)",
        "none by design",
        "7 updates, epoch 2, best validation result 1.25",
        f"moments of {len(before.weights)} weights",
        "nothing",
        "9, not named",
        "symbols of the output layer, optimizer state",
    ):
        assert text in told, text
