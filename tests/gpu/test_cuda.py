"""What needs a CUDA device; data are made here, and nothing but torch and numpy is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_model import HOURGLASS, LARGE, NO_DROPOUT, batch

from common.precision import LossScaler, MixedPrecisionOptimizer, to_half
from wav2vec2.config import ObjectiveConfig
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.task import FinetuneTask, PretrainTask

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
        torch.testing.assert_close(found.x_BTD[row, :frames].cpu(), expected.x_BTD[row, :frames], atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_step_does_not_wait_for_the_device(kind):
    task = make_task(kind)
    task.cuda()
    optimizer = MixedPrecisionOptimizer(
        {"all": list(task.model.named_parameters())}, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0
    )
    made = batch(task.model if kind == "pretrain" else task.model.w2v, SIZES)
    if kind == "finetune":
        labels = torch.ones(made.num_rows, 4, dtype=torch.int64)
        made = replace(made, labels_BL=labels, label_lengths=(4,) * made.num_rows, mask_BT=None, masked_R=None)
    moved, count = made.to("cuda"), torch.ones((), device="cuda")

    def step() -> None:
        task.set_step(3)
        loss, _ = task(moved, count)
        optimizer.backward(loss)
        optimizer.clip_grad_norm(5.0)
        optimizer.step(lr=0.001)

    step()  # the first one allocates and chooses kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
