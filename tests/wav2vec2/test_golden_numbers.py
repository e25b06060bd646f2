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
from wav2vec2.attention import valid_positions
from wav2vec2.config import ObjectiveConfig
from wav2vec2.criterion import Negatives, ctc_losses
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


def gradient(model: Any, name: str) -> Tensor:
    """The gradient of a parameter under its original name."""
    letter = re.search(r"self_attn\.([qkv])_proj", name)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if letter:
        return model.get_parameter(re.sub("[qkv]_proj", "qkv_proj", name)).grad.chunk(3)["qkv".index(letter[1])]
    return model.get_parameter(name).grad


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
    loss, stats = task.losses(batch, noise, [Negatives(negatives, False)])
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
    loss, stats = task.losses(batch, None, [Negatives(frames, across, codes)])
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
