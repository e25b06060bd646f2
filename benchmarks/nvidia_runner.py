"""A runner for benchmarks/step.py: one pre-training update of NVIDIA DeepLearningExamples' wav2vec 2.0.

    python benchmarks/step.py ... --against_runner benchmarks/nvidia_runner.py --checkout DIR --json OUT

DIR is the folder PyTorch/SpeechRecognition/wav2vec2 of their repository. Its code is imported as it is, and driven as
its train.py does in one process with the flags of its pre-training scripts: forward pass, criterion with its reads of
loss and statistics, backward pass, update. In bf16 and fp16 the update is that of their FP16Optimizer, with loss scale
and gradient norm; in fp32 there is neither, as there.

What stands in for something else:

- `common.fairseq.optim.fused_adam`, which wraps apex's CUDA kernel: torch's fused AdamW, one call for all weights. It
  divides the gradients in the kernel, as apex's does. It serves the CPU, too, for which they have no fused kernel.
- `amp_C`, `editdistance`, `librosa`, `numba`: modules without content. They are imported, but not used in an update.
- On the CPU, while their FP16Optimizer is built: `torch.cuda.is_available` and `torch.cuda.current_device`.

Not in the step: data loading, the transfer to the device, sums of statistics on the host, logging, the schedule of the
learning rate. The masks are the batch's own, handed to their model; it draws its negatives itself, within the step.
Layer norms are apex's on a GPU where apex is installed, else torch's.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.workload import SyntheticBatch, Workload
from common import rng
from common.errors import ConfigError
from wav2vec2.build import HALF
from wav2vec2.config import Config
from wav2vec2.convert.options import from_config

TOP_LEVEL = ("common", "wav2vec2", "fairseq")  # packages of theirs; the last are dummies for reading old checkpoints
FLAGS = {  # of scripts/pretrain_large.sh there
    "fp32": (),
    "bf16": ("--fp32_pos_conv",),
    "fp16": ("--fp32_cosine_sim", "--fp32_conv_norms", "--fp32_pos_conv"),
}


class FusedAdam(torch.optim.AdamW):
    """torch's fused AdamW with the interface of their fused Adam: step() divides the gradients by `scale`."""

    supports_flat_params = True
    supports_step_with_scale = True

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)

    def step(self, closure: Any = None, scale: float = 1.0) -> Any:
        """One update."""
        device = self.param_groups[0]["params"][0].device
        self.grad_scale = torch.full((), float(scale), device=device)  # the kernel divides by it
        return super().step(closure)


def stand_ins() -> dict[str, ModuleType]:
    """The modules that take the place of others; see the head of this file."""
    fused_adam, numba = ModuleType("common.fairseq.optim.fused_adam"), ModuleType("numba")
    vars(fused_adam)["get_fused_adam_class"] = lambda: FusedAdam
    vars(numba)["jit"] = lambda **options: lambda function: function  # they decorate a function of the data loader
    empty = [ModuleType(name) for name in ("amp_C", "editdistance", "librosa")]
    return {module.__name__: module for module in (fused_adam, numba, *empty)}


@contextmanager
def their_modules(checkout: Path) -> Iterator[None]:
    """While this lasts, an import finds the checkout's packages and the stand-ins; ours are back afterwards.

    Their packages have the names of ours, and both live in this process. A module that is imported works on when its
    name stands for another, as long as it imports nothing more; theirs do so while they are built, not in a step.
    """
    borrowed = {*TOP_LEVEL, *stand_ins()}

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in borrowed}

    ours = take()
    sys.modules.update(stand_ins())
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        take()
        sys.modules.update(ours)


@contextmanager
def as_if_cuda(device: torch.device) -> Iterator[None]:
    """What their optimizer asks CUDA for, answered for the CPU: that it is there, and the index of the device."""
    if device.type == "cuda":
        yield
        return
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "current_device", lambda: device.index),
    ):
        yield


class NvidiaStep:
    """Their model, criterion and optimizer; step() is an update of their train.py on one process."""

    def __init__(self, workload: Workload) -> None:
        recipe, device = workload.recipe, workload.device
        checkout = workload.checkout
        if checkout is None or not (checkout / "wav2vec2" / "criterion.py").is_file():
            raise ConfigError(
                f"--checkout{f' {checkout}' if checkout else ''}: must be the folder "
                "PyTorch/SpeechRecognition/wav2vec2 of a clone of https://github.com/NVIDIA/DeepLearningExamples"
            )
        self._dtype = HALF.get(recipe.precision.name, torch.float32)
        rng.seed_all(recipe.run.seed, "weights")
        with their_modules(checkout):
            args = options(recipe, import_module("wav2vec2.arg_parser"))
            self.criterion = import_module("wav2vec2.criterion").Wav2vecCriterion(args)
            self.model = import_module("wav2vec2.utils").build_model(args)[0].to(device, self._dtype).train()
            if args.fp32_pos_conv:
                self.model.encoder.pos_conv.to(dtype=torch.float32)
            with as_if_cuda(device):
                self.optimizer = import_module("common.optimizers").get_optimizer(self.model, args)
        self._clip_norm = args.clip_norm
        self._updates = 0
        self.optimizer.zero_grad()  # takes up the loss scale

    def step(self, batch: SyntheticBatch) -> float:
        """One update; the loss per masked frame, which their criterion reads in any case."""
        self._updates += 1
        self.model.set_num_updates(self._updates)
        loss, count, logged = self.criterion(self.model, self.sample(batch))
        if self._dtype == torch.float32:
            loss.backward()
            self.optimizer.step(scale=count)
        else:
            self.optimizer.backward(loss)
            self.optimizer.multiply_grads(1 / count)
            try:
                self.optimizer.clip_grad_norm(self._clip_norm)
                self.optimizer.step()
            except OverflowError:
                pass  # this update is skipped, and the loss scale is lower from now on
        self.model.set_num_updates(self._updates)
        self.optimizer.zero_grad()
        return logged["loss"] / count

    def sample(self, batch: SyntheticBatch) -> dict[str, Any]:
        """The batch as their criterion takes it."""
        return {
            "id": torch.arange(batch.num_rows),
            "net_input": {"source": batch.audio_BS.to(self._dtype), "mask_indices": batch.mask_BT},
            "sub_batch_sizes": None,
            "sub_batch_lens": None,
            "sample_size": batch.num_masked,
        }

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def options(recipe: Config, arg_parser: Any) -> argparse.Namespace:
    """Their defaults, the flags of their pre-training scripts, and the sizes and settings of the recipe."""
    parser = argparse.ArgumentParser()
    arg_parser.populate_pretraining(parser)
    arg_parser.populate_common(parser)
    args = parser.parse_args(["--output_dir", ".", "--mha", "pyt", "--infonce", *FLAGS[recipe.precision.name]])
    vars(args).update(from_config(recipe), mode="pretrain", world_size=1, bf16_disable_loss_scaler=False)
    return args


build = NvidiaStep  # what benchmarks/step.py looks for
