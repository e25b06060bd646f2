"""Metrics stay on the device until reduce(), which sums, averages, and picks over calls and ranks."""

# SPDX-License-Identifier: Apache-2.0
import math
import socket

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import distributed
from common.metrics import Metrics

TABLE = {"tokens": "sum", "perplexity": "mean", "lr": "last", "grad_norm": "max"}
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class RecordOperators(TorchDispatchMode):
    """Names of all operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def count_reads(monkeypatch):
    reads = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return reads


def test_each_reduction_over_add_calls():
    metrics = Metrics(TABLE)
    metrics.add({"tokens": torch.tensor(3), "perplexity": torch.tensor(1.0), "lr": 0.1, "grad_norm": -2.0})
    metrics.add({"tokens": 4, "perplexity": 5.0, "lr": torch.tensor(0.25), "grad_norm": torch.tensor(-3.0)})
    metrics.add({"perplexity": torch.tensor(3.0, dtype=torch.bfloat16)})
    assert metrics.reduce("cpu") == {"tokens": 7.0, "perplexity": 3.0, "lr": 0.25, "grad_norm": -2.0}


def test_last_takes_the_later_of_a_number_and_a_tensor():
    for first, second in ((torch.tensor(1.0), 2.0), (1.0, torch.tensor(2.0))):
        metrics = Metrics(TABLE)
        metrics.add({"lr": first})
        metrics.add({"lr": second})
        assert metrics.reduce("cpu") == {"lr": 2.0}


def test_reduce_starts_anew_and_leaves_out_what_was_not_added():
    metrics = Metrics(TABLE)
    metrics.add({"tokens": 4})
    assert metrics.reduce("cpu") == {"tokens": 4.0}
    assert metrics.reduce("cpu") == {}
    metrics.add({"grad_norm": torch.tensor(-1.0)})
    assert metrics.reduce("cpu") == {"grad_norm": -1.0}


def test_result_follows_the_order_of_the_table():
    metrics = Metrics(TABLE)
    metrics.add({"grad_norm": 1.0})
    metrics.add({"lr": 1.0, "tokens": 1.0})
    assert list(metrics.reduce("cpu")) == ["tokens", "lr", "grad_norm"]


def test_sums_of_large_counts_are_exact():
    metrics = Metrics(TABLE)
    for _ in range(3):
        metrics.add({"tokens": torch.tensor(2**24 + 1)})
    assert metrics.reduce("cpu") == {"tokens": 3 * (2**24 + 1)}


@pytest.mark.parametrize("name", ["tokens", "perplexity", "grad_norm"])
@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0), (torch.tensor(math.nan), torch.tensor(1.0))])
def test_not_a_number_is_never_hidden_by_other_values(name, values):
    metrics = Metrics(TABLE)
    for value in values:
        metrics.add({name: value})
    assert math.isnan(metrics.reduce("cpu")[name])


def test_a_value_changed_after_add_does_not_change_the_metric():
    metrics = Metrics(TABLE)
    value = torch.tensor(1.0, dtype=torch.float64)
    metrics.add({"tokens": value, "lr": value})
    value.fill_(100.0)
    assert metrics.reduce("cpu") == {"tokens": 1.0, "lr": 1.0}


def test_sums_so_far_are_those_of_their_moment():
    metrics = Metrics(TABLE)
    assert metrics.so_far(["tokens"]) == {}
    kept = []
    for value in (1.0, 2.0, math.nan, 4.0):
        metrics.add({"tokens": torch.tensor(value)})
        kept.append(metrics.so_far(["tokens", "lr"]))
    assert [sums["tokens"].item() for sums in kept[:2]] == [1.0, 3.0]
    assert [math.isnan(sums["tokens"].item()) for sums in kept] == [False, False, True, True]


def test_metrics_hold_no_graph():
    weight = torch.ones(1, requires_grad=True)
    metrics = Metrics(TABLE)
    metrics.add({"tokens": (weight * 2).sum()})
    assert not any(tensor.requires_grad for tensor in metrics._tensors.values())


def test_add_never_reads_from_the_device_and_reduce_reads_once(monkeypatch):
    metrics = Metrics(TABLE)
    values = {name: torch.tensor(1.5) for name in TABLE}
    reads = count_reads(monkeypatch)
    with RecordOperators() as operators:
        for _ in range(3):
            metrics.add(values)
            metrics.add(dict.fromkeys(TABLE, 2.5))
    assert reads == []
    assert operators.names
    assert not [name for name in operators.names if "_local_scalar_dense" in name or "is_nonzero" in name]
    metrics.reduce("cpu")
    assert reads == ["tolist"]


def test_add_works_on_tensors_without_data():
    metrics = Metrics(TABLE)
    for _ in range(2):
        metrics.add({name: torch.ones(1, device="meta") for name in TABLE})


def test_unknown_names_and_several_elements_are_internal_errors():
    metrics = Metrics(TABLE)
    with pytest.raises(KeyError, match="'los' is not in the table"):
        metrics.add({"los": 1.0})
    with pytest.raises(ValueError, match=r"'lr': a tensor of shape \(2,\)"):
        metrics.add({"lr": torch.ones(2)})
    with pytest.raises(ValueError, match="'median' is none of"):
        Metrics({"loss": "median"})


def test_one_all_reduce_serves_all_metrics(monkeypatch):
    calls = []
    real = distributed.sum_across_ranks
    monkeypatch.setattr(distributed, "sum_across_ranks", lambda *a: calls.append(a) or real(*a))
    metrics = Metrics(TABLE)
    metrics.add(dict.fromkeys(TABLE, 1.0))
    metrics.reduce("cpu")
    assert len(calls) == 1


def run_rank(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metrics = Metrics(TABLE)
    metrics.add({"tokens": torch.tensor(10 + rank), "perplexity": 1.0 + rank, "lr": 0.1 + rank})
    metrics.add({"grad_norm": torch.tensor(-5.0 + rank)} if rank == 1 else {"perplexity": torch.tensor(6.0)})
    first = metrics.reduce("cpu")
    metrics.add({"lr": 7.0} if rank == 1 else {"tokens": 1})
    results.put((rank, first, metrics.reduce("cpu")))
    torch.distributed.destroy_process_group()


def test_two_ranks_that_add_different_metrics_agree():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    answers = [results.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    for _, first, second in answers:
        assert first == {"tokens": 21.0, "perplexity": pytest.approx(3.0), "lr": 0.1, "grad_norm": -4.0}
        assert second == {"tokens": 1.0}
