"""benchmarks/plain.py: every plain form gives the numbers of the toolkit's own, so the fast ones are exact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from tiny_model import HOURGLASS, LARGE, MODEL, batch

from benchmarks import plain, step
from benchmarks.our_step import OurStep
from benchmarks.plain import ALL, CPU_ONLY, FORMS, TOGETHER, VARIANTS, plain_forms, plain_program
from benchmarks.workload import Workload, make_recipe
from common.errors import ConfigError
from common.optim import parameter_groups
from common.precision import LossScaler, MixedPrecisionOptimizer
from wav2vec2.config import DropoutConfig, ModelConfig, ObjectiveConfig
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task import PretrainTask

CPU = torch.device("cpu")
OUTSIDE = ("optimizer", "allocator")  # of the forward and the backward pass
# Dropout that runs its own code, and drops nothing: a mask of 16 bits rounds the share to 0.
NEVER = 1e-12
ARCHITECTURES = {
    "base": MODEL,
    "bias": replace(MODEL, conv_bias=True, conv_pos=7, conv_pos_groups=3),
    "large": LARGE,
    "hourglass": HOURGLASS,
    "linear": replace(HOURGLASS, hourglass_resample="linear"),
    # kernels shorter than, equal to and longer than the stride; one of them odd in everything
    "odd_convs": replace(MODEL, conv_feature_layers="[(8,3,5)]+[(8,2,3)]+[(8,5,2)]+[(8,1,2)]+[(8,7,3)]+[(8,4,1)]"),
}
SIZES = {  # samples of the rows of every sub-batch
    "equal": [[4000, 4000]],
    "padded": [[4000, 2500, 3001], [5321, 5320]],
    "short": [[2300]],
}
NEGATIVES = {
    "own": {},
    "across": {"cross_sample_negatives": 5},
    "codebook": {"codebook_negatives": 3},
    "everywhere": {"negatives_from_everywhere": True},
    "all": {"cross_sample_negatives": 5, "codebook_negatives": 3, "negatives_from_everywhere": True},
}


def make_task(config: ModelConfig, **objective: Any) -> PretrainTask:
    torch.manual_seed(0)
    dropout = DropoutConfig(
        dropout=NEVER, attention_dropout=NEVER, dropout_input=NEVER, dropout_features=NEVER, feature_grad_mult=0.3
    )
    task = PretrainTask(
        Wav2Vec2Model(config, dropout), ObjectiveConfig(num_negatives=9, loss_weights=(0.3, 4.0), **objective), seed=5
    ).double()
    for name, parameter in task.named_parameters():  # no gain of 1, no shift of 0
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return task.train()


def measure(names: tuple[str, ...], make: Callable[[], PretrainTask], sizes: str, monkeypatch: Any) -> dict[str, Any]:
    """Loss, statistics and gradients of a new task; every form that is in place must have been called."""
    called = spy(monkeypatch)
    with plain_forms(names, "cpu"):
        task = make()
        made = batch(task.model, SIZES[sizes])
        made = replace(made, audio_BS=made.audio_BS.double() + 0.05)
        loss, stats = task(made, torch.tensor(float(made.num_masked)))
        loss.backward()
    monkeypatch.undo()
    assert called == expected_calls(names)
    found = {"loss": loss.detach(), **{name: torch.as_tensor(value).double() for name, value in stats.items()}}
    return found | {name: weight.grad for name, weight in task.named_parameters() if weight.grad is not None}


def expected_calls(names: tuple[str, ...]) -> set[Any]:
    if ALL not in names:
        return {form for name in names for form in FORMS[name].values()}
    every = {form for forms in [*FORMS.values(), *TOGETHER.values()] for form in forms.values()}
    replaced = {plain.first_block, plain.conv_stack, plain.keep_mask}  # by `extractor` and `attention`
    return every - replaced - {form for name in OUTSIDE for form in FORMS[name].values()}


def spy(monkeypatch: Any) -> set[Any]:
    """The forms that are called from now on."""
    called: set[Any] = set()

    def watched(form: Any) -> Any:
        @wraps(form)
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(form)
            return form(*args, **kwargs)

        return call

    for table in ("FORMS", "TOGETHER"):
        watch = {
            key: {target: watched(form) for target, form in forms.items()}
            for key, forms in getattr(plain, table).items()
        }
        monkeypatch.setattr(plain, table, watch)
    return called


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= 1e-9 * value.abs().max() + 1e-13, (name, error, value.abs().max())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in OUTSIDE])
def test_a_plain_form_gives_the_same_loss_statistics_and_gradients(name, architecture, sizes, monkeypatch):
    make = partial(make_task, ARCHITECTURES[architecture])
    expected = measure((), make, sizes, monkeypatch)
    assert len(expected) > 40
    assert_same(measure((name,), make, sizes, monkeypatch), expected)


@pytest.mark.parametrize("codes", [2, 10])
@pytest.mark.parametrize(
    ("negatives", "quantize"),
    [(name, True) for name in NEGATIVES] + [(name, False) for name in ("own", "across", "everywhere")],
)
def test_plain_negatives_are_the_same_for_every_kind_of_them(negatives, quantize, codes, monkeypatch):
    """With 2 x 2 codes most negatives equal the positive."""
    make = partial(make_task, replace(MODEL, latent_vars=codes, quantize_targets=quantize), **NEGATIVES[negatives])
    expected = measure((), make, "padded", monkeypatch)
    assert_same(measure(("contrastive",), make, "padded", monkeypatch), expected)
    if quantize:
        assert_same(measure(("quantizer",), make, "padded", monkeypatch), expected)
    task = make()
    made = batch(task.model, SIZES["padded"])
    made = replace(made, audio_BS=made.audio_BS.double())
    logits = task.losses(made, *task._draw(made))[2][0].logits_bMN
    assert logits.isinf().any() == quantize


@pytest.mark.parametrize("kept", [[True, False], [False, True], [False, False]])
@pytest.mark.parametrize("config", [MODEL, LARGE], ids=["base", "large"])
def test_the_last_layer_may_be_dropped(config, kept, monkeypatch):
    def make() -> PretrainTask:
        task = make_task(config)
        task.model.encoder.kept = kept
        return task

    assert_same(measure(("last_layer",), make, "padded", monkeypatch), measure((), make, "padded", monkeypatch))


def train_by(names: tuple[str, ...], dtype: torch.dtype, clip: float) -> dict[str, torch.Tensor]:
    """Weights and state of the optimizer after a few updates of a small model; in one of them half of it is frozen."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 30), torch.nn.GELU(), torch.nn.Linear(30, 3)).to(dtype)
    optimizer = MixedPrecisionOptimizer(
        parameter_groups(model, lambda name: name.split(".")[0]),
        betas=(0.9, 0.98),
        eps=1e-3,
        weight_decay=0.1,
        scaler=LossScaler(init=8.0) if dtype == torch.float16 else None,
    )
    with plain_forms(names, "cpu"):
        for update in range(6):
            optimizer.freeze(["0"] if update == 3 else [])
            optimizer.backward(model(torch.randn(5, 7).to(dtype)).double().square().sum())
            optimizer.clip_grad_norm(clip)
            optimizer.step(lr=0.01)
    state = optimizer.state_dict().items()
    found = {f"{name} {key}": torch.as_tensor(value) for name, entry in state for key, value in entry.items()}
    return {name: value.double() for name, value in (found | optimizer.master_weights()).items()}


@pytest.mark.parametrize(
    ("dtype", "clip", "tolerance"),
    [(torch.float64, 0.1, 1e-12), (torch.float32, 0.0, 2e-6), (torch.bfloat16, 0.1, 2e-6), (torch.float16, 0.1, 2e-6)],
)
def test_the_plain_optimizer_gives_the_same_weights_and_state(dtype, clip, tolerance, monkeypatch):
    expected = train_by((), dtype, clip)
    called = spy(monkeypatch)
    found = train_by(("optimizer",), dtype, clip)
    unused = {plain.copy_each} if dtype in (torch.float64, torch.float32) else set()
    assert called == set(FORMS["optimizer"].values()) - unused
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


def test_forms_are_gone_afterwards():
    before = {target: resolve_name(target) for forms in FORMS.values() for target in forms}
    with suppress(ZeroDivisionError), plain_forms((ALL,), "cpu"):
        during = {target: resolve_name(target) for target in before}
        raise ZeroDivisionError
    assert not any(during[target] is form for target, form in before.items())
    assert {target: resolve_name(target) for target in before} == before


def test_a_variant_is_the_same_training_as_ours():
    """The losses of a few updates, which follow from all that was updated before."""

    def losses(names: tuple[str, ...]) -> list[float]:
        with plain_forms(names, "cpu"):
            recipe = make_recipe("tiny")
            workload = Workload(replace(recipe, dropout=DropoutConfig(0.0, 0.0)), CPU, rows=2, samples=16000)
            ours, made, found = OurStep(workload), workload.batch(), []
            for _ in range(4):
                ours.step(made)
                found.append(ours.task(made, torch.tensor(1.0))[0].item())
        return found

    expected = losses(())
    assert len(set(expected)) == 4
    assert losses((ALL,)) == pytest.approx(expected, rel=1e-4)


def test_the_allocator_is_left_as_it_is(monkeypatch):
    called = []
    monkeypatch.setattr("common.distributed.keep_freed_memory", lambda: called.append(True))
    workload = Workload(make_recipe("tiny"), CPU, rows=1, samples=16000)
    with plain_program(workload, ("allocator",)):
        assert called == []
    with plain_program(workload, ("dropout",)):
        assert called == [True]


def test_names_are_refused_in_one_line():
    for given, message in [
        (["--plain", "sorting"], "--plain sorting"),
        (["--plain", "dropout", "dropout"], "--plain dropout: named twice"),
        *((["--plain", name, "--device", "cuda"], f"--plain {name}: has no effect") for name in CPU_ONLY),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            step.parse([*given, "--json", "-"])
        assert "\n" not in str(error.value)
    assert step.parse(["--plain", *VARIANTS, "--json", "-"]).plain == VARIANTS
    with plain_forms((ALL,), "cuda"):
        assert resolve_name("wav2vec2.dropout.Dropout.forward") is not plain.dropout
