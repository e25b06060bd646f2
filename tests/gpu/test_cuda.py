"""What needs a CUDA device; data are made here, and no audio library is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice, repeat
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from tiny_model import HOURGLASS, LARGE, NO_DROPOUT, batch
from torch import Tensor

import train
from common import distributed, rng
from common.data.collate import Batch
from common.data.loader import copied_ahead
from common.ema import Ema
from common.labels import SPECIAL_SYMBOLS, Dictionary
from common.precision import LossScaler, MixedPrecisionOptimizer, to_half
from wav2vec2 import criterion
from wav2vec2.build import build_model, build_optimizer, build_task, fp32_modules
from wav2vec2.config import Config, DropoutConfig, ObjectiveConfig, OptimConfig, PrecisionConfig
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.run import Run
from wav2vec2.task import FinetuneTask, PretrainTask

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [[6000, 6000], [5000, 5000, 5000]]


@pytest.fixture(autouse=True)
def exact_products():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("config", [HOURGLASS, LARGE], ids=["hourglass", "large"])
def test_encoder_gives_the_same_on_the_gpu_as_on_the_cpu(config):
    torch.manual_seed(0)
    model = Wav2Vec2Model(config, NO_DROPOUT).eval()
    made = batch(model, SIZES)
    expected = model(made.audio_BS, made.lengths_B, norm_lengths_B=made.lengths_B, mask_BT=made.mask_BT)
    moved = made.to("cuda")
    found = model.cuda()(moved.audio_BS, moved.lengths_B, norm_lengths_B=moved.lengths_B, mask_BT=moved.mask_BT)
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
