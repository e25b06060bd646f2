"""benchmarks/gpu_suite.sh: its commands, how it goes on after a failure, and the file that it joins."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import hourglass, idle, join_results, padding, plain, scaling, step, utterance
from common.errors import ConfigError, TrainingError

PROGRAMS = (step, hourglass, scaling, utterance, padding, idle)
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
BASH = os.environ.get("TEST_BASH") or shutil.which("bash") or "bash"
PARTS = [
    *("tests", "step_hourglass", "step_huggingface", "step_runner", "utterance", "padding", "idle"),
    *("step_plain", "step_compile", "hourglass", "step_large", "scaling"),
]
SETTINGS = {
    **{"DEVICE": "cpu", "SIZE": "tiny", "LARGE_SIZE": "tiny", "PRECISION": "fp32"},
    **{"BATCH": "2", "PLAIN_BATCH": "2", "LENGTH": "1", "MAX_TOKENS": "250000"},
}
OURS = (
    *("OUT", "PARTS", "LIMIT", "ROUNDS", "CHECKOUT", "NUM_GPUS", "PYTHON", "DRY_RUN"),
    *("HOURGLASS_CONFIG", "FACTORS", "PLAIN", "LARGE_BATCH"),
)

# Stands for the interpreter: does what PLAN (a JSON object) says of a part, else writes a result.
FAKE = """#!{python}
import json, os, sys, time
words, plan = sys.argv[1:], json.loads(os.environ["PLAN"])
if words[0] == "-c":
    sys.exit(plan.get("-c", 0))
if words[0].endswith("join_results.py"):
    os.execv("{python}", ["{python}", *words])
name = "tests" if words[0] == "-m" else os.path.basename(words[words.index("--json") + 1])[:-5]
print("this is", name)
act = plan.get(name)
if act == "sleep":
    time.sleep(30)
elif act:
    print("cannot", file=sys.stderr)
    sys.exit(act)
elif name != "tests":
    result = {{"figure": name, "hardware": "H", "versions": "V", "commit": "C", "command": words}}
    open(words[words.index("--json") + 1], "w").write(json.dumps(result))
"""


@pytest.fixture
def suite(tmp_path):
    """Run the suite with nothing of its variables in the environment but those given."""
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)

    def run(*arguments, plan=None, **variables):
        clean = {name: value for name, value in os.environ.items() if name not in (*OURS, *SETTINGS)}
        own = {"PYTHON": str(fake), "OUT": str(tmp_path / "all.json"), "PLAN": json.dumps(plan or {}), "NUM_GPUS": "2"}
        return subprocess.run(
            [BASH, str(SUITE), *arguments],
            env={**clean, **own, "CHECKOUT": str(tmp_path), **variables},
            capture_output=True,
            text=True,
            timeout=100,
            cwd=tmp_path,
        )

    return run


def outcomes(path: Path) -> dict[str, str]:
    return {name: part["outcome"] for name, part in json.loads(path.read_text())["parts"].items()}


def test_commands_are_those_that_the_programs_accept(suite, tmp_path):
    done = suite(DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines()]
    assert len(commands) == len(PARTS)
    assert commands[0][-3:] == ["-m", "gpu", str(ROOT / "tests" / "gpu")]
    parsers = {f"{module.__name__.split('.')[1]}.py": module.parse for module in PROGRAMS}
    taken = []
    for program, *flags in commands[1:]:
        assert Path(program).is_file()
        found = parsers[Path(program).name](flags)
        taken.append(found[0] if isinstance(found, tuple) else found)
    assert {(options.device, options.precision) for options in taken} == {("cuda", "bf16")}
    base, peer, runner, factors, one, loading, forms, compiled, padded, large, ranks = taken
    for options in (base, peer, runner, compiled, factors, large, ranks):
        assert (options.seconds, options.rounds) == (15.6, 5)
        # 8 sub-batches of at most 1.4 M samples, in rows of 250,000
        assert options.size == "large" or options.batch == 8 * (1_400_000 // 250_000)
    assert (loading.num_concat_batches, loading.max_tokens, loading.max_sample_size) == (8, 1_400_000, 250_000)
    assert (one.size, one.batch, one.seconds) == ("base", 1, 6.54)
    assert (padded.batch, padded.seconds) == (base.batch, base.seconds)
    assert {base.batch // number for number in padded.groups} >= {10, 1}
    assert set(forms.plain) == set(plain.FORMS) - set(plain.CPU_ONLY)
    assert [options.compile for options in (base, forms, compiled)] == [False, False, True]
    assert compiled.hourglass_transformer == forms.hourglass_transformer == loading.hourglass_transformer
    assert compiled.hourglass_transformer == base.hourglass_transformer
    assert base.hourglass_transformer == runner.hourglass_transformer == ranks.hourglass_transformer == "[2,(8,4),2]"
    assert peer.hourglass_transformer == large.hourglass_transformer == ""
    assert (peer.against, runner.checkout, large.size) == ("huggingface", str(tmp_path), "large")
    assert factors.factors == (1, 2, 3, 4, 5, 6)


def test_all_parts_are_joined(suite, tmp_path):
    done = suite()
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["complete"] is True
    assert outcomes(tmp_path / "all.json") == dict.fromkeys(PARTS, "ok")
    assert (result["hardware"], result["versions"], result["commit"]) == ("H", "V", "C")
    assert result["parts"]["tests"]["result"] is None
    for name in PARTS[1:]:
        part = result["parts"][name]
        assert part["result"]["figure"] == name
        assert not {"hardware", "versions", "commit"} & set(part["result"])
        assert part["messages"] == [f"this is {name}"]


def test_a_part_that_fails_does_not_lose_the_others(suite, tmp_path):
    done = suite(plan={"step_huggingface": 3, "tests": 1})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: tests, step_huggingface: did not work")
    expected = dict.fromkeys(PARTS, "ok") | {"step_huggingface": "failed", "tests": "failed"}
    assert outcomes(tmp_path / "all.json") == expected
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["complete"] is False
    failed = result["parts"]["step_huggingface"]
    assert (failed["exit_status"], failed["result"]) == (3, None)
    assert sorted(failed["messages"]) == ["cannot", "this is step_huggingface"]


def test_time_is_limited_and_what_was_measured_before_is_kept(suite, tmp_path):
    start = time.perf_counter()
    done = suite(plan={"step_huggingface": "sleep"}, LIMIT="4")
    assert time.perf_counter() - start < 25  # it sleeps 30
    assert done.returncode == 1
    found = outcomes(tmp_path / "all.json")
    assert found == dict.fromkeys(PARTS[:2], "ok") | dict.fromkeys(PARTS[2:], "timed out")
    assert "no time" in json.loads((tmp_path / "all.json").read_text())["parts"]["scaling"]["messages"][0]


def test_what_cannot_run_here_is_left_out_with_the_reason(suite, tmp_path):
    done = suite(plan={"-c": 1}, CHECKOUT="", NUM_GPUS="1")
    assert done.returncode == 0, done.stderr
    reasons = {name: text for name, text in outcomes(tmp_path / "all.json").items() if text != "ok"}
    words = {"tests": "pytest", "step_huggingface": "transformers", "step_runner": "CHECKOUT", "scaling": "2 GPUs"}
    assert set(reasons) == set(words)
    assert all(reasons[name].startswith("left out: ") and word in reasons[name] for name, word in words.items())


def test_parts_can_be_chosen_and_a_folder_takes_the_file(suite, tmp_path):
    done = suite(PARTS="scaling step_large", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert outcomes(tmp_path / "gpu_suite.json") == {"step_large": "ok", "scaling": "ok"}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {"PARTS": "steps"}, "PARTS=steps: "),
        ((), {"ROUNDS": "0"}, "ROUNDS=0: "),
        ((), {"CHECKOUT": "/no/such"}, "CHECKOUT=/no/such: "),
        ((), {"OUT": "/dev/null/x.json"}, "OUT=/dev/null: "),
        ((), {"PYTHON": "/no/such"}, "PYTHON=/no/such: "),
        (("step",), {}, "step: "),
    ],
)
def test_mistakes_are_told_before_anything_runs(suite, arguments, variables, message):
    done = suite(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_program_that_leaves_no_result_has_failed(tmp_path):
    (tmp_path / "outcomes.tsv").write_text("step_large\t0\t1\ntests\t0\t2\n")
    found = join_results.join(tmp_path)
    assert (found["complete"], found["hardware"]) == (False, None)
    assert [part["outcome"] for part in found["parts"].values()] == ["failed", "ok"]
    out = tmp_path / "new" / "out.json"
    with pytest.raises(TrainingError, match="step_large: did not work"):
        join_results.main([str(tmp_path), str(out)])
    assert json.loads(out.read_text()) == found
    with pytest.raises(ConfigError, match="outcomes"):
        join_results.join(tmp_path / "new")


def test_the_script_is_clean():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "--norc", "--exclude=SC1091", str(SUITE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_on_the_cpu_with_a_tiny_model(suite, tmp_path):
    sizes = {
        "HOURGLASS_CONFIG": "[0,(2,2),0]",
        "FACTORS": "2",
        "PLAIN": "optimizer",
        "ROUNDS": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = suite(PYTHON=sys.executable, PARTS="step_hourglass utterance step_plain hourglass", **SETTINGS, **sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "all.json").read_text())
    step_of_hourglass, factors = (result["parts"][name]["result"] for name in ("step_hourglass", "hourglass"))
    assert step_of_hourglass["setting"]["hourglass_transformer"] == "[0,(2,2),0]"
    assert step_of_hourglass["frames_per_s"] > 0
    assert list(result["parts"]["step_plain"]["result"]["variants"]) == ["optimizer"]
    assert result["parts"]["utterance"]["result"]["setting"]["size"] == "tiny"
    assert [model["factor"] for model in factors["models"]] == [None, 2]
    assert result["hardware"]["cores"] == os.cpu_count()
