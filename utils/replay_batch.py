"""Runs one recorded update again, and prints the first operation whose result is not finite.

The update is that of a file bad_batch_update{N}_rank{R}.pt, with the weights of a checkpoint: the same masks, noise,
negatives and dropout, the share of one process.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the toolkit

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import checkpoint, distributed, rng
from common.errors import CheckpointError
from common.labels import Dictionary
from common.precision import MixedPrecisionOptimizer, to_half
from common.schedules import make_schedule
from utils import program
from wav2vec2 import bad_batch
from wav2vec2.bad_batch import BadBatch
from wav2vec2.build import HALF, build_model, build_optimizer, build_task, fp32_modules
from wav2vec2.config import Config
from wav2vec2.convert import native
from wav2vec2.start import load_weights
from wav2vec2.task import FinetuneTask, PretrainTask

ROOT = Path(__file__).resolve().parent.parent
_UNFILLED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_", "empty_permuted")
_OWN_MODULE, _TRACEBACK = "module", "traceback_"  # in the metadata of an autograd node; torch names the second


@dataclass(frozen=True)
class Finding:
    """An operation that made something of finite values that is not."""

    phase: str  # forward, backward, update
    operation: str
    module: str
    place: str  # file:line, of the forward pass
    result: str
    inputs: tuple[str, ...]
    nan: bool

    def text(self) -> str:
        """For the console."""
        where = f"{self.phase}, {self.operation} in {self.module or 'no module'} ({self.place or 'place unknown'})"
        lines = [where, f"  result  {self.result}", *(f"  input   {text}" for text in self.inputs)]
        return "\n".join(lines)


class Watch(TorchDispatchMode):
    """Looks at what goes into and comes out of every operation; `found` in the order in which they ran.

    NaN counts where no input has one. Infinity counts where no input has one and none was asked for, as masks do.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: list[Finding] = []
        self.phase = "forward"
        self._stack: list[str] = []
        self._module = module

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Within the context it is known which module computes."""
        hooks = []
        for name, module in self._module.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self._stack.append(name)

            def leave(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
                self._stack.pop()
                _mark(result, args, name)

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of the operation."""
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        had = _spoilt(inputs)
        told = tuple(map(describe, inputs)) if not self.found else ()  # before an operation in place changes them
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in _UNFILLED:
            return result
        nan, infinite = _spoilt(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        wanted = any(isinstance(leaf, float) and abs(leaf) == float("inf") for leaf in leaves)
        if (nan and not had[0]) or (infinite and not (had[1] or wanted or nan)):
            self._record(func, result, told or tuple(map(describe, inputs)), nan=nan)
        return result

    def _record(self, func: Any, result: Any, inputs: tuple[str, ...], *, nan: bool) -> None:
        module, place = self._stack[-1] if self._stack else "", _place(traceback.format_stack())
        operation = str(func).removesuffix(".default")
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        if node is not None:
            module, place = _metadata(node).get(_OWN_MODULE, ""), _place(_metadata(node).get(_TRACEBACK, ()))
            operation += f" in {node.name()}"
        shown = "; ".join(describe(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.found.append(Finding(self.phase, operation, module, place, shown, inputs, nan))


@dataclass(frozen=True)
class Report:
    """What became of the update."""

    loss: float
    grad_norm: float
    updated: bool
    found: list[Finding]
    weights: list[str]  # names of those that are not finite afterwards

    @property
    def finite(self) -> bool:
        """Whether nothing went wrong."""
        return not self.weights and all(map(_is_finite, (self.loss, self.grad_norm)))


def replay(state: dict[str, Any], path: Path, recorded: BadBatch, device: torch.device) -> Report:
    """Make the update of a recorded batch with the weights of a checkpoint."""
    config = native.saved_config(state, path)
    task, optimizer = rebuild(config, state, path, device)
    watch = Watch(task)
    task.set_step(recorded.step)
    optimizer.freeze(task.frozen_groups)
    count = torch.full((), recorded.count, dtype=torch.float64, device=device)
    lr = make_schedule(**config.optim.schedule(config.model.encoder_embed_dim))(recorded.step)
    total = 0.0
    with watch.modules(), torch.autograd.set_detect_anomaly(True, check_nan=False), watch:
        for micro, batch in enumerate(recorded.batches):
            rng.seed_all(recorded.seed, "dropout", recorded.step, micro, recorded.rank)
            watch.phase = "forward"
            loss, _ = task(batch.to(device), count)
            loss = loss * recorded.world  # as the mean over processes needs it
            watch.phase = "backward"
            optimizer.backward(loss)
            total += loss.item()
        watch.phase = "update"
        norm = optimizer.clip_grad_norm(config.optim.clip_norm).item()
        updated = optimizer.step(lr)
    bad = [name for name, weight in optimizer.master_weights().items() if not torch.isfinite(weight).all()]
    return Report(total, norm, updated, watch.found, bad)


def rebuild(
    config: Config, state: dict[str, Any], path: Path, device: torch.device
) -> tuple[PretrainTask | FinetuneTask, MixedPrecisionOptimizer]:
    """The model and its optimizer as they were in training."""
    dictionary = Dictionary.from_symbols(state["labels"]) if state.get("labels") else None
    model = build_model(config, dictionary)
    load_weights(model, state["model"], path)
    bad = [name for name, weight in state["model"].items() if not torch.isfinite(weight).all()]
    if bad:
        raise CheckpointError(f"{path}: has weights that are not finite ({bad[0]}); use an earlier checkpoint")
    if config.precision.o2:
        to_half(model, HALF[config.precision.name], fp32_modules(model, config.precision.kept_in_fp32()))
    task = build_task(config, model).to(device)
    optimizer = build_optimizer(config, model)
    if config.precision.o2:
        optimizer.load_master(state["model"])
    if state.get("optimizer"):
        optimizer.load_state_dict(state["optimizer"])
    if optimizer.scaler and state.get("scaler"):
        optimizer.scaler.load_state_dict(state["scaler"])
    return task, optimizer


def describe(tensor: Tensor) -> str:
    """Shape, type, and what is wrong with the values."""
    nan, infinite = _spoilt([tensor])
    state = " and ".join(word for word, is_so in (("NaN", nan), ("infinity", infinite)) if is_so)
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, {f'has {state}' if state else 'finite'}"


def loudest(recorded: BadBatch) -> str:
    """The largest sample of the audio, and whose it is."""
    peaks = [
        (float(row.abs().max()), name)
        for batch in recorded.batches
        for row, name in zip(batch.audio_BS, batch.ids, strict=True)
    ]
    peak, name = max(peaks, key=lambda pair: pair[0] if pair[0] == pair[0] else float("inf"))
    return f"{peak:g}, in {name}"


def _spoilt(tensors: Iterator[Tensor] | Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether one of the tensors has NaN, and whether one has an infinite value."""
    nan = infinite = False
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            nan = nan or bool(torch.isnan(tensor).any())
            infinite = infinite or bool(torch.isinf(tensor).any())
    return nan, infinite


def _mark(result: Any, args: Any, name: str) -> None:
    """Tell the autograd nodes between inputs and result of a module whose they are; inner modules come first."""
    borders = {leaf.grad_fn for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    todo = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node in borders:
            continue
        seen.add(node)
        _metadata(node).setdefault(_OWN_MODULE, name)
        todo += [following for following, _ in node.next_functions]


def _metadata(node: Any) -> dict[str, Any]:
    """What is noted at an autograd node (torch's own stubs take it for a method)."""
    return node.metadata


def _place(lines: Sequence[str]) -> str:
    """file:line of the innermost line of the toolkit in a traceback, this program aside."""
    for line in reversed(lines):
        name, _, rest = line.strip().removeprefix('File "').partition('", line ')
        path = Path(name)
        own = path.is_relative_to(ROOT) and "site-packages" not in path.parts  # an environment may lie in the checkout
        if own and path != Path(__file__).resolve():
            return f"{path.relative_to(ROOT)}:{rest.split(',')[0]}"
    return ""


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def main(argv: list[str] | None = None) -> None:
    """Print what is run, then what is found."""
    parser = program.Parser(__doc__ or "")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint of this toolkit, best that before")
    parser.add_argument("batch", metavar="BATCH_FILE", type=Path, help="bad_batch_update{N}_rank{R}.pt of the run")
    parser.add_argument("--device", default="cpu", choices=distributed.DEVICES, help="where to run it")
    args = parser.parse(argv)
    recorded, state = bad_batch.read(args.batch), checkpoint.load(args.checkpoint)
    if state["mode"] != recorded.mode:
        raise CheckpointError(
            f"{args.checkpoint}: is of {state['mode']}, the batch of {recorded.mode}; use its own run"
        )
    step = (state.get("progress") or {}).get("step")
    print(
        f"update {recorded.step + 1} (epoch {recorded.epoch}, update {recorded.position + 1} of it), process "
        f"{recorded.rank} of {recorded.world}, with the weights of update {step}"
    )
    for batch in recorded.batches:
        print(f"  audio {list(batch.audio_BS.shape)}: {' '.join(batch.ids)}")
    print(f"  largest sample: {loudest(recorded)}")
    with distributed.session(args.device) as device:
        report = replay(state, args.checkpoint, recorded, device)
    print(f"loss {report.loss:g}, gradient norm {report.grad_norm:g}")
    if report.finite:
        print("everything is finite with these weights; if the run's were others, they had gone wrong before")
        return
    print("the first operation that is not finite:" if report.found else "no single operation made it so")
    for finding in report.found[:1] + [later for later in report.found[1:] if later.nan][:1]:
        print(finding.text())
    if report.weights:
        print(f"not finite after the update: {len(report.weights)} weights, such as {report.weights[0]}")
    if not report.updated:
        print("the update was skipped: its gradients overflow in fp16")


if __name__ == "__main__":
    program.run(main)
