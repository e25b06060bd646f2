"""What needs a CUDA device; data are made here, and no audio library is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, repeat
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from tiny_model import HOURGLASS, LARGE, NO_DROPOUT, batch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from benchmarks import our_step
from benchmarks.workload import make_recipe
from common import distributed, rng
from common.data.collate import Batch, present
from common.data.loader import copied_ahead
from common.ema import Ema
from common.labels import SPECIAL_SYMBOLS, Dictionary
from common.precision import LossScaler, MixedPrecisionOptimizer, to_half
from wav2vec2 import criterion
from wav2vec2.build import build_model, build_optimizer, build_task, fp32_modules
from wav2vec2.config import Config, DropoutConfig, ObjectiveConfig, OptimConfig, PrecisionConfig
from wav2vec2.convolutions import PositionalConv, normed_first_conv, strided_conv
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.run import Run
from wav2vec2.task import FinetuneTask, PretrainTask

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [[6000] * 4, [5000] * 4]  # enough rows of one length for attention by runs


@pytest.fixture(autouse=True)
def exact_products():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("by_runs", [False, True], ids=["mask", "runs"])
@pytest.mark.parametrize("config", [HOURGLASS, LARGE], ids=["hourglass", "large"])
def test_encoder_gives_the_same_on_the_gpu_as_on_the_cpu(config, by_runs):
    torch.manual_seed(0)
    model = Wav2Vec2Model(config, NO_DROPOUT).eval()
    made = batch(model, SIZES)
    lengths = made.frame_lengths if by_runs else None
    moved = made.to("cuda")
    expected, found = (
        one(some.audio_BS, some.lengths_B, frame_lengths=lengths, norm_lengths_B=some.lengths_B, mask_BT=some.mask_BT)
        for one, some in ((model, made), (copy.deepcopy(model).cuda(), moved))
    )
    for row, frames in enumerate(made.frame_lengths):
        torch.testing.assert_close(found.x[row, :frames].cpu(), expected.x[row, :frames], atol=1e-4, rtol=1e-4)


def make_task(kind: str) -> PretrainTask | FinetuneTask:
    torch.manual_seed(0)
    if kind == "pretrain":
        return PretrainTask(Wav2Vec2Model(HOURGLASS, NO_DROPOUT), ObjectiveConfig(num_negatives=10), seed=1)
    return FinetuneTask(Wav2Vec2Ctc(HOURGLASS, NO_DROPOUT, num_symbols=7), seed=1)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss_in_every_precision(kind, precision):
    task = make_task(kind)
    model = task.model
    if precision != "fp32":
        trunk = model if kind == "pretrain" else model.w2v
        to_half(model, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision], [trunk.encoder.pos_conv])
    task.cuda()
    optimizer = MixedPrecisionOptimizer(
        {"all": list(model.named_parameters())},
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.0,
        scaler=LossScaler() if precision == "fp16" else None,
    )
    made = batch(model if kind == "pretrain" else model.w2v, SIZES)
    if kind == "finetune":
        labels = torch.randint(1, 7, (made.num_rows, 4), generator=torch.Generator().manual_seed(0))
        made = replace(made, labels_BL=labels, label_lengths=(4,) * made.num_rows, mask_BT=None, masked_R=None)
    moved, losses = made.to("cuda"), []
    count = torch.tensor(float(task.count_units([made])), device="cuda")
    for _ in range(30):
        task.set_step(7)  # the same noise and negatives every time
        loss, stats = task(moved, count)
        optimizer.backward(loss)
        optimizer.clip_grad_norm(5.0)
        optimizer.step(lr=0.003)
        losses.append(stats["loss"])
    values = torch.stack(losses).tolist()
    assert values[-1] < 0.9 * values[0]


# ---- The convolutions -----------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first_conv(lengths: list[int] | None, weight_C1k: Tensor, gain_C: Tensor, shift_C: Tensor) -> Tensor:
    device = weight_C1k.device
    lengths_B = None if lengths is None else torch.tensor(lengths, device=device)
    audio_BS = (0.3 * random(2, 4000) + 0.1).float().to(device)
    options = {"stride": 5, "lengths_B": lengths_B, "eps": 1e-5, "pitch": 800}
    return normed_first_conv(audio_BS, weight_C1k, None, gain_C, shift_C, **options)


def positional_conv(x_BTD: Tensor, direction: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    weights = {"weight_v": direction, "weight_g": gain, "bias": bias}
    return functional_call(PositionalConv(32, 16, 4), weights, (x_BTD,))


FIRST = [random(24, 1, 10, seed=1), 1 + 0.1 * random(24, seed=2), random(24, seed=3)]
POSITIONAL = [
    random(3, 90, 32, seed=1),
    random(32, 8, 16, seed=2),
    1 + 0.1 * random(1, 1, 16, seed=3),
    random(32, seed=4),
]
CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "first": (partial(first_conv, None), FIRST),
    "first, padded": (partial(first_conv, [799, 500]), FIRST),
    "strided, 3 taps": (
        partial(strided_conv, stride=2, gelu=True),
        [random(300, 24, seed=1), random(32, 24, 3, seed=2), random(32, seed=3)],
    ),
    "strided, 2 taps": (
        lambda x, weight: strided_conv(x, weight, None, stride=2, gelu=False),
        [random(300, 24, seed=1), random(32, 24, 2, seed=2)],
    ),
    "positional": (positional_conv, POSITIONAL),
}
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # norm of the error over that of the result


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of all inputs for a given one of the result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    dy = random(*y.shape, seed=9).to(y)
    return [found.detach().cpu().double() for found in (y, *torch.autograd.grad(y, leaves, dy))]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients_are_those_of_float64_on_the_cpu(name, dtype):
    """Of the same inputs, which are rounded beforehand."""
    function, inputs = CONVOLUTIONS[name]
    rounded = [x.to(dtype) for x in inputs]
    expected = with_gradients(function, [x.double() for x in rounded])
    found = with_gradients(function, [x.to(DEVICE) for x in rounded])
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() <= ROUNDING[dtype] * other.norm()


# ---- Waiting --------------------------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the context torch raises an error where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bare_run(kind: str, precision: str) -> Run:
    """A run that has no data and writes nothing, with all that a step can do."""
    config = Config(
        mode=kind,
        model=HOURGLASS,
        dropout=DropoutConfig(dropout_input=0.1, feature_grad_mult=0.1, encoder_layerdrop=0.2),
        objective=ObjectiveConfig(
            num_negatives=10, cross_sample_negatives=5, codebook_negatives=5, negatives_from_everywhere=True
        ),
        optim=OptimConfig(clip_norm=1.0, ema=0.9, weight_decay=0.01),
        precision=PrecisionConfig(bf16=precision == "bf16"),
    )
    dictionary = Dictionary([*SPECIAL_SYMBOLS, "|", "A", "B"]) if kind == "finetune" else None
    model = build_model(config, dictionary)
    if config.precision.o2:
        to_half(model, torch.bfloat16, fp32_modules(model, config.precision.kept_in_fp32()))
    device, nothing = torch.device(DEVICE), cast(Any, None)
    task = build_task(config, model).to(device)
    optimizer = build_optimizer(config, model)
    return Run(
        config=config,
        device=device,
        task=task,
        engine=distributed.wrap(task, device),
        optimizer=optimizer,
        schedule=lambda step: 0.001,
        ema=Ema(config.optim.ema, optimizer.master_weights()),
        train_loader=nothing,
        valid_loader=nothing,
        dictionary=dictionary,
        logger=nothing,
        frozen_weights={},
    )


def pinned(run: Run, sizes: list[list[int]]) -> Batch:
    """A batch as the workers hand it over."""
    finetune = isinstance(run.task, FinetuneTask)
    made = batch(run.task.model.w2v if finetune else run.task.model, sizes)
    if finetune:
        labels = torch.randint(4, 7, (made.num_rows, 4), generator=torch.Generator().manual_seed(0))
        made = replace(made, labels_BL=labels, label_lengths=(4,) * made.num_rows)
    return made.pin_memory()


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_does_not_wait_for_the_device(kind, precision, monkeypatch):
    """From the copy of the batches to the end of the update. torch's CTC waits, so another loss stands in."""
    monkeypatch.setattr(criterion, "ctc_losses", lambda logits, *rest: -logits.float().log_softmax(-1)[..., 0].sum(1))
    run = bare_run(kind, precision)
    batches = [pinned(run, SIZES), pinned(run, [[6000, 6000]])]
    assert [made.padded for made in batches] == [True, False]
    updates = copied_ahead(repeat(batches), run.device)
    # the first step allocates, chooses kernels and brings constants to the device
    assert train.train_step(run, next(updates), 0)
    before = [weight.clone() for weight in run.optimizer.master_weights().values()]
    with no_waiting():
        for step in (1, 2, 3, 4):
            assert train.train_step(run, next(updates), step)
    after = run.optimizer.master_weights().values()
    assert not all(weight.equal(old) for weight, old in zip(after, before, strict=True))
    assert all(weight.isfinite().all() for weight in after)


def test_what_is_copied_ahead_arrives_before_it_is_read_and_stays_until_then():
    """Large copies, and a computation far behind the host: memory is given to later copies before it has been read."""

    def numbered(number: int) -> list[Batch]:
        audio_BS = torch.full((16, 2**20), float(number))
        made = Batch(("0",) * 16, audio_BS, torch.full((16,), 2**20), False, (), audio_BS.numel(), (1,) * 16)
        return [made.pin_memory()]

    updates = copied_ahead(cycle([numbered(number) for number in range(1, 6)]), torch.device(DEVICE))
    read = []
    for (made,) in islice(updates, 20):
        early = made.audio_BS.amax()
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        read.append(torch.stack([early, made.audio_BS.amin(), made.audio_BS.amax()]))
    assert torch.stack(read).tolist() == [[1.0 + place % 5] * 3 for place in range(20)]


# What tests/no_sync.py takes for granted about kernels that no CPU has.
WAITING: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "item": lambda x, mask, index: x.sum().item(),
    "boolean mask": lambda x, mask, index: x[mask],
    "number assigned by a mask and an index": lambda x, mask, index: x.__setitem__((mask, index[:3]), 0.0),
    "index given as a list": lambda x, mask, index: x[[0, 2]],
    "tensor of host data": lambda x, mask, index: torch.tensor([1, 2], device=x.device),
    "repeat_interleave": lambda x, mask, index: x[:4].repeat_interleave(index, 0),
    "equal": lambda x, mask, index: torch.equal(x, x + 1),
    "allclose": lambda x, mask, index: torch.allclose(x, x),
    "multinomial": lambda x, mask, index: torch.multinomial(x.square() + 1, 2),
    "inverse": lambda x, mask, index: torch.linalg.inv(x[:4] @ x[:4].t() + torch.eye(4, device=x.device)),
    "ctc_loss": lambda x, mask, index: criterion.ctc_losses(x[None], (6,), index[None, :2] % 4 + 1, (2,)),
}
NOT_WAITING: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "index": lambda x, mask, index: x[index],
    "number assigned by a mask": lambda x, mask, index: x.__setitem__(mask, 0.0),
    "number assigned to a slice": lambda x, mask, index: x.__setitem__((slice(None), slice(2, None)), 0.0),
    "repeat_interleave by a number": lambda x, mask, index: x.repeat_interleave(2, 0),
    "repeat_interleave of a known size": lambda x, mask, index: x[:4].repeat_interleave(index, 0, output_size=4),
    "one_hot of a known number": lambda x, mask, index: F.one_hot(index, 4),
    "full": lambda x, mask, index: torch.full((), 3.0, device=x.device),
    "seeding": lambda x, mask, index: rng.seed_all("any"),
    "generator": lambda x, mask, index: torch.rand(3, device=x.device, generator=rng.torch_rng(x.device, "any")),
}


def operands() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.arange(24.0, device=DEVICE).view(6, 4)
    return x, x[:, 0] > 10, torch.tensor([0, 1, 2, 1], device=DEVICE)


@pytest.mark.parametrize("name", WAITING)
def test_what_counts_as_waiting_waits(name):
    made = operands()
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        WAITING[name](*made)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_does_not_count_as_waiting_does_not_wait(name):
    made = operands()
    with no_waiting():
        NOT_WAITING[name](*made)


# ---- Options of speed and memory ------------------------------------------------------------------------------------


def pretraining_run(
    *,
    size: str = "tiny",
    precision: str = "fp32",
    dropout: DropoutConfig = NO_DROPOUT,
    layers: int = 2,
    **options: bool,
) -> Run:
    """A run without data and without an Hourglass; options are those of RunConfig."""
    recipe = make_recipe(size, "", precision)
    recipe = replace(
        recipe,
        dropout=dropout,
        model=replace(recipe.model, encoder_layers=layers),
        run=replace(recipe.run, **cast(Any, options)),
    )
    return our_step.bare_run(recipe, torch.device(DEVICE))


def losses(run: Run, batches: list[Batch]) -> list[float]:
    found = []
    for step, made in enumerate(batches):
        assert train.train_step(run, [made.to(DEVICE)], step)
        found.append(run.metrics.reduce("cpu")["loss"])
    return found


def gradients_of_a_pass(run: Run, made: Batch) -> dict[str, Tensor]:
    run.set_step(0)
    rng.seed_all("dropout")
    loss, _ = run.engine(made.to(DEVICE), torch.tensor(float(made.num_masked), device=DEVICE))
    run.optimizer.backward(loss)
    return {name: present(weight.grad) for name, weight in run.task.model.named_parameters()}


def test_checkpointed_activations_give_the_same_gradients_with_dropout():
    dropout = DropoutConfig(dropout=0.2, attention_dropout=0.2, activation_dropout=0.2)
    plain = pretraining_run(dropout=dropout)
    made = batch(plain.task.model, SIZES)
    expected = gradients_of_a_pass(plain, made)
    found = gradients_of_a_pass(pretraining_run(dropout=dropout, checkpoint_activations=True), made)
    for name, gradient in expected.items():
        # sums over threads come in any order
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_checkpointed_activations_lower_the_peak_of_a_step():
    def peak(**options: bool) -> int:
        run = pretraining_run(size="small", layers=12, **options)
        made = batch(run.task.model, [[160000] * 4])
        losses(run, [made])  # the optimizer's moments, and what libraries allocate once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses(run, [made])
        return torch.cuda.max_memory_allocated() - before

    assert peak(checkpoint_activations=True) < 0.7 * peak()


def test_flash_attention_is_what_training_without_padding_within_sub_batches_uses():
    dropout = DropoutConfig(dropout=0.1, attention_dropout=0.1)
    run = pretraining_run(size="small", precision="bf16", dropout=dropout)
    made = batch(run.task.model, [[16000] * 3])
    assert not made.padded
    joined = batch(run.task.model, [[16000] * 4, [12000] * 4])
    assert joined.padded
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # any other kernel is an error
        assert all(loss > 0 for loss in losses(run, [made, made, joined]))
        with pytest.raises(RuntimeError, match="[Nn]o available kernel"):  # it has none for fp32
            losses(pretraining_run(size="small", dropout=dropout), [made])


@pytest.mark.parametrize("graphs", [False, True], ids=["compiled", "cuda_graphs"])
def test_compiled_parts_give_the_same_losses(graphs):
    """Enough steps for a graph to be recorded and replayed; what it leaves must not be written over too early."""
    torch._dynamo.reset()
    plain = pretraining_run()
    batches = [batch(plain.task.model, [[6000] * 2, [6000] * 3], seed=seed) for seed in range(5 if graphs else 3)]
    expected = losses(plain, batches)
    assert len(set(expected)) == len(expected)
    found = losses(pretraining_run(compile=True, cuda_graphs=graphs), batches)
    torch._dynamo.reset()
    assert found == pytest.approx(expected, rel=1e-3)
