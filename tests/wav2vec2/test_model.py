"""Properties of the model that need no golden numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_model import HOURGLASS, LARGE, MODEL, NO_DROPOUT

from common.errors import ConfigError
from wav2vec2.config import ModelConfig
from wav2vec2.model import (
    Downsample,
    GumbelQuantizer,
    ScaleGradient,
    Upsample,
    Wav2Vec2Ctc,
    Wav2Vec2Model,
    num_frames,
)

PUBLISHED = ModelConfig().conv_layers()
VARIANTS = {
    "base": MODEL,
    "large": LARGE,
    "hourglass": HOURGLASS,
    "linear": replace(HOURGLASS, hourglass_resample="linear"),
    "no_layers_around": replace(MODEL, hourglass_transformer="[0,(2,4),0]"),
    "odd_kernel": replace(MODEL, conv_pos=7),
}


def build(config: ModelConfig) -> Wav2Vec2Model:
    torch.manual_seed(0)
    return Wav2Vec2Model(config, NO_DROPOUT).eval()


@pytest.mark.parametrize(("samples", "frames"), [(399, 0), (400, 1), (719, 1), (720, 2), (16000, 49), (250000, 781)])
def test_frames_of_a_waveform_are_those_of_the_convolutions(samples, frames):
    assert num_frames(samples, PUBLISHED) == frames
    assert num_frames(np.array([samples]), PUBLISHED).tolist() == [frames]
    if frames:
        x = torch.zeros(1, 1, samples)
        for _, kernel, stride in PUBLISHED:
            x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
        assert x.shape[-1] == frames


def test_no_length_below_the_receptive_field_gives_a_frame():
    assert all(num_frames(samples, PUBLISHED) < 1 for samples in range(400))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[4000, 2500, 400], [5321, 5320, 1999, 720]])
def test_a_row_gives_the_same_alone_as_in_a_padded_batch(name, lengths):
    model = build(VARIANTS[name]).double()
    audio = torch.randn(len(lengths), max(lengths), dtype=torch.float64)
    audio[1] += 100 * torch.arange(max(lengths))  # padding must not matter, whatever stands there
    sizes = torch.tensor(lengths)
    batched = model(audio, sizes, norm_lengths_B=sizes)
    for row, size in enumerate(lengths):
        alone = model(audio[row : row + 1, :size])
        frames = alone.x.shape[1]
        torch.testing.assert_close(batched.x[row, :frames], alone.x[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_resampling_keeps_constants_and_lengths(factor):
    x = torch.randn(2, 1, 3).expand(2, 4 * factor, 3)
    torch.testing.assert_close(Upsample(3, factor, "naive")(Downsample(3, factor, "naive")(x)), x)
    linear = Upsample(3, factor, "linear")(Downsample(3, factor, "linear")(x))
    assert linear.shape == x.shape


def test_hourglass_of_factor_one_is_a_residual_around_its_middle_layers():
    model = build(replace(MODEL, hourglass_transformer="[0,(2,1),0]"))
    plain = build(MODEL)
    state = {k.replace("hourglass_layers", "layers"): v for k, v in model.state_dict().items()}
    plain.load_state_dict(state)
    audio = torch.randn(2, 3000)
    inputs = []
    plain.encoder.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected = plain(audio).x
    torch.testing.assert_close(model(audio).x, inputs[0] + expected)


def test_hourglass_with_pre_norm_is_refused():
    with pytest.raises(ConfigError, match="--hourglass_transformer"):
        replace(HOURGLASS, layer_norm_first=True)


@pytest.mark.parametrize("text", ["[1,(2,0),1]", "[1,2,1]", "__import__('os').abort()", "[1,(0,2),1]", "2,(8,4),2"])
def test_malformed_hourglass_is_refused_without_evaluating_it(text):
    with pytest.raises(ConfigError, match="--hourglass_transformer"):
        replace(MODEL, hourglass_transformer=text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[(512,10)]",
        "[(1,2,3)]*1000000000",
        "__import__('os').abort()",
        "[(1,2,0)]",
        "(" * 5000,
        "[(1,2,'3')]",
    ],
)
def test_malformed_conv_layers_are_refused_without_evaluating_them(text):
    with pytest.raises(ConfigError, match="--conv_feature_layers"):
        replace(MODEL, conv_feature_layers=text)


def test_conv_layers_are_read_as_python_would():
    text = "[(512,10,5)]+[(512,3,2)]*4+[(512,2,2)]*2"
    assert ModelConfig(conv_feature_layers=text).conv_layers() == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


def test_masked_frames_are_replaced_and_channels_zeroed_before_the_encoder():
    model = build(MODEL)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    audio = torch.randn(2, 2000)
    frames = model.num_frames(2000)
    mask = torch.zeros(2, frames, dtype=torch.bool)
    mask[0, 2] = True
    channels = torch.zeros(2, 24, dtype=torch.bool)
    channels[1, 7] = True
    model(audio)
    model(audio, mask_BT=mask, channel_mask_BD=channels)
    before, after = seen
    torch.testing.assert_close(after[0, 2], model.mask_emb)
    assert (after[1, :, 7] == 0).all()
    changed = (before != after).any(-1)
    assert changed[0].nonzero().tolist() == [[2]]


def test_gradient_of_the_extractor_is_scaled():
    x = torch.randn(5, requires_grad=True)
    ScaleGradient.apply(x, 0.1).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), 0.1))


def test_feature_grad_mult_zero_freezes_the_extractor_only():
    model = Wav2Vec2Model(MODEL, replace(NO_DROPOUT, feature_grad_mult=0.0))
    model(torch.randn(1, 2000)).x.sum().backward()
    assert all(p.grad is None for p in model.feature_extractor.parameters())
    assert model.layer_norm.weight.grad is not None


def test_a_dropped_layer_is_the_identity_with_zero_gradients():
    model = build(MODEL).train()
    audio = torch.randn(1, 3000)
    inputs = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.encoder.kept = [True, False]
    output = model(audio).x
    torch.testing.assert_close(output, model.encoder.layers[0](inputs[0]))
    output.sum().backward()
    gradients = [p.grad for p in model.encoder.layers[1].parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_all_layers_take_part_in_evaluation():
    model = build(MODEL)
    audio = torch.randn(1, 3000)
    expected = model(audio).x
    model.encoder.kept = [False, False]
    torch.testing.assert_close(model(audio).x, expected)


def test_quantizer_without_noise_takes_the_most_likely_code_of_every_group():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(6, groups=3, codes=5, outputs=12)
    x = torch.randn(7, 6)
    found = quantizer(x)
    logits = (x @ quantizer.weight_proj.weight.T + quantizer.weight_proj.bias).view(7, 3, 5)
    book = quantizer.vars.view(3, 5, 4)
    expected = torch.stack([torch.cat([book[g, logits[r, g].argmax()] for g in range(3)]) for r in range(7)])
    torch.testing.assert_close(found.vectors_RD, expected)
    torch.testing.assert_close(quantizer.look_up(found.codes_RG), expected)


def test_quantizer_gradient_is_that_of_the_soft_choice():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(6, groups=2, codes=5, outputs=4).double()
    quantizer.temperature = 0.7
    x = torch.randn(3, 6, dtype=torch.float64)
    noise = torch.randn(3, 2, 5, dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (quantizer(x, noise).vectors_RD * weight).sum().backward()
    found = quantizer.weight_proj.weight.grad.clone()
    quantizer.zero_grad()
    soft = torch.softmax((quantizer.weight_proj(x).view(3, 2, 5) + noise) / 0.7, -1)
    (torch.einsum("rgv,gvd->rgd", soft, quantizer.vars.detach().view(2, 5, 2)).flatten(1) * weight).sum().backward()
    torch.testing.assert_close(found, quantizer.weight_proj.weight.grad)


def test_joint_codes_number_all_combinations():
    quantizer = GumbelQuantizer(2, groups=2, codes=3, outputs=4)
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    assert quantizer.joint_codes(codes).tolist() == list(range(9))


@pytest.mark.parametrize(("mode", "expected"), [("add", 1.5), ("set", None)])
def test_blank_weight_is_added_to_or_replaces_the_blank_only(mode, expected):
    torch.manual_seed(0)
    plain = Wav2Vec2Ctc(MODEL, NO_DROPOUT, num_symbols=5).eval()
    weighted = Wav2Vec2Ctc(MODEL, NO_DROPOUT, num_symbols=5, blank_weight=1.5, blank_mode=mode).eval()
    weighted.load_state_dict(plain.state_dict())
    audio = torch.randn(1, 2000)
    before, after = plain(audio)[0], weighted(audio)[0]
    torch.testing.assert_close(after[..., 1:], before[..., 1:])
    blank = before[..., 0] + 1.5 if expected else torch.full_like(before[..., 0], 1.5)
    torch.testing.assert_close(after[..., 0], blank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_full_precision(dtype):
    model = build(HOURGLASS)
    audio = torch.randn(2, 4000) * 0.1
    expected = model(audio).x
    found = model.to(dtype)(audio).x
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
