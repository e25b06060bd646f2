"""Finds, in a program run on the CPU, what would make the host wait if its tensors lay on a CUDA device.

Three things do: a value or a size that is read back from the device, data of the host that is copied to it without
having been pinned, and a copy that blocks. Operations are seen where torch dispatches them, so those of the
backward pass and those inside torch's own Python code are found too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# torch's own marks: a value, or a size that depends on values, is handed to the host
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# without such a mark, but their CUDA kernels check values on the host, or copy lengths of the host and wait
UNMARKED = {
    *("equal", "allclose", "multinomial", "_linalg_check_errors", "embedding_renorm_"),
    *("_ctc_loss", "_ctc_loss_backward"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
HOST_DATA = "lift_fresh"  # what torch.tensor, as_tensor, from_numpy and an index given as a list begin with
READS = ("cpu", "numpy", "tolist", "__array__", "__dlpack__", "__repr__")  # not dispatched for CPU tensors


class HostWaits(TorchDispatchMode):
    """`found`: each wait as "file:line operation", the line being the innermost one of the project.

    In the backward pass that is the line that started it; the autograd node is told then. `seen` holds the names of
    all operations. It cannot see whether a tensor given to to() lies on that device already, nor the device of
    tensors that one operation mixes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: set[str] = set()
        self._quiet = False
        self._assigns_number = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if _waits(name, func, args, kwargs) and not (self._assigns_number and _fills(name, args)):
            self.record(name)
        return func(*args, **kwargs)

    def record(self, operation: str) -> None:
        if self._quiet:
            return
        node = torch._C._current_autograd_node()
        self.found.append(f"{_place()} {operation}{f' in {node.name()}' if node else ''}")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    @contextmanager
    def assigning(self, value: Any) -> Iterator[None]:
        self._assigns_number = isinstance(value, (bool, int, float))
        try:
            yield
        finally:
            self._assigns_number = False


def _waits(name: str, func: Any, args: Any, kwargs: Any) -> bool:
    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name == HOST_DATA or name in UNMARKED or bool(TAGS & set(func.tags))


def _fills(name: str, args: Any) -> bool:
    """Whether this part of x[index] = number becomes a fill: the number itself, and a single boolean mask."""
    if name == HOST_DATA:
        return args[0].dim() == 0
    return name == "index_put_" and sum(index is not None for index in args[1]) == 1


def _place() -> str:
    """The innermost line of the project that is being executed; its environment may lie in its folder."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _blocks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether to() with these arguments is a copy between devices that blocks."""
    device = kwargs.get("device", args[0] if args else None)
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    return isinstance(device, (str, int, torch.device)) and not non_blocking


@contextmanager
def host_waits() -> Iterator[HostWaits]:
    """Within the context, collect what would wait for the device."""
    waits = HostWaits()

    def noted(name: str, when: Callable[[tuple, dict], bool] = lambda args, kwargs: True) -> Any:
        original = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if when(args, kwargs):
                waits.record(name)
            with waits.quiet():  # one method may call another
                return original(tensor, *args, **kwargs)

        return patch.object(Tensor, name, method)

    assign = Tensor.__setitem__

    def assign_on_cuda(tensor: Tensor, index: Any, value: Any) -> None:
        with waits.assigning(value):
            assign(tensor, index, value)

    one_hot = F.one_hot

    def one_hot_on_cuda(index: Tensor, num_classes: int = -1) -> Tensor:
        """The CPU checks the range of the values on the host; CUDA reads nothing, unless it must find the number."""
        if num_classes < 0:
            waits.record("one_hot")
        with waits.quiet():
            return one_hot(index, num_classes)

    patches = [noted(name) for name in READS]
    patches += [noted("to", _blocks), patch.object(F, "one_hot", one_hot_on_cuda)]
    patches.append(patch.object(Tensor, "__setitem__", assign_on_cuda))
    for each in patches:
        each.start()
    try:
        with waits:
            yield waits
    finally:
        for each in patches:
            each.stop()
