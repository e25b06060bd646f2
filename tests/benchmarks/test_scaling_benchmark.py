"""benchmarks/scaling.py: what it calls efficiency and communication, which steps exchange gradients, its file.

Run as a program, this file is what two processes execute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import scaling
from benchmarks.our_step import OurStep
from benchmarks.scaling import ScalingFlags, kinds_of_step, report, resolve
from benchmarks.workload import Workload
from common import distributed
from common.errors import ConfigError, TrainingError

ROOT = Path(__file__).resolve().parents[2]  # not from conftest, which the two processes do not find
OPTIONS = ScalingFlags(
    size="tiny", batch=4, seconds=1.0, ranks=(1, 2), threads=1, rounds=2, passes=1, steps=1, json="-"
)
TINY = ["--size", "tiny", "--batch", "4", "--seconds", "1", "--ranks", "1", "2", "--threads", "1"]
FRAMES = 49  # of a second at 16 kHz


def group(ranks: int, rounds: list[dict[str, float]]) -> dict:
    """What the processes of one number of ranks write."""
    return {
        "rounds": rounds,
        "rows": {"strong": 4 // ranks, "weak": 4},
        "frames": {"strong": 4 * FRAMES, "weak": 4 * FRAMES * ranks},
        "threads": {"strong": 1, "one_process": 2},
        "bucket_bytes": None if ranks == 1 else 25 << 20,
        "gradient_bytes": 1000,
    }


def two_ranks(strong: float, weak: float, share: float) -> dict:
    kinds = {"strong": strong, "weak": weak}
    without = {f"{kind}_no_sync": seconds * (1 - share) for kind, seconds in kinds.items()}
    return group(2, [kinds | without] * 3)


def alone(seconds: float, one_process: float) -> dict:
    return group(1, [{"strong": seconds, "one_process": one_process}] * 3)


def test_two_ranks_that_halve_the_time_scale_perfectly():
    result = report(OPTIONS, [{1: alone(6.0, 4.0), 2: two_ranks(strong=3.0, weak=6.0, share=0.25)}])
    one, two = result["runs"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for mode in ("strong", "weak"):
        assert one[mode]["efficiency"]["median"] == pytest.approx(1)
        assert two[mode]["efficiency"]["median"] == pytest.approx(1)
        assert two[mode]["communication_share"]["median"] == pytest.approx(0.25)
        assert one[mode]["communication_share"] is None
        # one process with both cores: 4 rows in 4 s; two ranks: 4 rows in 3 s, or 8 in 6 s
        assert two[mode]["over_one_process"]["median"] == pytest.approx(4 / 3)
        assert one[mode]["over_one_process"]["median"] == pytest.approx(4 / 6)
    assert (two["strong"]["rows_per_rank"], two["weak"]["rows_per_rank"]) == (2, 4)
    assert two["weak"]["frames_per_s"] == pytest.approx(8 * FRAMES / 6)
    assert result["one_process"]["frames_per_s"] == pytest.approx(4 * FRAMES / 4)


def test_two_ranks_that_gain_nothing_have_half_the_efficiency():
    result = report(OPTIONS, [{1: alone(6.0, 4.0), 2: two_ranks(strong=6.0, weak=12.0, share=0.0)}])
    for mode in ("strong", "weak"):
        assert result["runs"][1][mode]["efficiency"]["median"] == pytest.approx(0.5)
        assert result["runs"][1][mode]["communication_share"]["median"] == pytest.approx(0)


def test_ratios_are_of_one_pass_so_that_a_machine_that_slows_down_does_not_change_them():
    passes = [
        {1: alone(6.0 * slow, 4.0 * slow), 2: two_ranks(strong=4.0 * slow, weak=8.0 * slow, share=0.1)}
        for slow in (1, 3, 10)
    ]
    for mode in ("strong", "weak"):
        found = report(OPTIONS, passes)["runs"][1][mode]
        assert found["efficiency"]["median"] == pytest.approx(0.75)
        assert found["efficiency"]["quartiles"] == pytest.approx([0.75, 0.75])
        assert found["communication_share"]["quartiles"] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(("gpus", "ranks"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4)), (8, (1, 2, 4, 8))])
def test_every_power_of_two_is_measured_on_the_gpus_that_are_there(gpus, ranks):
    assert resolve(replace(OPTIONS, device="cuda", batch=8, ranks=()), gpus).ranks == ranks


def test_ranks_share_the_cores_and_one_rank_has_as_many_threads(monkeypatch):
    monkeypatch.setattr(scaling, "cpu_count", lambda: 9)
    resolved = resolve(replace(OPTIONS, batch=12, ranks=(4, 2), threads=0), 9)
    assert (resolved.ranks, resolved.threads) == ((1, 2, 4), 2)
    with distributed.session("cpu") as device:
        workload = Workload(resolved.recipe(), device, 1, 16000)
        batch = workload.batch()
        kinds = kinds_of_step(OurStep(workload), {"strong": batch, "weak": batch}, resolved)
    assert {kind: stepper.threads for kind, stepper in kinds.items()} == {"strong": 2, "one_process": 8}


def test_mistakes_are_told_by_flag_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "launch", lambda *_: pytest.fail("was started"))
    monkeypatch.setattr(scaling, "cpu_count", lambda: 2)
    out = str(tmp_path / "out.json")
    cases = [
        ((), "--json"),
        (("--json", str(tmp_path)), "--json"),
        (("--json", out, "--batch", "3"), "--batch 3: .*2 ranks"),
        (("--json", out, "--ranks", "4"), "--ranks 4: there are 2 cores .*--threads"),
        (("--json", out, "--hourglass", "4"), "--hourglass_transformer 4"),
        (("--json", out, "--size", "large", "--hourglass", "[4,(16,4),4]"), "--hourglass .*pre-LN"),
        (("--json", out, "--bucket-cap-mb", "0"), "--bucket_cap_mb 0"),
    ]
    if not torch.cuda.is_available():
        cases.append((("--json", out, "--device", "cuda"), "--device cuda"))
    for given, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            scaling.main(given)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_that_fail_are_told(capfd):
    with pytest.raises(TrainingError, match="processes of 1 ranks ended with status 2"):
        scaling.launch(["--precision", "fp8"], OPTIONS, 1)
    assert "--precision fp8" in capfd.readouterr().err


@pytest.mark.slow
def test_figures_follow_from_the_rounds(tmp_path, capsys):
    out = tmp_path / "new" / "scaling.json"
    scaling.main([*TINY, "--rounds", "2", "--passes", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    (rounds,) = result["passes"]
    times = {
        f"{ranks} {kind}": median(one[kind] for one in measured)
        for ranks, measured in rounds.items()
        for kind in measured[0]
    }
    assert set(times) == {"1 strong", "1 one_process", "2 strong", "2 weak", "2 strong_no_sync", "2 weak_no_sync"}
    assert min(times.values()) > 0
    assert {ranks: len(measured) for ranks, measured in rounds.items()} == {"1": 2, "2": 2}
    strong, weak = result["runs"][1]["strong"], result["runs"][1]["weak"]
    assert strong["efficiency"]["median"] == pytest.approx(times["1 strong"] / times["2 strong"] / 2)
    assert weak["efficiency"]["median"] == pytest.approx(times["1 strong"] / times["2 weak"])
    assert strong["frames_per_s"] == pytest.approx(4 * FRAMES / times["2 strong"])
    assert weak["frames_per_s"] == pytest.approx(8 * FRAMES / times["2 weak"])
    shares = [1 - one["weak_no_sync"] / one["weak"] for one in rounds["2"]]
    assert weak["communication_share"]["median"] == pytest.approx(median(shares))
    assert [run["threads_per_rank"] for run in result["runs"]] == [1, 1]
    assert result["one_process"]["threads"] == 2
    workload = Workload(OPTIONS.recipe(), torch.device("cpu"), 1, 16000)
    assert result["gradient_bytes"] == 4 * OurStep(workload).num_parameters  # fp32
    assert result["versions"]["torch"] == torch.__version__
    assert f"{weak['efficiency']['median']:.1%}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def weights_of_two_ranks(tmp_path_factory):
    """What report_weights() writes on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, __file__, str(folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_ranks_agree_after_a_step_that_exchanges_gradients_and_go_apart_after_one_that_does_not(weights_of_two_ranks):
    first, second = weights_of_two_ranks
    for mode in ("strong", "weak"):
        assert first[mode] == second[mode]
        assert first[f"{mode}_no_sync"] != second[f"{mode}_no_sync"]
        assert first[mode] != first[f"{mode}_no_sync"]


@pytest.mark.slow
def test_buckets_have_the_size_asked_for(weights_of_two_ranks):
    assert [found["bucket_bytes"] for found in weights_of_two_ranks] == [3 << 20] * 2


def report_weights(folder: Path) -> None:
    """Every kind of step from the same start, on rows that differ from rank to rank: a weight after it."""
    found = {}
    with distributed.session("cpu") as device:
        options = replace(OPTIONS, bucket_cap_mb=3)
        workload = Workload(options.recipe(), device, 2, 16000)
        batch = workload.batch()
        batch.audio_BS.mul_(1 + distributed.rank()).add_(distributed.rank() * torch.randn_like(batch.audio_BS))
        batches = {"strong": batch, "weak": batch}
        for kind in kinds_of_step(OurStep(workload), batches, options):
            ours = OurStep(workload)
            kinds_of_step(ours, batches, options)[kind]()
            weights = ours.optimizer.master_weights()
            found[kind] = float(sum(weight.double().sum() for weight in weights.values()))
            found["bucket_bytes"] = scaling.engine_of(ours).bucket_bytes_cap
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    report_weights(Path(sys.argv[1]))
