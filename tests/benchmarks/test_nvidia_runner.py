"""benchmarks/nvidia_runner.py: their modules beside ours, the update in place of apex's; with a checkout, their step.

The tests with their code need WAV2VEC2_NVIDIA, the folder PyTorch/SpeechRecognition/wav2vec2 of a clone of
https://github.com/NVIDIA/DeepLearningExamples; without it they are skipped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from originals import split
from torch.nn import functional

from benchmarks.nvidia_runner import FusedAdam, NvidiaStep, their_modules
from benchmarks.our_step import OurStep
from benchmarks.workload import Workload, make_recipe
from common import errors
from common.errors import ConfigError
from wav2vec2.config import DropoutConfig
from wav2vec2.convert.names import original_names
from wav2vec2.criterion import gumbel_noise, sample_negatives

CPU = torch.device("cpu")
NO_DROPOUT = DropoutConfig(
    dropout=0.0, attention_dropout=0.0, dropout_input=0.0, dropout_features=0.0, feature_grad_mult=0.1
)
LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}


@pytest.fixture
def checkout() -> Path:
    if "WAV2VEC2_NVIDIA" not in os.environ:
        pytest.skip("WAV2VEC2_NVIDIA does not name a checkout of NVIDIA's code")
    return Path(os.environ["WAV2VEC2_NVIDIA"])


def names() -> dict[str, int]:
    """Modules of the shared names and of the stand-ins, by identity."""
    tops = ("common", "wav2vec2", "fairseq", "amp_C", "numba", "librosa")
    return {name: id(module) for name, module in sys.modules.items() if name.partition(".")[0] in tops}


@pytest.mark.parametrize("fails", [False, True])
def test_their_packages_live_beside_ours(tmp_path, fails):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("import sys, amp_C\nsys.modules['fairseq.data'] = object()\n")
    (tmp_path / "common" / "errors.py").write_text("import numba\nWHOSE = 'theirs'\n@numba.jit(a=1)\ndef f(): pass\n")
    (tmp_path / "common" / "only_there.py").write_text("from common.errors import WHOSE\n" + "1 / 0\n" * fails)
    before, path = names(), list(sys.path)
    found = None
    try:
        with their_modules(tmp_path):
            found = import_module("common.errors")
            assert import_module("common.only_there").WHOSE == "theirs"
    except ZeroDivisionError:
        assert fails
    assert found.WHOSE == "theirs"
    assert names() == before
    assert sys.path == path
    assert import_module("common.errors") is errors
    with pytest.raises(ModuleNotFoundError):
        import_module("common.only_there")


def test_the_update_is_adam_with_decoupled_decay_of_the_divided_gradients():
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(40))
    lr, decay, betas, eps = 0.01, 0.1, (0.9, 0.98), 1e-6
    optimizer = FusedAdam([weight], lr=lr, betas=list(betas), eps=eps, weight_decay=decay)
    expected = weight.detach().double()
    first, second = torch.zeros(40).double(), torch.zeros(40).double()
    for step, scale in enumerate((37, 2, 500), start=1):  # one scale for all would not show
        gradient = torch.randn(40)
        weight.grad = gradient * scale
        optimizer.step(scale=scale)
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient.double() ** 2
        direction = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        expected = expected * (1 - lr * decay) - lr * direction
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [True, False])
def test_a_checkout_is_asked_for(tmp_path, given):
    workload = Workload(make_recipe("tiny"), CPU, rows=1, samples=16000, checkout=tmp_path if given else None)
    with pytest.raises(ConfigError, match=rf"^--checkout{f' {tmp_path}' if given else ''}: .*clone"):
        NvidiaStep(workload)


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({}, "fp32"), ({"hourglass_transformer": "[1,(1,3),1]"}, "fp32"), (LARGE, "fp32"), ({}, "bf16"), ({}, "fp16")],
)
def test_their_step_learns_and_has_as_many_weights(checkout, changes, precision):
    recipe = make_recipe("tiny", precision=precision)
    recipe = replace(
        recipe, model=replace(recipe.model, **changes), optim=replace(recipe.optim, lr=0.003, adam_betas=(0.9, 0.99))
    )
    workload = Workload(recipe, CPU, rows=2, samples=16000, checkout=checkout)
    peer, batch, modules = NvidiaStep(workload), workload.batch(), names()
    assert peer.num_parameters == OurStep(workload).num_parameters
    group = peer.optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["fused"]) == (0.003, (0.9, 0.99), True)
    before = {name: weight.detach().clone() for name, weight in peer.model.named_parameters()}
    losses = [peer.step(batch) for _ in range(12)]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5
    assert [name for name, weight in peer.model.named_parameters() if torch.equal(weight, before[name])] == []
    assert names() == modules


@pytest.mark.parametrize("changes", [{}, {"hourglass_transformer": "[1,(1,3),1]"}, LARGE])
def test_both_sides_do_the_same_work(checkout, changes):
    """With the same weights, noise and negatives, and no dropout: the same loss and gradients."""
    recipe = make_recipe("tiny")
    recipe = replace(recipe, model=replace(recipe.model, **changes), dropout=NO_DROPOUT)
    workload = Workload(recipe, CPU, rows=2, samples=24000, checkout=checkout)
    batch, peer, task = workload.batch(), NvidiaStep(workload), OurStep(workload).task
    table = original_names(recipe.model)
    peer.model.load_state_dict(table.to_foreign(task.model.state_dict()))
    rows, masked = batch.num_rows, batch.sub_batches[0].masked
    generator = torch.Generator().manual_seed(3)
    noise_RGV = gumbel_noise((rows * masked, recipe.model.latent_groups, recipe.model.latent_vars), generator)
    own_bM, candidates_b = torch.arange(masked).expand(rows, masked), torch.full((rows,), masked)
    negatives = sample_negatives(recipe.objective, own_bM, candidates_b, masked, generator)

    def their_gumbel_softmax(logits, tau, hard):
        soft = ((logits + noise_RGV.view_as(logits)) / tau).softmax(-1)
        return functional.one_hot(soft.argmax(-1), logits.shape[-1]) - soft.detach() + soft  # in this order exact

    def their_negatives(y_BMF, num, padding_count):
        drawn = [row_MF[frames_MN] for row_MF, frames_MN in zip(y_BMF, negatives.frames_bMN, strict=True)]
        return torch.stack(drawn).permute(2, 0, 1, 3), None

    with (
        patch.object(functional, "gumbel_softmax", their_gumbel_softmax),
        patch.object(peer.model, "sample_negatives", their_negatives),
    ):
        theirs, count, _ = peer.criterion(peer.model, peer.sample(batch))
    theirs.backward()
    task.set_step(0)
    ours, _, _ = task.losses(batch, noise_RGV, [negatives])
    ours.backward()
    assert count == rows * masked
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    expected = split({name: weight.grad for name, weight in peer.model.named_parameters()})
    found = table.to_foreign({name: weight.grad for name, weight in task.model.named_parameters()})
    assert found.keys() == expected.keys()
    for name in found:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-5, msg=name)
