"""benchmarks/hourglass.py: the models that it compares, the order of the rounds, its file."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch

from benchmarks import hourglass, step
from benchmarks.model_flops import training_flops
from benchmarks.our_step import OurStep
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import SIZES, Workload, make_recipe
from common.errors import ConfigError

TINY = ["--size", "tiny", "--batch", "2", "--seconds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    """The number of threads that the program sets for its whole process is set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", hourglass.POST_LN)
def test_every_model_has_all_layers_and_the_same_weights_and_fewer_operations(size):
    layers = SIZES[size].encoder_layers
    models = hourglass.hourglasses(layers, (1, 2, 4))
    assert list(models.values()) == [None, 1, 2, 4]
    recipes = {name: make_recipe(size, name) for name in models}
    for name, factor in list(models.items())[1:]:
        before, middle, shortening, after = recipes[name].model.hourglass()
        assert before + middle + after == layers
        assert (before, shortening) == (after, factor)
    operations = [training_flops(recipe.model, 2, 64000, 80)["encoder"] for recipe in recipes.values()]
    assert operations[0] == operations[1] > operations[2] > operations[3]
    if size != "base":  # which takes seconds to build
        weights = [
            OurStep(Workload(recipe, torch.device("cpu"), 1, 16000)).num_parameters for recipe in recipes.values()
        ]
        assert len(set(weights)) == 1


def test_base_has_the_published_hourglass():
    assert "[2,(8,4),2]" in hourglass.hourglasses(SIZES["base"].encoder_layers, (4,))


def test_memory_is_that_of_the_same_step(monkeypatch, tmp_path):
    """The process that measures it gets the sizes, the precision and the Hourglass of the model."""
    asked = []
    monkeypatch.setattr(hourglass, "memory_in_fresh_process", lambda argv, side: asked.append((argv, side)))
    monkeypatch.setattr(hourglass, "measure", lambda *_: pytest.fail("stop"))
    given = [*TINY, "--precision", "bf16", "--factors", "3", "--json", str(tmp_path / "out.json")]
    with pytest.raises(pytest.fail.Exception, match="stop"):
        hourglass.main(given)
    taken = [step.parse([*argv, "--json", "-"]) for argv, _ in asked]
    assert [options.hourglass_transformer for options in taken] == ["", "[0,(2,3),0]"]
    assert {side for _, side in asked} == {"ours"}
    for options in taken:
        assert (options.size, options.precision, options.batch, options.seconds) == ("tiny", "bf16", 2, 1.0)
        assert (options.device, options.threads, options.against) == ("cpu", 1, None)


class NamedStep:
    """Stands for OurStep; does nothing."""

    def __init__(self, workload):
        self.name = workload.recipe.model.hourglass_transformer

    def step(self, batch):
        pass


def test_ratios_are_of_rounds_and_no_model_is_always_first(monkeypatch):
    """A machine that gets slower from round to round does not change them."""
    speed = {"": 1.0, "[0,(2,1),0]": 1.0, "[0,(2,4),0]": 1.6}
    names, calls = list(speed), []

    def seconds(self, work, repeats, prepare=None):
        calls.append(work.func.__self__.name)
        return ((len(calls) - 1) // len(names) + 1) / speed[calls[-1]]

    monkeypatch.setattr(Stopwatch, "time", seconds)
    monkeypatch.setattr(hourglass, "OurStep", NamedStep)
    options = hourglass.parse([*TINY, "--rounds", "3", "--factors", "1", "4", "--json", "-"])
    models = hourglass.hourglasses(2, options.factors)
    memory = {name: {"peak": peak, "before": 1} for name, peak in zip(names, (200, 200, 90), strict=True)}
    result = hourglass.measure(options, torch.device("cpu"), models, memory)
    assert calls == [*names, *names, *reversed(names), *names]  # the first three warm up
    assert [model["throughput_ratio"] for model in result["models"]] == pytest.approx([1, 1, 1.6])
    assert result["models"][2]["throughput_ratio_quartiles"] == pytest.approx([1.6, 1.6])
    assert [model["memory_ratio"] for model in result["models"]] == [1, 1, 0.45]
    # 2 rows of 1 s; the rounds took 2, 3 and 4 s, and the last model 1.6 times less
    assert [model["frames_per_s"] for model in result["models"]] == pytest.approx([98 / 3, 98 / 3, 98 / 3 * 1.6])


def test_mistakes_are_told_by_flag_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(hourglass, "memory_in_fresh_process", lambda *_: pytest.fail("was measured"))
    out = str(tmp_path / "out.json")
    cases = [
        ((), "--json"),
        (("--json", str(tmp_path)), "--json"),
        (("--json", out, "--size", "large"), "--size large"),
        (("--json", out, "--factors", "0"), "--factors 0"),
        (("--json", out, "--factors", "4", "2", "4"), "--factors 4 2 4: .*twice"),
    ]
    for given, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            hourglass.main(given)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_file_and_table(tmp_path, capsys):
    out = tmp_path / "new" / "hourglass.json"
    hourglass.main([*TINY, "--rounds", "2", "--factors", "4", "--json", str(out)])
    result = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    assert [model["factor"] for model in result["models"]] == [None, 4]
    for model in result["models"]:
        times = [one[model["hourglass"]] for one in result["rounds"]]
        assert model["seconds"]["median"] == pytest.approx(median(times))
        assert min(times) > 0
        assert model["memory_bytes"]["peak"] >= model["memory_bytes"]["before"] > 0
    assert {"hardware", "versions", "commit", "command", "setting"} <= set(result)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["Hourglass", "none", "[0,(2,4),0]"]
    assert f"{result['models'][1]['throughput_ratio']:.2f}" in table[2]
