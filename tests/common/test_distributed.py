"""One process, two gloo processes started by torchrun, and environments that cannot work.

Run as a program, this file is what the two processes execute.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common import distributed
from common.errors import ConfigError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def make_model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    model.register_buffer("constant", torch.ones(1, dtype=torch.float64))
    return model


def make_data():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(parts, device):
    """Gradients of the sum over all rows as the training step makes them: sent around with the last part only."""
    engine = distributed.wrap(make_model(), device, bucket_cap_mb=1)
    for number, part in enumerate(parts):
        with contextlib.nullcontext() if number == len(parts) - 1 else engine.no_sync():
            (engine(part).sum() * distributed.world_size()).backward()
    return [parameter.grad for parameter in engine.module.parameters()]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    clean = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER, "OMP_NUM_THREADS")}
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes saw: a list of dicts by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run("report", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_one_process_needs_no_group():
    with distributed.session("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
        assert distributed.is_main()
        distributed.barrier()
        assert distributed.gather_objects("a") == ["a"]
        assert distributed.broadcast_object("a") == "a"


def test_a_sum_is_a_new_float64_tensor_of_the_same_shape():
    value = torch.tensor([1.5, 2.5], requires_grad=True)
    total = distributed.sum_across_ranks(value, "cpu")
    total += 1
    assert total.dtype == torch.float64
    assert total.tolist() == [2.5, 3.5]
    assert value.tolist() == [1.5, 2.5]
    double = torch.ones(2, dtype=torch.float64)
    distributed.sum_across_ranks(double, "cpu").add_(1)
    assert double.tolist() == [1, 1]
    count = distributed.sum_across_ranks(2**53 - 1, "cpu")
    assert count.shape == ()
    assert int(count) == 2**53 - 1


def test_a_single_process_is_wrapped_like_many():
    model = make_model()
    engine = distributed.wrap(model, torch.device("cpu"))
    assert engine.module is model
    with engine.no_sync():
        assert torch.equal(engine(make_data()), model(make_data()))
    engine.eval()
    assert not model.training


def test_ranks_know_who_they_are(two_ranks):
    assert [one["rank"] for one in two_ranks] == [0, 1]
    assert [one["local_rank"] for one in two_ranks] == [0, 1]
    assert [one["main"] for one in two_ranks] == [True, False]
    assert {one["world"] for one in two_ranks} == {2}
    assert {one["backend"] for one in two_ranks} == {"gloo"}


def test_sums_and_objects_reach_every_rank(two_ranks):
    for one in two_ranks:
        assert one["sum"] == 3.0
        assert one["sums"] == [10.5, 20.5]
        assert one["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert one["from_0"] == "rank 0"
        assert one["from_1"] == "rank 1"


def test_two_ranks_with_accumulation_give_the_gradients_of_one_process(two_ranks):
    expected = gradients([make_data()], torch.device("cpu"))
    for one in two_ranks:
        for got, want in zip(one["gradients"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=0, atol=1e-14)


def test_the_group_is_gone_after_the_session(two_ranks):
    assert not any(one["initialized_after"] for one in two_ranks)


def test_torchrun_gives_each_process_one_thread(two_ranks):
    assert {one["threads"] for one in two_ranks} == {1}


def test_an_error_on_one_rank_ends_the_run_instead_of_waiting_for_the_others():
    start = time.monotonic()
    done = run("fail")
    assert done.returncode != 0
    assert "only rank 1 has a problem" in done.stderr
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("cores", "processes", "threads"), [(8, 2, 4), (2, 4, 1)])
def test_cpu_processes_share_the_cores(monkeypatch, cores, processes, threads):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(distributed, "usable_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    distributed.set_threads(torch.device("cpu"))
    assert chosen == [threads]


def test_the_users_thread_count_and_a_single_process_are_left_alone(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    distributed.set_threads(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    distributed.set_threads(torch.device("cpu"))
    assert chosen == []


def refuse(device):
    with pytest.raises(ConfigError) as error, distributed.session(device):
        pytest.fail("the session must not start")
    return str(error.value)


def test_cuda_without_a_gpu_is_refused_and_auto_takes_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refuse("cuda")
    assert "--device tpu" in refuse("tpu")
    with distributed.session("auto") as device:
        assert device.type == "cpu"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = refuse(device)
    assert f"--device {device}" in message
    assert "NUM_GPUS=2" in message


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with distributed.session("auto") as device:
        assert device == torch.device("cuda", 1)
    assert chosen == [device]


def test_an_incomplete_launcher_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    message = refuse("cpu")
    assert "MASTER_ADDR" in message
    assert "torchrun" in message
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE two" in refuse("cpu")


def report(folder):
    """Write what this process sees."""
    with distributed.session("cpu") as device:
        rank = distributed.rank()
        rows = make_data()[2 * rank : 2 * rank + 2]
        distributed.barrier()
        seen = {
            "rank": rank,
            "world": distributed.world_size(),
            "local_rank": distributed.local_rank(),
            "main": distributed.is_main(),
            "backend": torch.distributed.get_backend(),
            "threads": torch.get_num_threads(),
            "sum": float(distributed.sum_across_ranks(1.0 + rank, device)),
            "sums": distributed.sum_across_ranks(torch.tensor([5.0, 10.0]) + rank * 0.5, device).tolist(),
            "gathered": distributed.gather_objects({"rank": rank}),
            "from_0": distributed.broadcast_object(f"rank {rank}"),
            "from_1": distributed.broadcast_object(f"rank {rank}", src=1),
            "gradients": [gradient.tolist() for gradient in gradients(rows.split(1), device)],
        }
    seen["initialized_after"] = torch.distributed.is_initialized()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))


def fail():
    """Rank 1 stops while rank 0 waits for it."""
    with distributed.session("cpu"):
        if distributed.rank() == 1:
            raise RuntimeError("only rank 1 has a problem")
        distributed.barrier()


if __name__ == "__main__":
    {"report": report, "fail": fail}[sys.argv[1]](*sys.argv[2:])
