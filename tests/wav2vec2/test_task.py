"""The composed loss, its statistics, and what belongs to a sub-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_model import HOURGLASS, LARGE, MODEL, NO_DROPOUT, batch

from common.precision import to_half
from wav2vec2.build import fp32_modules
from wav2vec2.config import FP32_OPS, ObjectiveConfig
from wav2vec2.criterion import sample_negatives
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.task import FinetuneTask, PretrainTask

SIZES = [[6000, 6000], [5000, 5000, 5000]]


def make(config=MODEL, **options) -> PretrainTask:
    torch.manual_seed(0)
    objective = ObjectiveConfig(num_negatives=7, loss_weights=(0.3, 4.0))
    return PretrainTask(Wav2Vec2Model(config, NO_DROPOUT), objective, seed=5, **options)


def draws(task: PretrainTask, made):
    """Negatives and noise of a batch, as the task draws them."""
    return task._draw(made)


@pytest.mark.parametrize("config", [MODEL, LARGE], ids=["base", "large"])
def test_the_total_is_the_sum_of_its_terms_computed_by_hand(config):
    task = make(config).double()
    model = task.model
    made = batch(model, SIZES)
    made = replace(made, audio_BS=made.audio_BS.double())
    noise, negatives = draws(task, made)
    model.quantizer.temperature = 0.8
    total, stats, _ = task.losses(made, noise.double(), negatives)
    encoded = model(made.audio_BS, made.lengths_B, norm_lengths_B=made.lengths_B, mask_BT=made.mask_BT)
    expected, row, place, correct = 0.0, 0, 0, 0
    for sub, drawn in zip(made.sub_batches, negatives, strict=True):
        energy, frames, logits_all = 0.0, 0, []
        for r in range(sub.rows):
            valid = made.frame_lengths[row + r]
            energy += encoded.conv_features_BTC[row + r, :valid].square().mean(-1).sum()
            frames += valid
        for r in range(sub.rows):
            masked = made.mask_BT[row + r].nonzero().flatten()
            logits = model.quantizer.weight_proj(encoded.features_BTC[row + r, masked]).view(-1, 2, 10)
            logits_all.append(logits)
            soft = torch.softmax((logits + noise[place : place + len(masked)].double()) / 0.8, -1)
            codes = soft.argmax(-1)
            book = model.quantizer.vars.view(2, 10, -1)
            targets = model.project_q(torch.cat([book[0, codes[:, 0]], book[1, codes[:, 1]]], -1))
            predictions = model.final_proj(encoded.x[row + r, masked])
            place += len(masked)
            for m in range(len(masked)):
                options = [targets[m]] + [targets[n] for n in drawn.frames_bMN[r, m]]
                same = [False] + [torch.equal(codes[m], codes[n]) for n in drawn.frames_bMN[r, m]]
                similarity = torch.stack([F.cosine_similarity(predictions[m], o, dim=0) for o in options]) / 0.1
                similarity[torch.tensor(same)] = -torch.inf
                expected += -F.log_softmax(similarity, 0)[0]
                correct += int(similarity.argmax() == 0 and similarity.argmin() != 0)
        mean = torch.softmax(torch.cat(logits_all), -1).mean(0)
        perplexity = torch.exp(-(mean * torch.log(mean + 1e-7)).sum(-1)).sum()
        size = sub.rows * sub.masked
        expected += 0.3 * size * (20 - perplexity) / 20 + 4.0 * size * energy / frames
        row += sub.rows
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert stats["loss"].item() == total.item()
    assert int(stats["correct"]) == correct


def test_draws_differ_between_sub_batches_updates_and_seeds_and_do_not_depend_on_the_batch():
    task = make()
    joined = batch(task.model, SIZES)
    task.set_step(4)
    noise, negatives = draws(task, joined)
    alone = replace(batch(task.model, [SIZES[1]]), sub_batches=(joined.sub_batches[1],))
    noise_alone, negatives_alone = draws(task, alone)
    assert torch.equal(noise[-len(noise_alone) :], noise_alone)
    assert torch.equal(negatives[1].frames_bMN, negatives_alone[0].frames_bMN)
    assert not torch.equal(noise[: len(noise_alone)], noise_alone)
    task.set_step(5)
    assert not torch.equal(draws(task, joined)[0], noise)


def test_validation_draws_are_the_same_every_time_and_without_noise():
    task = make().eval()
    made = batch(task.model, SIZES)
    task.set_step(4)
    first = draws(task, made)
    task.set_step(9)
    second = draws(task, made)
    assert first[0] is None
    assert second[0] is None
    assert torch.equal(first[1][0].frames_bMN, second[1][0].frames_bMN)


def test_layerdrop_leaves_out_the_given_share_and_is_one_draw_per_update():
    task = make(replace(MODEL, encoder_layers=6), layerdrop=0.3)
    kept = []
    for step in range(300):
        task.set_step(step)
        kept += task.model.encoder.kept
        again = make(replace(MODEL, encoder_layers=6), layerdrop=0.3) if step == 0 else None
        if again:
            again.set_step(step)
            assert again.model.encoder.kept == task.model.encoder.kept
    assert sum(kept) / len(kept) == pytest.approx(0.7, abs=0.04)


def test_the_temperature_falls_with_the_updates():
    task = make()
    for step, expected in ((0, 2.0), (1, 2.0 * 0.999995), (100000, 2.0 * 0.999995**100000), (400000, 0.5)):
        task.set_step(step)
        assert task.model.quantizer.temperature == pytest.approx(expected)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_sub_batch_without_masked_frames_adds_nothing(everywhere):
    task = make()
    task.objective = replace(task.objective, negatives_from_everywhere=everywhere)
    made = batch(task.model, SIZES)
    subs = (made.sub_batches[0], replace(made.sub_batches[1], masked=0))
    mask = made.mask_BT.clone()
    mask[2:] = False
    some = replace(made, sub_batches=subs, mask_BT=mask, masked_R=mask.flatten().nonzero().flatten())
    loss, stats = task(some, torch.tensor(1.0))
    assert torch.isfinite(loss)
    assert stats["ntokens"] == 2 * subs[0].masked
    none = replace(
        some, sub_batches=(replace(subs[0], masked=0), subs[1]), mask_BT=mask & False, masked_R=mask.new_zeros(0).long()
    )
    loss, _ = task(none, torch.tensor(1.0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in task.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_fp32_and_inside_its_bounds(dtype):
    exact, amp = make(HOURGLASS), make(HOURGLASS, amp_dtype=dtype)
    made = batch(exact.model, SIZES)
    hooked = []
    amp.model.final_proj.register_forward_hook(lambda module, args, output: hooked.append(output.dtype))
    (_, expected), (_, found) = (task(made, torch.tensor(1.0)) for task in (exact, amp))
    assert hooked == [dtype]
    assert {weight.dtype for weight in amp.model.parameters()} == {torch.float32}
    for name in ("loss_0", "loss_1", "loss_2", "prob_perplexity"):
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(expected[name].item(), rel=0.03)
    assert found["prob_perplexity"] <= 20 * made.num_masked


@pytest.mark.parametrize("op", [op for op in FP32_OPS if op not in ("mha_softmax", "cosine_sim")])
def test_operations_named_in_fp32_ops_keep_fp32_weights_and_compute_in_them(op):
    model = Wav2Vec2Model(HOURGLASS, NO_DROPOUT)
    to_half(model, torch.bfloat16, fp32_modules(model, (op,)))
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    part = {"conv_norms": "feature_extractor", "pos_conv": "pos_conv", "transformer_layernorm": "encoder"}[op]
    assert kept
    assert all(part in name for name in kept)
    assert all("norm" in name or "pos_conv" in name for name in kept)
    assert torch.isfinite(model(torch.randn(1, 3000)).x.float()).all()


def test_attention_in_fp32_is_nearer_to_the_exact_result():
    torch.manual_seed(0)
    exact = Wav2Vec2Model(HOURGLASS, NO_DROPOUT).eval()
    with torch.no_grad():
        for layer in exact.encoder.hourglass_layers:
            layer.self_attn.qkv_proj.weight.mul_(30)
    found = {}
    for fp32_softmax in (False, True):
        model = Wav2Vec2Model(HOURGLASS, NO_DROPOUT, fp32_softmax=fp32_softmax).eval()
        model.load_state_dict(exact.state_dict())
        attention = model.encoder.hourglass_layers[0].self_attn.to(torch.bfloat16)
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        reference = exact.encoder.hourglass_layers[0].self_attn.double()
        expected = reference(x.double())
        found[fp32_softmax] = (attention(x).double() - expected).abs().mean()
        exact.float()
    assert found[True] <= found[False]


def test_a_frozen_trunk_gets_zero_gradients_and_thaws_at_its_update():
    torch.manual_seed(0)
    task = FinetuneTask(Wav2Vec2Ctc(MODEL, NO_DROPOUT, num_symbols=6), seed=1, freeze_updates=2)
    made = batch(task.model.w2v, SIZES)
    made = replace(made, labels_BL=torch.ones(5, 3, dtype=torch.int64), label_lengths=(3,) * 5)
    for step, frozen in ((0, True), (1, True), (2, False), (3, False)):
        task.set_step(step)
        task.zero_grad()
        task(made, torch.tensor(5.0))[0].backward()
        gradients = [p.grad for p in task.model.w2v.parameters()]
        assert all(g is not None for g in gradients)
        assert any(g.any() for g in gradients) != frozen
        assert task.model.proj.weight.grad.any()
        assert task.frozen_groups == (("w2v",) if frozen else ())


def test_reference_padding_lets_rows_see_their_padding_and_the_default_does_not():
    for reference in (False, True):
        task = make(reference_padding=reference)
        sizes = [[6000, 3500]]
        made = batch(task.model, sizes)
        longer = batch(task.model, [[6000, 3500], [9000]])
        keep = replace(
            longer,
            sub_batches=longer.sub_batches[:1],
            mask_BT=torch.cat(
                [made.mask_BT, torch.zeros(2, longer.mask_BT.shape[1] - made.mask_BT.shape[1], dtype=bool)], 1
            ),
            audio_BS=torch.cat([made.audio_BS, torch.zeros(2, 3000)], 1),
            lengths_B=made.lengths_B,
            frame_lengths=made.frame_lengths,
            padded=True,
            ids=made.ids,
        )
        keep = replace(keep, masked_R=keep.mask_BT.flatten().nonzero().flatten())
        noise, negatives = draws(task, made)
        first, _, _ = task.losses(made, noise, negatives)
        second, _, _ = task.losses(keep, noise, negatives)  # as joined with a longer sub-batch
        assert first.item() == pytest.approx(second.item(), rel=1e-4)
        alone = PretrainTask(task.model, task.objective, seed=5)
        other, _, _ = alone.losses(made, noise, negatives)
        assert (first.item() == pytest.approx(other.item(), rel=1e-6)) != reference


def test_negatives_of_short_rows_stay_inside_them():
    task = make()
    made = batch(task.model, [[400, 400, 400]])
    assert made.sub_batches[0].masked == 1
    loss, stats = task(made, torch.tensor(3.0))
    assert torch.isfinite(loss)
    assert stats["loss_0"].item() == 0
    drawn = sample_negatives(task.objective, torch.zeros(3, 1).long(), torch.ones(3).long(), 1, torch.Generator())
    assert not drawn.frames_bMN.any()
