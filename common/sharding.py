"""Models in shards: torch's fully_shard, and the way between shards and full tensors.

Every process holds a share of each parameter (torch's DTensor): an equal part of its first dimension, fewer rows or
none where that does not divide. Before a group of parameters is needed, it is gathered; afterwards it is given up, and
its gradient is averaged over the processes and scattered to the shares. DTensor is told by its method, because its
module takes 0.8 s to import, which only a sharded run needs.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common import distributed

Item = TypeVar("Item")


class Sharded(distributed.SingleProcess):
    """What shard() gives: `module` and `no_sync()` as DistributedDataParallel has.

    no_sync() changes nothing: the gradient of every micro-batch goes to the shares at once, since one that waits for
    the next would be as large as the model.
    """


def shard(
    engine: nn.Module,
    root: nn.Module,
    groups: Sequence[nn.Module],
    device: torch.device,
    *,
    half: torch.dtype | None = None,
    keep_fp32: Sequence[nn.Module] = (),
) -> Sharded:
    """Split the parameters over all processes and move the shares to `device`, one group after the other.

    Args:
        engine: what is called in training; its parameters are those of `root`, the module that is called as a whole.
        root: holds all groups; what is in none of them is a group with it.
        groups: modules that are gathered one by one.
        device: of this process.
        half: the type in which parameters are gathered. Shares and gradients stay as they are, in full precision.
        keep_fp32: modules that are gathered as they are; they stay gathered from forward to backward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    # A sum over many processes in half precision would lose digits.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in keep_fp32:
        fully_shard(module, mesh=mesh, mp_policy=whole, reshard_after_forward=False)
    for module in (*groups, root):
        fully_shard(module, mesh=mesh, mp_policy=policy if half else whole)
    return Sharded(engine)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a share of the tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This process's share of a sharded tensor, in the same memory; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(tensor: Tensor, full: Tensor) -> None:
    """Set a tensor, sharded or not, from all of its values."""
    if is_sharded(tensor):
        rows = -(-len(full) // distributed.world_size())
        full = full[distributed.rank() * rows :][:rows]
    local(tensor).copy_(full)


@torch.no_grad()
def gathered(state: Any) -> Any:
    """Nested dicts with every sharded tensor made full, on the CPU of process 0 (None on others); all must call it.

    One tensor at a time, so that no device holds more than the largest of them.
    """
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if not (isinstance(state, Tensor) and is_sharded(state)):
        return state
    full = state.full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if distributed.is_main() else None


def in_step(module: nn.Module, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """The items of this process, each with True; of a sharded module, as many on all processes.

    A forward pass gathers parameters from all processes. So one that has no item left takes part with a copy of
    another's, and is told by False not to count it. At the end the shares can be changed again.
    """
    if not any(is_sharded(parameter) for parameter in module.parameters()):
        yield from ((item, True) for item in items)
        return
    own = iter(items)
    while True:
        item = next(own, None)
        have = distributed.gather_objects(item is not None)
        if not any(have):
            break
        other = item if all(have) else distributed.broadcast_object(item, src=have.index(True))
        yield (other, False) if item is None else (item, True)  # type: ignore[misc]
    reshard(module)


def reshard(module: nn.Module) -> None:
    """Give up what a forward pass without a backward pass has left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
