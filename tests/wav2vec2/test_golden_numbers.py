"""The toolkit against a slow second implementation, and against its stored numbers (tests/golden_cases.py)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from golden_adapter import make_batch
from golden_cases import (
    CASES,
    LABELS,
    LENGTHS,
    MASKED,
    STORED,
    SYMBOLS,
    TEMPERATURE,
    Case,
    audio,
    codes,
    digest,
    hidden_channels,
    mask,
    negatives,
    noise,
    slow_ctc,
    slow_numbers,
    weights,
)
from tiny_model import NO_DROPOUT
from torch.nn.utils.rnn import pad_sequence

from wav2vec2.convert.contents import PRETRAINING_HEADS
from wav2vec2.criterion import Negatives
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.task import FinetuneTask, PretrainTask

Array = np.ndarray


def tensors(case: Case, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    trunk = {name: value for name, value in weights(case.model).items() if not name.startswith("proj.")}
    return {prefix + name: torch.tensor(value, dtype=dtype) for name, value in trunk.items()}


def padded(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms [B, S] and their padding mask."""
    audio_BS = pad_sequence([torch.tensor(row, dtype=dtype) for row in audio()], batch_first=True)
    return audio_BS, torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]


def loss_of(case: Case, dtype: torch.dtype) -> tuple[Wav2Vec2Model, Any, tuple[Any, Any, Any]]:
    """The model, its batch, and what the task gives for it."""
    model = Wav2Vec2Model(case.model, NO_DROPOUT).to(dtype).eval()
    model.load_state_dict(tensors(case, dtype))
    audio_BS, padding_BS = padded(dtype)
    batch = make_batch(model, audio_BS, padding_BS, torch.tensor(mask(model.num_frames(max(LENGTHS)))))
    frames = negatives(case)
    across = case.objective.cross_sample_negatives > 0
    if not across:
        frames = frames - np.arange(len(LENGTHS))[:, None, None] * MASKED
    drawn_codes = torch.tensor(codes(case)) if case.objective.codebook_negatives else None
    drawn_noise = None
    if case.noisy:
        drawn_noise = torch.tensor(noise(case.model.latent_groups, case.model.latent_vars), dtype=dtype)
        model.quantizer.temperature = TEMPERATURE
    task = PretrainTask(model, case.objective, seed=1, reference_padding=case.leaking)
    return model, batch, task.losses(batch, drawn_noise, [Negatives(torch.tensor(frames), across, drawn_codes)])


def found_numbers(case: Case, dtype: torch.dtype) -> dict[str, Array]:
    model, batch, (total, stats, (part,)) = loss_of(case, dtype)
    lengths_B = batch.lengths_B
    encoded = model(
        batch.audio_BS, lengths_B, norm_lengths_B=None if case.leaking else lengths_B, mask_BT=batch.mask_BT
    )
    valid_BT = torch.arange(encoded.x.shape[1]) < torch.tensor(batch.frame_lengths)[:, None]
    found = {
        "conv_features": encoded.conv_features_BTC[valid_BT],
        "features": encoded.features_BTC[valid_BT],
        "encoded": encoded.x[valid_BT],
        "logits": part.logits_bMN.flatten(0, 1),
        "contrastive": stats["loss_0"],
        "penalty": stats["loss_2"],
        "total": total,
    }
    if part.quantized is not None:
        perplexities = {name: stats[name] / batch.num_masked for name in ("code_perplexity", "prob_perplexity")}
        found |= {"codes": part.quantized.codes_RG, "diversity": stats["loss_1"], **perplexities}
    return {name: value.detach().numpy() for name, value in found.items()}


def found_ctc(case: Case, dtype: torch.dtype) -> dict[str, Array]:
    model = Wav2Vec2Ctc(case.model, NO_DROPOUT, num_symbols=SYMBOLS).to(dtype).eval()
    output = {name: torch.tensor(weights(case.model)[name], dtype=dtype) for name in ("proj.weight", "proj.bias")}
    heads = tuple(f"w2v.{head}" for head in PRETRAINING_HEADS)
    trunk = {name: value for name, value in tensors(case, dtype, "w2v.").items() if not name.startswith(heads)}
    model.load_state_dict(trunk | output)
    audio_BS, padding_BS = padded(dtype)
    labels_BL = pad_sequence([torch.tensor(row) for row in LABELS], batch_first=True, padding_value=1)
    batch = make_batch(
        model.w2v,
        audio_BS,
        padding_BS,
        torch.tensor(mask(model.w2v.num_frames(max(LENGTHS)))),
        channel_mask_BD=torch.tensor(hidden_channels()),
        labels_BL=labels_BL,
        label_lengths=tuple(map(len, LABELS)),
    )
    total, _, logits_BTK = FinetuneTask(model, seed=1, reference_padding=case.leaking).losses(batch)
    logits = torch.cat([row[:frames] for row, frames in zip(logits_BTK, batch.frame_lengths, strict=True)])
    return {"ctc_logits": logits.detach().numpy(), "ctc": total.detach().numpy()}


TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}


def assert_equal(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_pretraining_equals_the_slow_implementation(name, dtype):
    assert_equal(found_numbers(CASES[name], dtype), slow_numbers(CASES[name]), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_ctc_equals_the_slow_implementation(name, dtype):
    assert_equal(found_ctc(CASES[name], dtype), slow_ctc(CASES[name]), TOLERANCES[dtype])


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_that_are_stored(name):
    """Both implementations could change together; these numbers do not."""
    case, stored = CASES[name], json.loads(STORED.read_text())[name]
    for numbers in (
        {**slow_numbers(case), **slow_ctc(case)},
        {**found_numbers(case, torch.float64), **found_ctc(case, torch.float64)},
    ):
        assert numbers.keys() == stored.keys()
        for key, value in stored.items():
            np.testing.assert_allclose(digest(numbers[key]), value, rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].noisy])
def test_the_gradient_is_the_slope_of_the_slow_loss(name):
    """Along one direction through all weights; with noise the choice of codes has a gradient that is no slope."""
    case = CASES[name]
    model, _, (total, _, _) = loss_of(case, torch.float64)
    total.backward()
    direction = {key: np.cos(1e3 * value) for key, value in weights(case.model).items()}
    slope = sum(float((p.grad * torch.tensor(direction[key])).sum()) for key, p in model.named_parameters())
    step = 1e-6
    ends = [
        slow_numbers(case, {key: value + sign * step * direction[key] for key, value in weights(case.model).items()})
        for sign in (1, -1)
    ]
    assert slope == pytest.approx((ends[0]["total"] - ends[1]["total"]) / (2 * step), rel=1e-5)
