"""Shares of parameters on three processes: uneven ones and empty ones, against one process with full parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from common import distributed
from common.ema import Ema
from common.optim import parameter_groups
from common.precision import LossScaler, MixedPrecisionOptimizer
from common.sharding import assign, gathered, in_step, is_sharded, local, shard

WORLD = 3
UPDATES = 3
ITEMS = (0, 2, 5)  # of every process in in_step()


class Net(nn.Module):
    """Parameters of 7, 5, 1 and 2 rows: none divides by 3, and two leave processes without a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 7)
        self.left_out = nn.Linear(7, 7)
        self.last = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.rand(1, 5))
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)

    def forward(self, x: Tensor, *, everything: bool = False) -> Tensor:
        h = torch.tanh(self.first(x))
        if everything:
            h = self.left_out(h)
        return self.last(h) * self.scale * self.frozen.sum()


def batches(step: int) -> list[Tensor]:
    """Two for every process."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(WORLD * 2, 3, 4, generator=generator))


def make_optimizer(net: Net, scaled: bool) -> tuple[MixedPrecisionOptimizer, Ema]:
    optimizer = MixedPrecisionOptimizer(
        parameter_groups(net, lambda name: name.split(".")[0]),
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.1,
        scaler=LossScaler(init=8.0) if scaled else None,
    )
    return optimizer, Ema(0.5, optimizer.master_weights())


def losses(net: nn.Module, step: int) -> list[Tensor]:
    """Of the batches of this process, scaled for the mean over processes."""
    own = batches(step)[distributed.rank() :: distributed.world_size()]
    return [net(x, everything=step == 1).square().sum() * distributed.world_size() for x in own]


def trained(net: Net, scaled: bool) -> tuple[MixedPrecisionOptimizer, Ema, list[float], list[Tensor]]:
    """Some updates: the layer that is left out in most of them, a frozen group, an overflow in one process."""
    optimizer, ema = make_optimizer(net, scaled)
    norms, outputs = [], []
    for step in range(UPDATES):
        optimizer.freeze(["last"] if step == 2 else [])
        for loss in losses(net, step):
            overflow = float("inf") if scaled and step == 0 and distributed.rank() == 0 else 1.0
            optimizer.backward(loss * overflow)
        for parameter in net.parameters():  # full parameters need a gradient, if only of 0
            if parameter.requires_grad and parameter.grad is None and not is_sharded(parameter):
                parameter.grad = torch.zeros_like(parameter)
        norms.append(float(optimizer.clip_grad_norm(0.5)))
        optimizer.step(0.1)
        ema.update(optimizer.master_weights())
        with ema.swapped_in(net), torch.no_grad():
            outputs += [net(batches(step)[0]) for _, _ in in_step(net, [0])]
    return optimizer, ema, norms, outputs


def main() -> None:
    """One process of results()."""
    folder = Path(sys.argv[1])
    found = {}
    with distributed.session("cpu") as device:
        for scaled in (False, True):
            net = Net()
            shard(net, net, [net.first, net.left_out], device)
            optimizer, ema, norms, outputs = trained(net, scaled)
            state = {
                "optimizer": optimizer.state_dict(),
                "weights": optimizer.master_weights(),
                "ema": ema.state_dict(),
            }
            found[str(scaled)] = {**gathered(state), "norms": norms, "outputs": outputs}
        weight = optimizer.master_weights()["first.weight"]
        full = torch.arange(28.0).view(7, 4)
        assign(weight, full)
        found["assigned"] = gathered({"weight": weight, "number": 3})
        found["rows"] = distributed.gather_objects(
            {name: len(local(parameter)) for name, parameter in net.named_parameters()}
        )
        mine = [f"{distributed.rank()}/{number}" for number in range(ITEMS[distributed.rank()])]
        found["in_step"] = distributed.gather_objects(list(in_step(net, mine)))
        if distributed.is_main():
            torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "overflow"])
def test_updates_of_shares_are_those_of_full_parameters(results, scaled):
    """One process with the same batches, whose losses it adds up: WORLD times the mean over processes."""
    optimizer, ema, norms, outputs = trained(Net(), scaled)
    found = results[str(scaled)]
    assert found["norms"] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert torch.isfinite(torch.tensor(norms[0])) != scaled
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name, weight in optimizer.master_weights().items():
        torch.testing.assert_close(found["weights"][name], weight, **close)
        torch.testing.assert_close(found["ema"][name], ema.weights()[name], **close)
    for name, entry in optimizer.state_dict().items():
        assert found["optimizer"][name]["step"] == entry["step"]
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found["optimizer"][name][kind], entry[kind], **close)
    torch.testing.assert_close(found["outputs"], outputs, **close)


@pytest.mark.slow
def test_shares_are_rows_and_some_have_none(results):
    rows = results["rows"]
    assert [share["first.weight"] for share in rows] == [3, 3, 1]
    assert [share["scale"] for share in rows] == [1, 0, 0]
    assert [share["frozen"] for share in rows] == [1, 1, 0]


@pytest.mark.slow
def test_a_full_tensor_goes_into_shares_and_comes_back(results):
    assert torch.equal(results["assigned"]["weight"], torch.arange(28.0).view(7, 4))
    assert results["assigned"]["number"] == 3


@pytest.mark.slow
def test_every_process_gets_as_many_items_and_counts_its_own(results):
    for rank, items in enumerate(results["in_step"]):
        assert len(items) == max(ITEMS)
        assert [item for item, own in items if own] == [f"{rank}/{number}" for number in range(ITEMS[rank])]
        assert all(item is not None for item, _ in items)


def test_full_parameters_pass_through():
    net = nn.Linear(2, 2)
    assert local(net.weight) is net.weight
    assert list(in_step(net, "ab")) == [("a", True), ("b", True)]
    state = {"weight": net.weight, "list": [1, net.bias]}
    assert gathered(state)["weight"] is net.weight


if __name__ == "__main__":
    main()
