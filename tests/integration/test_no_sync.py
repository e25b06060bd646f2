"""A training step makes the host wait for nothing; and the recorder that says so finds what would make it wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from no_sync import host_waits
from tiny import MODEL_FLAGS, corpus
from torch import Tensor

import train
from common import checkpoint
from common.data.collate import Batch
from common.precision import HALF
from wav2vec2 import attention
from wav2vec2.arg_parser import parse_train
from wav2vec2.build import build_run
from wav2vec2.config import FP32_OPS
from wav2vec2.run import Run
from wav2vec2.task import PretrainTask

HERE = Path(__file__).name

# ---- The recorder ---------------------------------------------------------------------------------------------------

WEIGHT = torch.arange(1.0, 25.0).view(6, 4).requires_grad_()
VALUES = WEIGHT.detach()
MASK = torch.tensor([True, False, True, True, False, False])
INDEX = torch.tensor([0, 1, 2, 1])
PLACE = torch.tensor(2)
SHARES = torch.full((5,), 0.2)
LOG_PROBS = torch.full((9, 2, 5), 0.2).log().requires_grad_()


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * gradients[0].sum().item()


def assign(x: Tensor, where: Any, value: Any) -> None:
    x.clone()[where] = value


def ctc() -> Tensor:
    return F.ctc_loss(LOG_PROBS, torch.tensor([[1, 2], [3, 4]]), torch.tensor((9, 8)), torch.tensor((2, 2)))


WAITS: dict[str, tuple[str, Callable[[], Any]]] = {
    "item": ("_local_scalar_dense", lambda: VALUES.sum().item()),
    "bool": ("_local_scalar_dense", lambda: 1 if VALUES.any() else 0),
    "float": ("_local_scalar_dense", lambda: float(VALUES.sum())),
    "int": ("_local_scalar_dense", lambda: int(PLACE)),
    "index": ("_local_scalar_dense", lambda: range(5)[PLACE]),
    "comparison": ("_local_scalar_dense", lambda: max(VALUES[:2, 0])),
    "membership": ("_local_scalar_dense", lambda: 3 in INDEX),
    "format": ("_local_scalar_dense", lambda: f"{VALUES.sum()}"),
    "slice with a tensor bound": ("_local_scalar_dense", lambda: VALUES[:PLACE]),
    "arange with a tensor bound": ("_local_scalar_dense", lambda: torch.arange(PLACE)),
    "full of a tensor": ("_local_scalar_dense", lambda: torch.full((3,), PLACE)),
    "is_nonzero": ("_local_scalar_dense", lambda: torch.is_nonzero(PLACE)),
    "repr": ("__repr__", lambda: repr(VALUES)),
    "tolist": ("tolist", lambda: VALUES.tolist()),
    "cpu": ("cpu", lambda: VALUES.cpu()),
    "numpy": ("numpy", lambda: VALUES.numpy()),
    "asarray": ("__array__", lambda: np.asarray(VALUES)),
    "blocking to": ("to", lambda: VALUES.to("cpu")),
    "blocking to by name": ("to", lambda: VALUES.to(dtype=torch.float64, device=torch.device("cpu"))),
    "nonzero": ("nonzero", lambda: MASK.nonzero()),
    "where of a condition": ("nonzero", lambda: torch.where(MASK)),
    "argwhere": ("nonzero", lambda: torch.argwhere(MASK)),
    "masked_select": ("masked_select", lambda: VALUES.masked_select(MASK[:, None])),
    "boolean mask": ("index", lambda: VALUES[MASK]),
    "boolean mask of a later dimension": ("index", lambda: VALUES.t()[:, MASK]),
    "boolean assignment": ("index_put_", lambda: assign(VALUES, MASK, torch.ones(4))),
    "number assigned by a mask and an index": ("index_put_", lambda: assign(VALUES, (MASK, 0 * INDEX[:3]), 0.0)),
    "number assigned to a list": ("lift_fresh", lambda: assign(VALUES, [0, 2], 0.0)),
    "tensor of a number": ("lift_fresh", lambda: torch.tensor(3.0)),
    "repeat_interleave": ("repeat_interleave", lambda: VALUES[:4].repeat_interleave(INDEX, 0)),
    "unique": ("_unique2", lambda: torch.unique(INDEX)),
    "unique of rows": ("unique_dim", lambda: torch.unique(VALUES, dim=0)),
    "unique_consecutive": ("unique_consecutive", lambda: torch.unique_consecutive(INDEX)),
    "bincount": ("bincount", lambda: torch.bincount(INDEX)),
    "one_hot of an unknown number": ("one_hot", lambda: F.one_hot(INDEX)),
    "equal": ("equal", lambda: torch.equal(VALUES, VALUES)),
    "allclose": ("allclose", lambda: torch.allclose(VALUES, VALUES)),
    "multinomial": ("multinomial", lambda: torch.multinomial(SHARES, 2)),
    "inverse": ("_linalg_check_errors", lambda: torch.linalg.inv(torch.eye(3))),
    "embedding with a maximal norm": ("embedding_renorm_", lambda: F.embedding(INDEX, VALUES.clone(), max_norm=1.0)),
    "ctc_loss": ("_ctc_loss", ctc),
    "tensor of host data": ("lift_fresh", lambda: torch.tensor([1, 2, 3])),
    "array of the host": ("lift_fresh", lambda: torch.from_numpy(np.ones(3))),
    "index given as a list": ("lift_fresh", lambda: VALUES[[0, 2]]),
}
BACKWARD: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "boolean mask": ("index_put in IndexBackward0", lambda: WEIGHT[MASK].sum()),
    "own function": ("_local_scalar_dense in ReadsInBackwardBackward", lambda: ReadsInBackward.apply(WEIGHT).sum()),
    "ctc_loss": ("_ctc_loss_backward in CtcLossBackward0", lambda: ctc()),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_found_with_its_place(name):
    operation, planted = WAITS[name]
    with host_waits() as waits:
        planted()
    places = [found.split()[0] for found in waits.found]
    assert operation in [found.split()[1] for found in waits.found]
    assert all(place.startswith(f"tests/integration/{HERE}:") for place in places)


@pytest.mark.parametrize("name", BACKWARD)
def test_what_waits_in_the_backward_pass_is_found(name):
    operation, planted = BACKWARD[name]
    loss = planted()
    with host_waits() as waits:
        loss.backward()
    assert [found.split(maxsplit=1)[1] for found in waits.found] == [operation]


def test_a_read_counts_once():
    with host_waits() as waits:
        VALUES.sum().item()
        np.asarray(VALUES)
    assert len(waits.found) == 2


def test_what_does_not_wait_is_not_found():
    optimizer = torch.optim.AdamW([WEIGHT], fused=True)
    with host_waits() as waits:
        chosen = WEIGHT[INDEX]
        x = torch.where(MASK[:, None], WEIGHT, 0.0).masked_fill(~MASK[:, None], 1.0)
        x = F.dropout(F.layer_norm(x, (4,)), 0.5).to(torch.bfloat16).float()
        x = x.to("cpu", non_blocking=True).repeat_interleave(2, 0)
        x = x.repeat_interleave(torch.full((12,), 2), 0, output_size=24)
        filled = x.detach().clone()
        filled[:, 2:] = 1.0
        filled[filled > 0.5] = -1.0
        codes = F.one_hot((x + filled).argmax(-1), 4).float()
        drawn = torch.rand(6, generator=torch.Generator().manual_seed(1))
        loss = (x * codes).sum() + chosen.square().sum() / torch.full((), 3.0) + drawn.cumsum(0).amax()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert waits.found == []
    assert {"native_layer_norm_backward", "index_put", "_fused_adamw_"} <= waits.seen


def test_tensors_are_as_before_afterwards():
    before = {name: getattr(Tensor, name) for name in ("to", "cpu", "tolist", "numpy", "__repr__")}
    with pytest.raises(ValueError, match="planted"), host_waits():
        raise ValueError("planted")
    assert before == {name: getattr(Tensor, name) for name in before}


# ---- The step -------------------------------------------------------------------------------------------------------

COMMON = [
    *("--num_workers", "0", "--device", "cpu", "--max_update", "50", "--lr", "0.01", "--no_save"),
    *("--max_tokens", "40000", "--mask_length", "3"),
]
PRETRAIN = [*MODEL_FLAGS, "--num_negatives", "10"]
PLAIN = ["--hourglass_transformer", "", "--encoder_layers", "2"]
LARGE = [*PLAIN, "--extractor_mode", "layer_norm", "--layer_norm_first", "--conv_bias", "--normalize"]
STEP = 39  # an update in which LayerDrop leaves out a layer
TWO_BY_TWO = ["--num_concat_batches", "2", "--update_freq", "2"]
NORM = ["_local_scalar_dense"]  # fp16 asks whether the gradients overflowed
CTC = ["_ctc_loss", "_ctc_loss_backward"]  # torch's kernels for CUDA copy the lengths to the device and wait

Holds = Callable[[Run, Sequence[Batch]], bool]


def anything(run: Run, batches: Sequence[Batch]) -> bool:
    return True


def padded(run: Run, batches: Sequence[Batch]) -> bool:
    return any(batch.padded for batch in batches)


def cropped(run: Run, batches: Sequence[Batch]) -> bool:
    return not any(batch.padded for batch in batches)


def joined(run: Run, batches: Sequence[Batch]) -> bool:
    return [len(batch.sub_batches) for batch in batches] == [2, 2]


def drops_a_layer(run: Run, batches: Sequence[Batch]) -> bool:
    trunk = run.task.model if isinstance(run.task, PretrainTask) else run.task.model.w2v
    return not all(trunk.encoder.kept)


def half(run: Run, batches: Sequence[Batch]) -> bool:
    return run.task.model.final_proj.weight.dtype in HALF


# flags, what must hold for the case to be what it says, and what it may wait for
PRETRAINING: dict[str, tuple[list[str], Holds, list[str]]] = {
    "cropped": (PLAIN, cropped, []),
    "cropped, Hourglass": ([], cropped, []),
    "padded": ([*PLAIN, "--enable_padding"], padded, []),
    "padded, Hourglass": (["--enable_padding"], padded, []),
    "padded, checkpoints": ([*PLAIN, "--enable_padding", "--checkpoint_activations"], padded, []),
    "padded, linear Hourglass": (["--enable_padding", "--hourglass_resample", "linear"], padded, []),
    "sub-batches": (TWO_BY_TWO, joined, []),
    "padded sub-batches": ([*TWO_BY_TWO, "--enable_padding"], joined, []),
    "other negatives": (["--cross_sample_negatives", "5", "--codebook_negatives", "5"], anything, []),
    "negatives from everywhere": (
        ["--negatives_from_everywhere", "--cross_sample_negatives", "5", "--enable_padding"],
        padded,
        [],
    ),
    "no quantizer": (["--no_quantize_targets"], lambda run, batches: run.task.model.quantizer is None, []),
    "channel masks": (["--mask_channel_prob", "0.3", "--mask_channel_length", "2"], anything, []),
    "all dropouts": (
        ["--dropout_input", "0.1", "--dropout_features", "0.1", "--activation_dropout", "0.1"]
        + ["--feature_grad_mult", "0.1", "--encoder_layerdrop", "0.2"],
        drops_a_layer,
        [],
    ),
    "frozen extractor": (["--feature_grad_mult", "0"], anything, []),
    "clipping and average": (["--clip_norm", "0.1", "--ema", "0.9", "--weight_decay", "0.1"], anything, []),
    "reference padding": (["--reference_padding", "--enable_padding", *TWO_BY_TWO], joined, []),
    "Large": ([*LARGE, "--enable_padding"], padded, []),
    "bf16": (["--bf16", "--clip_norm", "0.1", "--enable_padding"], half, []),
    "bf16, all in fp32": (["--bf16", "--fp32_ops", *FP32_OPS], half, []),
    "bf16 autocast": (["--bf16", "--amp"], anything, []),
    "fp16": (["--fp16", "--clip_norm", "0.1", "--update_freq", "2"], half, NORM),
    "fp16 autocast": (["--fp16", "--amp"], anything, NORM),
}
FINETUNING: dict[str, tuple[list[str], Holds, list[str]]] = {
    "padded": (["--final_dropout", "0.1", "--encoder_layerdrop", "0.2"], drops_a_layer, CTC),
    "two passes, masks": (["--update_freq", "2", "--mask_channel_prob", "0.3", "--ema", "0.9"], padded, CTC * 2),
    "frozen": (["--freeze_finetune_updates", "40"], lambda run, batches: run.task.model.frozen, CTC),
    "bf16": (["--bf16", "--clip_norm", "0.1"], padded, CTC),
    "fp16": (["--fp16", "--blank_weight", "0.1"], padded, [*CTC, *NORM]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), number=14)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    """A pre-trained checkpoint."""
    output = tmp_path_factory.mktemp("saved")
    path = checkpoint.update_path(output, 1)
    run = build("pretrain", data, output, PRETRAIN)
    checkpoint.save(path, run.state_dict(run.train_loader.state_dict()))
    return path


def build(mode: str, data: Path, output: Path, more: Sequence[str]) -> Run:
    config = parse_train([mode, "--data", str(data), "--output_dir", str(output), *COMMON, *more])
    return build_run(config, torch.device("cpu"), ["test"])


def check_step(run: Run, holds: Holds, expected: Sequence[str]) -> None:
    """Between the hand-over of the batches and the end of the update nothing waits but what is expected.

    The first step does not count: it may bring constants to the device.
    """
    train.train_step(run, run.train_loader.next_update(), STEP - 1)
    batches = run.train_loader.next_update()
    before = [weight.clone() for weight in run.optimizer.master_weights().values()]
    with host_waits() as waits:
        assert train.train_step(run, batches, STEP)
    assert [found.split()[1] for found in waits.found] == list(expected), waits.found
    assert holds(run, batches)
    assert any(name.endswith("_backward") for name in waits.seen)
    after = run.optimizer.master_weights().values()
    assert not all(weight.equal(old) for weight, old in zip(after, before, strict=True))


@pytest.fixture(params=["runs", "mask"])
def keys_as(request, monkeypatch) -> None:
    """Padded rows are attended to by runs of one length, or, as on a GPU with short runs, with a mask."""
    monkeypatch.setitem(attention.ROWS_OF_A_RUN, "cpu", 1 if request.param == "runs" else 1000)


@pytest.mark.parametrize("case", [case for case in PRETRAINING if "padded" in case])
def test_a_padded_step_waits_for_nothing_in_either_form_of_attention(case, data, tmp_path, keys_as):
    test_a_step_of_pretraining_waits_for_nothing(case, data, tmp_path)


@pytest.mark.parametrize("case", PRETRAINING)
def test_a_step_of_pretraining_waits_for_nothing(case, data, tmp_path):
    more, holds, expected = PRETRAINING[case]
    flags = [*PRETRAIN, *more]
    if "--no_quantize_targets" in flags:
        place = flags.index("--latent_vars")
        del flags[place : place + 2]
    check_step(build("pretrain", data, tmp_path, flags), holds, expected)


@pytest.mark.parametrize("case", FINETUNING)
def test_a_step_of_finetuning_waits_for_ctc_alone(case, data, saved, tmp_path, keys_as):
    more, holds, expected = FINETUNING[case]
    check_step(build("finetune", data, tmp_path, ["--w2v_path", str(saved), *more]), holds, expected)
