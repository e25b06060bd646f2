"""The model and the pre-training loss against numbers of the original implementation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from original_weights import RENAMED, load
from torch import Tensor

from common.data.collate import Batch, SubBatch
from common.precision import MixedPrecisionOptimizer
from common.schedules import make_schedule
from wav2vec2.config import ObjectiveConfig
from wav2vec2.criterion import Negatives, ctc_losses
from wav2vec2.norms import valid_positions
from wav2vec2.task import PretrainTask

MODELS = [
    ("golden", "base_tiny"),
    ("golden", "large_tiny"),
    ("golden_nvidia", "plain_tiny"),
    ("golden_nvidia", "hourglass_tiny"),
    ("golden_nvidia", "hourglass_linear_tiny"),
]


def settings(folder: Path, name: str) -> dict[str, Any]:
    case = json.loads((folder / "manifest.json").read_text())["models"][name]
    extra = {key: case[key] for key in ("hourglass_transformer", "hourglass_resample") if case.get(key)}
    return {**case["model"], **extra}


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_encoder_equals_the_original_and_rows_do_not_see_their_padding(shared, family, name):
    folder = shared(family)
    model = load(folder / name / "pretrain.pt", settings(folder, name))
    golden = read(folder / name / "features.pt")
    batches = read(folder / "batches.pt") if family == "golden_nvidia" else golden
    unpadded = model(batches["unpadded"]["source"])
    assert_close(unpadded.conv_features_BCT, golden["unpadded"]["conv_features"])
    assert_close(unpadded.x_BTD, golden["unpadded"]["x"])
    padded = batches["padded"]
    valid_BT = valid_positions(model.num_frames(padded["lengths"]), golden["padded"]["x"].shape[1])
    if not model.encoder.has_hourglass:  # the original lets padding into the last pooled frame
        leaking = model(padded["source"], padded["lengths"])
        assert_close(leaking.x_BTD[valid_BT], golden["padded"]["x"][valid_BT])
    own = model(padded["source"], padded["lengths"], norm_lengths_B=padded["lengths"])
    for row, valid_T in enumerate(valid_BT):
        assert_close(own.x_BTD[row, valid_T], golden[f"alone{row}"]["x"][0])


def golden_batch(model: Any, case: dict[str, Tensor], mask_BT: Tensor) -> Batch:
    rows, samples = case["source"].shape
    lengths_B = case.get("lengths", torch.full((rows,), samples))
    frames = model.num_frames(samples)
    return Batch(
        ids=tuple(map(str, range(rows))),
        audio_BS=case["source"],
        lengths_B=lengths_B,
        padded=bool((lengths_B < samples).any()),
        sub_batches=(SubBatch(rows, samples, int(mask_BT[0].sum()), 0, frames),),
        num_samples=int(lengths_B.sum()),
        frame_lengths=tuple(model.num_frames(lengths_B).tolist()),
        mask_BT=mask_BT,
        masked_R=mask_BT.flatten().nonzero().flatten(),
    )


def place(name: str) -> tuple[str, int | None]:
    """Our name of an original parameter, and its part of q, k and v where they are stacked."""
    letter = re.search(r"self_attn\.([qkv])_proj", name)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"self_attn\.[qkv]_proj", "self_attn.qkv_proj", name), "qkv".index(letter[1]) if letter else None


def weight(model: Any, name: str) -> Tensor:
    """A parameter under its original name."""
    ours, part = place(name)
    whole = model.get_parameter(ours).detach()
    return whole if part is None else whole.chunk(3)[part]


def gradient(model: Any, name: str) -> Tensor:
    """The gradient of a parameter under its original name."""
    ours, part = place(name)
    whole = model.get_parameter(ours).grad
    return whole if part is None else whole.chunk(3)[part]


@pytest.mark.parametrize("case", ["padded_eval", "unpadded_eval", "padded_gumbel"])
@pytest.mark.parametrize("name", ["base_tiny", "large_tiny"])
def test_pretraining_loss_and_gradients_equal_the_original(shared, name, case):
    folder = shared("golden") / name
    model = load(folder / "pretrain.pt", settings(folder.parent, name))
    tensors, numbers = (
        read(folder / "pretrain_golden.pt")[case],
        json.loads((folder / "pretrain_golden.json").read_text()),
    )
    numbers = numbers[case]
    batch = golden_batch(model, read(folder / "features.pt")[case.split("_")[0]], tensors["mask_indices"])
    masked = batch.sub_batches[0].masked
    negatives = tensors["neg_idxs"].view(batch.num_rows, masked, -1)
    negatives = negatives - torch.arange(batch.num_rows)[:, None, None] * masked
    noise = tensors.get("gumbel_noise")
    if noise is not None:
        noise = noise.view(-1, model.quantizer.groups, model.quantizer.codes)
        model.quantizer.temperature = numbers["gumbel_tau"]
    task = PretrainTask(model, ObjectiveConfig(loss_weights=(0.1, 10.0)), seed=1, reference_padding=True)
    loss, stats, _ = task.losses(batch, noise, [Negatives(negatives, False)])
    loss.backward()
    for key, golden_key in (
        ("loss", "total_loss"),
        ("loss_0", "contrastive_loss_sum"),
        ("loss_1",) * 2,
        ("loss_2",) * 2,
    ):
        assert float(stats[key]) == pytest.approx(numbers[golden_key], rel=2e-5)
    assert int(stats["correct"]) == numbers["correct"]
    for key in ("code_perplexity", "prob_perplexity"):
        assert float(stats[key]) / batch.num_masked == pytest.approx(numbers[key], rel=2e-5)
    for parameter, expected in tensors["grads"].items():
        assert (gradient(model, parameter) - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6


VARIANTS = ["cross_sample", "cross_only", "from_everywhere", "codebook"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_kinds_of_negatives_equal_the_original(shared, variant):
    folder = shared("golden") / "base_tiny"
    model = load(folder / "pretrain.pt", settings(folder.parent, "base_tiny"))
    golden = read(folder / "pretrain_golden.pt")
    expected = json.loads((folder / "pretrain_golden.json").read_text())["variants"][variant]
    options = {"num_negatives" if key == "n_negatives" else key: value for key, value in expected["settings"].items()}
    objective = ObjectiveConfig(**options)
    batch = golden_batch(model, read(folder / "features.pt")["padded"], golden["padded_eval"]["mask_indices"])
    sub = batch.sub_batches[0]
    frames = golden["variants"][variant]["neg_idxs"].view(sub.rows, sub.masked, -1)
    across = objective.cross_sample_negatives > 0
    if not across:
        per_row = sub.frames if objective.negatives_from_everywhere else sub.masked
        frames = frames - torch.arange(sub.rows)[:, None, None] * per_row
    codes = None
    if objective.codebook_negatives:
        # the original reads its block [B * M, n] again as [n, B, M]
        index = golden["variants"][variant]["codebook_sample_idx"].view(-1, sub.rows, sub.masked).permute(1, 2, 0)
        size = model.quantizer.codes
        codes = torch.stack([index // size**power % size for power in reversed(range(model.quantizer.groups))], -1)
    task = PretrainTask(model, objective, seed=1, reference_padding=True)
    loss, stats, _ = task.losses(batch, None, [Negatives(frames, across, codes)])
    assert loss.item() == pytest.approx(expected["total_loss"], rel=2e-5)
    assert int(stats["correct"]) == expected["correct"]


@pytest.mark.parametrize("name", ["base_tiny", "large_tiny"])
def test_ctc_losses_equal_the_original(shared, name):
    folder = shared("golden") / name
    model = load(folder / "ctc.pt", settings(folder.parent, name))
    case = read(folder / "features.pt")["padded"]
    golden = read(folder / "ctc_golden.pt")["padded_eval"]
    logits_BTK, frame_lengths_B = model(case["source"], case["lengths"])
    valid_BT = valid_positions(frame_lengths_B, logits_BTK.shape[1])
    assert_close(logits_BTK[valid_BT], golden["encoder_out"].transpose(0, 1)[valid_BT])
    losses_B = ctc_losses(logits_BTK, frame_lengths_B, golden["target"], golden["target_lengths"])
    torch.testing.assert_close(losses_B, golden["per_utt_loss"], atol=2e-5, rtol=2e-5)


CONCATENATED = ["plain_tiny", "hourglass_tiny", "hourglass_linear_tiny"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CONCATENATED)
def test_joined_sub_batches_give_the_sum_of_separate_ones(shared, name, mode):
    folder = shared("golden_nvidia")
    model = load(folder / name / "pretrain.pt", settings(folder, name))
    golden, numbers = read(folder / name / "concat.pt"), json.loads((folder / name / "concat.json").read_text())
    source = read(folder / "batches.pt")["concat"]["source"]
    sizes, masked = golden["sub_batch_sizes"].tolist(), golden["masked_per_row"].tolist()
    mask_BT = torch.cat([golden[f"mask_indices.{part}"] for part in range(3)])
    frames = mask_BT.shape[1]
    batch = Batch(
        ids=tuple(map(str, range(6))),
        audio_BS=source,
        lengths_B=torch.full((6,), source.shape[1]),
        padded=False,
        sub_batches=tuple(SubBatch(sizes[i], source.shape[1], masked[i], i, frames) for i in range(3)),
        num_samples=source.numel(),
        frame_lengths=(frames,) * 6,
        mask_BT=mask_BT,
        masked_R=mask_BT.flatten().nonzero().flatten(),
    )
    negatives = [
        Negatives(
            golden[f"neg_idxs.{i}"].view(sizes[i], masked[i], -1) - torch.arange(sizes[i])[:, None, None] * masked[i],
            False,
        )
        for i in range(3)
    ]
    noise = None
    if mode == "train":
        shape = (-1, model.quantizer.groups, model.quantizer.codes)
        noise = torch.cat([golden[f"gumbel_noise.{i}"].view(shape) for i in range(3)])
        model.quantizer.temperature = numbers.get("gumbel_tau") or numbers["train"]["gumbel_tau"]
    loss, stats, results = PretrainTask(model, ObjectiveConfig(), seed=1).losses(batch, noise, negatives)
    expected = numbers[mode]["separate_sum"]
    for key, golden_key in (("loss_0", "contrastive_loss_sum"), ("loss_1",) * 2, ("loss_2",) * 2):
        assert float(stats[key]) == pytest.approx(expected[golden_key], rel=2e-5)
    assert int(stats["correct"]) == expected["correct"]
    for part, result in enumerate(results):
        codes = golden[mode][f"codes.{part}"]
        assert torch.equal(result.quantized.codes_RG.view(codes.shape), codes)
    if mode == "train":
        loss.backward()
        for parameter, value in golden[mode]["grads_separate_sum"].items():
            assert (gradient(model, parameter) - value).abs().max() <= 1e-4 * value.abs().max() + 1e-6


@pytest.mark.parametrize("run", ["noclip", "clip"])
@pytest.mark.parametrize("name", ["base_tiny", "large_tiny"])
def test_updates_equal_those_of_the_original_trainer(shared, name, run):
    folder = shared("golden") / name
    tensors, numbers = read(folder / "train_steps.pt"), json.loads((folder / "train_steps.json").read_text())
    features, options = read(folder / "features.pt")["padded"], settings(folder.parent, name)
    model = load(folder / "pretrain.pt", options).train()
    config = numbers[run].get("config") or numbers["config"]
    objective = ObjectiveConfig(loss_weights=tuple(config["loss_weights"]), latent_temp=tuple(options["latent_temp"]))
    task = PretrainTask(model, objective, seed=1, reference_padding=True)
    adam = {"betas": tuple(config["adam_betas"]), "eps": config["adam_eps"], "weight_decay": config["weight_decay"]}
    optimizer = MixedPrecisionOptimizer({"all": list(model.named_parameters())}, **adam)
    schedule = make_schedule(
        "poly",
        lr=config["lr"],
        warmup_updates=config["warmup_updates"],
        max_update=config["total_num_update"],
        final_lr_scale=config["end_learning_rate"] / config["lr"],
        power=config["power"],
    )
    for step, update in enumerate(numbers[run]["updates"]):
        given = tensors[run][f"update{update['update']}"]
        task.set_step(step)
        assert model.quantizer.temperature == pytest.approx(update["temp"], rel=1e-6)
        batches = [micro_batch(model, features, tensors["batches"][f"batch{index}"]) for index in update["batches"]]
        for micro, (batch, expected) in enumerate(zip(batches, update["losses"], strict=True)):
            masked = batch.sub_batches[0].masked
            negatives = given[f"neg_idxs.{micro}"].view(batch.num_rows, masked, -1)
            negatives = negatives - torch.arange(batch.num_rows)[:, None, None] * masked
            noise = given[f"gumbel_noise.{micro}"].view(-1, model.quantizer.groups, model.quantizer.codes)
            loss, _, _ = task.losses(batch, noise, [Negatives(negatives, False)])
            assert loss.item() == pytest.approx(expected, rel=2e-5)
            optimizer.backward(loss / task.count_units(batches))
        norm = optimizer.clip_grad_norm(config["clip_norm"])
        assert norm.item() == pytest.approx(update["grad_norm_before_clip"], rel=1e-4)
        assert schedule(step) == pytest.approx(update["lr_used"], rel=1e-6)
        optimizer.step(schedule(step))
        for parameter, value in given["params"].items():
            torch.testing.assert_close(weight(model, parameter), value, atol=5e-6, rtol=5e-6)


def micro_batch(model: Any, features: dict[str, Tensor], stored: dict[str, Any]) -> Batch:
    rows, samples = torch.as_tensor(stored["rows"]), int(stored["samples"])
    case = {"source": features["source"][rows, :samples], "lengths": features["lengths"][rows].clamp(max=samples)}
    return golden_batch(model, case, stored["mask_indices"])
