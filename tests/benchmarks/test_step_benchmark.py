"""benchmarks/step.py: the operations that it counts, its processes, what it measures, and the file that it writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sides, step
from benchmarks.model_flops import training_flops
from benchmarks.our_step import OurParts, OurStep, our_program
from benchmarks.plain import plain_forms
from benchmarks.sides import Bench, Side, at_work
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import SIZES, Workload, make_recipe
from common.errors import ConfigError, TrainingError
from wav2vec2 import criterion
from wav2vec2.config import DropoutConfig
from wav2vec2.model import TransformerLayer

CPU = torch.device("cpu")
NO_DROPOUT = DropoutConfig(dropout=0.0, attention_dropout=0.0)
TINY = ["--size", "tiny", "--rounds", "2", "--batch", "2", "--seconds", "1", "--threads", "1"]
KEYS = {
    *("ratio", "ratio_quartiles", "memory_ratio", "frames_per_s", "masked_frames_per_s", "model_flop_per_s", "mfu"),
    *(
        "components",
        "ours",
        "peer",
        "variants",
        "rounds",
        "matrix_rate",
        "setting",
        "hardware",
        "versions",
        "commit",
        "command",
    ),
}
# In these forms every operation of the model is one that torch counts, and is done once.
TEXTBOOK = ("first_block", "conv_stack", "positional_conv", "attention", "last_layer")
PARTS = ("extractor", "encoder", "quantizer_logits", "optimizer")

RUNNER = """
import time
import torch

class Slow:
    def __init__(self, config):
        self.config = config
        self.kept = []
    def step(self, batch):
        recipe = self.config.recipe
        assert (recipe.model.encoder_layers, recipe.precision.name, self.config.device.type) == (2, "fp32", "cpu")
        assert self.config.checkout.is_dir()
        assert batch.audio_BS.shape == (self.config.rows, self.config.samples)
        assert batch.negatives_BTN.shape == (*batch.mask_BT.shape, recipe.objective.num_negatives)
        self.kept.append(b"x" * (100 << 20))
        del self.kept[3:]
        time.sleep(0.3)

def build(config):
    return Slow(config)
"""


@pytest.fixture(autouse=True)
def settings_of_torch():
    """What the program sets for its whole process is set back."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


class OperationCounter(Stopwatch):
    """Gives the operations that torch counts in the work in place of its seconds."""

    def time(self, work, repeats, prepare=None):
        if prepare:
            prepare()
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"hourglass_transformer": "[1,(1,3),1]", "hourglass_resample": "linear"}),
        ("tiny", {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True, "latent_dim": 20}),
        ("small", {}),
    ],
)
def test_operations_are_those_that_torch_counts_in_every_part(size, changes):
    """For one group: torch's counter takes all channels for the weights' gradient of a grouped convolution."""
    recipe = make_recipe(size)
    recipe = replace(recipe, model=replace(recipe.model, conv_pos_groups=1, **changes))
    workload = Workload(recipe, CPU, rows=2, samples=30000)
    batch, ours, counter = workload.batch(), OurStep(workload), OperationCounter(CPU)
    expected = training_flops(recipe.model, 2, 30000, int(batch.mask_BT[0].sum()))
    with plain_forms(TEXTBOOK, "cpu"):
        found = OurParts(ours, batch).time(counter, 1)
        whole = counter.time(lambda: ours.step(batch), 1)
    assert found["optimizer"] == 0
    for part in ("extractor", "encoder", "quantizer_logits"):
        assert expected[part] == pytest.approx(found[part], rel=0.015), part
    assert sum(expected.values()) == pytest.approx(whole, rel=0.01)
    assert expected["projection"] == pytest.approx(whole - sum(found.values()), rel=0.01)


def test_groups_divide_the_operations_of_the_positional_convolution():
    recipe = make_recipe("tiny")
    ours = OurStep(Workload(recipe, CPU, rows=1, samples=30000))
    convolution, width, frames = ours.task.model.encoder.pos_conv, recipe.model.encoder_embed_dim, 93
    with plain_forms(TEXTBOOK, "cpu"), FlopCounterMode(display=False) as counter, torch.no_grad():
        convolution(torch.zeros(1, frames, width))

    def encoder(groups: int) -> int:
        return training_flops(replace(recipe.model, conv_pos_groups=groups), 1, 30000, 40)["encoder"]

    four, one = encoder(4), encoder(1)
    assert (one - four) / 3 == pytest.approx(3 * counter.get_total_flops(), rel=0.02)


def test_negatives_are_other_masked_frames_of_the_same_row():
    batch = Workload(make_recipe("tiny"), CPU, rows=3, samples=40000).batch()
    mask, negatives = batch.mask_BT, batch.negatives_BTN
    frames = mask.shape[1]
    assert not batch.padded
    assert len(set(mask.sum(1).tolist())) == 1
    for row in range(3):
        masked = {row * frames + t for t in mask[row].nonzero().flatten().tolist()}
        seen = set()
        for t in range(frames):
            found = set(negatives[row, t].tolist())
            if mask[row, t]:
                assert row * frames + t not in found
                seen |= found
            else:
                assert found == {row * frames}
        assert seen == masked  # all of them, and nothing else


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_hugging_face_has_the_same_weights_and_attention(size):
    pytest.importorskip("transformers")
    from benchmarks.peers import HuggingFaceStep

    workload = Workload(make_recipe(size), CPU, rows=1, samples=16000)
    peer = HuggingFaceStep(workload)
    assert peer.num_parameters == OurStep(workload).num_parameters
    assert peer._model.config._attn_implementation == "sdpa"
    before = {name: weight.detach().clone() for name, weight in peer._model.named_parameters()}
    peer.step(workload.batch())
    assert [name for name, weight in peer._model.named_parameters() if torch.equal(weight, before[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_timing_the_parts_leaves_weights_and_gradients_alone(precision):
    workload = Workload(make_recipe("tiny", precision=precision), CPU, rows=1, samples=16000)
    batch, ours = workload.batch(), OurStep(workload)
    ours.step(batch)
    before = {name: weight.clone() for name, weight in ours.optimizer.master_weights().items()}
    seconds = OurParts(ours, batch).time(Stopwatch(CPU), 2)
    assert tuple(seconds) == PARTS
    assert min(seconds.values()) > 0
    assert all(torch.equal(weight, before[name]) for name, weight in ours.optimizer.master_weights().items())
    assert all(weight.grad is None for weight in ours.task.model.parameters())
    ours.step(batch)
    assert not any(torch.equal(weight, before[name]) for name, weight in ours.optimizer.master_weights().items())


def update_of(recipe, changes: dict) -> dict[str, torch.Tensor]:
    """The weights after a step of a recipe with these options of speed and memory."""
    recipe = replace(recipe, run=replace(recipe.run, **changes))
    workload = Workload(recipe, CPU, rows=2, samples=16000)
    ours = OurStep(workload)
    ours.step(workload.batch())
    return dict(ours.optimizer.master_weights())


def test_our_side_takes_the_options_of_training_and_makes_the_same_update(monkeypatch):
    """Checkpointed layers run twice; compiled ones are traced, differentiated and run, but not made C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    recipe = make_recipe("tiny")
    recipe = replace(recipe, dropout=NO_DROPOUT, model=replace(recipe.model, encoder_layers=1))
    calls = []
    forward = TransformerLayer.forward
    monkeypatch.setattr(TransformerLayer, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    expected = update_of(recipe, {})
    assert len(calls) == 1
    found = update_of(recipe, {"checkpoint_activations": True})
    assert len(calls) == 3
    monkeypatch.setattr(TransformerLayer, "forward", forward)
    compiled = update_of(recipe, {"compile": True})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        torch.testing.assert_close(compiled[name], weight, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


def test_options_of_speed_reach_our_recipe_and_the_file():
    given = ("--checkpoint_activations", "--compile")
    options = step.parse([*TINY, *given, "--json", "-"])
    workload = step.make_workload(options, CPU)
    run = workload.recipe.run
    assert (run.compile, run.cuda_graphs, run.checkpoint_activations) == (True, False, True)
    told = step.setting(options, workload, workload.batch(), 1, {})
    assert (told["compile"], told["cuda_graphs"], told["checkpoint_activations"]) == (True, False, True)


class SlowAtFirst:
    """A step that is slow once."""

    def __init__(self):
        self.steps = 0

    def step(self, batch):
        self.steps += 1
        time.sleep(0.2 if self.steps == 1 else 0.0)


def test_the_first_step_is_told_apart():
    bench = Bench(SlowAtFirst(), Workload(make_recipe("tiny"), CPU, rows=1, samples=8000))
    assert 0.2 <= bench.start(3)["first_step_s"] < 0.4
    assert bench._stepper.steps == 3


def check(result: dict) -> None:
    """What holds in every file: figures follow from the rounds."""
    assert set(result) == KEYS
    setting, seconds = result["setting"], statistics.median(one["ours_s"] for one in result["rounds"])
    assert len(result["rounds"]) == setting["rounds"]
    assert setting["frames"] == 2 * 49  # 1 s at 16 kHz
    assert 0.3 < setting["masked_frames"] / setting["frames"] < 0.65
    assert result["frames_per_s"] == pytest.approx(setting["frames"] / seconds)
    assert result["masked_frames_per_s"] == pytest.approx(setting["masked_frames"] / seconds)
    flops = sum(setting["flops"].values())
    assert result["mfu"] == pytest.approx(flops / seconds / result["matrix_rate"]["flop_per_s"])
    assert result["matrix_rate"]["flop_per_s"] == max(result["matrix_rate"]["by_size"].values())
    assert tuple(result["components"]) == PARTS
    for part in result["components"].values():
        assert part["ms"] > 0
        assert part["share"] > 0
    memory = result["ours"]["memory_bytes"]
    assert memory["peak"] >= memory["before"] > 0
    assert result["ours"]["first_step_s"] > 0
    assert result["versions"]["torch"] == torch.__version__


def check_peer(result: dict) -> None:
    ratios = [one["peer_s"] / one["ours_s"] for one in result["rounds"]]
    assert [one["ratio"] for one in result["rounds"]] == ratios
    check_ratios(result["ours"], result["peer"], result, ratios)


def check_variants(result: dict, names: list[str]) -> None:
    assert list(result["variants"]) == names
    for name, variant in result["variants"].items():
        ratios = [one["variants_s"][name] / one["ours_s"] for one in result["rounds"]]
        check_ratios(result["ours"], variant, variant, ratios)
        assert variant["parameters"] == result["ours"]["parameters"]


def check_ratios(ours: dict, other: dict, told: dict, ratios: list[float]) -> None:
    assert told["ratio"] == pytest.approx(statistics.median(ratios))
    assert told["ratio_quartiles"][0] <= told["ratio"] <= told["ratio_quartiles"][1]
    assert told["memory_ratio"] == pytest.approx(ours["memory_bytes"]["peak"] / other["memory_bytes"]["peak"])
    assert other["memory_bytes"]["peak"] >= other["memory_bytes"]["before"] > 0


@pytest.mark.slow
def test_against_hugging_face(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "new" / "result.json"
    step.main([*TINY, "--against", "huggingface", "--plain", "all", "--json", str(out)])
    result = json.loads(out.read_text())
    check(result)
    check_peer(result)
    check_variants(result, ["all"])
    assert result["peer"]["name"] == "huggingface"
    assert result["peer"]["parameters"] == result["ours"]["parameters"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_against_a_runner_that_is_slow_and_large(tmp_path, capsys):
    """Ratios above 1 are in our favour in speed, those below 1 in memory; neither process sees the other's memory."""
    runner, out = tmp_path / "runner.py", tmp_path / "result.json"
    runner.write_text(RUNNER)
    large = b"x" * (600 << 20)  # of this process, which those of the sides must not inherit
    del large
    step.main([*TINY, "--against-runner", str(runner), "--checkout", str(tmp_path), "--json", str(out)])
    result = json.loads(out.read_text())
    check(result)
    check_peer(result)
    assert result["ratio"] > 1
    assert all(one["peer_s"] >= 0.3 for one in result["rounds"])
    assert result["memory_ratio"] < 1
    peer = result["peer"]
    assert (peer["name"], peer["parameters"]) == (str(runner), None)
    assert peer["memory_bytes"]["peak"] - peer["memory_bytes"]["before"] > 280 << 20
    assert result["ours"]["memory_bytes"]["peak"] < 600 << 20
    assert f"x {result['ratio']:.2f}" in capsys.readouterr().out


class Told:
    """Stands for an implementation in tests of the processes; what it does is said by the file `order`."""

    def __init__(self, order: Path) -> None:
        self.order = order

    def step(self, batch):
        if self.order.exists():
            raise ConfigError(f"--checkout {self.order.read_text()}: is not what it should be; choose another")


def told_program(workload, order):
    return nullcontext(Told(order))


WORKLOAD = Workload(make_recipe("tiny"), CPU, rows=1, samples=16000)


def test_a_side_that_fails_while_it_is_built_is_named_and_nothing_is_written(tmp_path, capfd):
    runner, out = tmp_path / "runner.py", tmp_path / "result.json"
    runner.write_text("def build(config):\n    raise RuntimeError('no such model')\n")
    with pytest.raises(TrainingError, match=f"process of peer, {runner} ended with status 1") as error:
        step.main([*TINY, "--against_runner", str(runner), "--json", str(out)])
    assert "\n" not in str(error.value)
    assert "no such model" in capfd.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [runner]
    assert multiprocessing.active_children() == []


def test_an_error_of_a_user_comes_through_in_one_line_with_the_name_of_the_side(tmp_path):
    order = tmp_path / "order"
    with at_work(Side("their side", partial(told_program, order=order)), WORKLOAD, 1) as process:
        assert process.start(2)["parameters"] is None
        order.write_text("here")
        with pytest.raises(ConfigError, match=r"^--checkout here: .* \(told by their side\)$"):
            process.time(1)
        with pytest.raises(TrainingError, match="process of their side ended with status 0"):
            process.time(1)


def test_a_side_that_the_system_stops_is_named(tmp_path):
    with at_work(Side("large side", partial(told_program, order=tmp_path / "none")), WORKLOAD, 1) as process:
        process.start(1)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match="process of large side ended with status -9; .*memory: lower --batch"):
            process.time(1)


def test_sides_have_processes_of_their_own_which_wait_and_end(tmp_path):
    """What one of them sets, the other and this process do not have; one that waits takes no processor time."""
    threads = torch.get_num_threads()
    with (
        at_work(Side("one", our_program, Settings), WORKLOAD, 1) as one,
        at_work(Side("two", our_program, Settings), WORKLOAD, 2) as two,
    ):
        one.start(1), two.start(1)
        (first_pid, first), (second_pid, second) = one.ask("settings"), two.ask("settings")
        assert (first, second, torch.get_num_threads()) == (1, 2, threads)
        assert len({first_pid, second_pid, os.getpid()}) == 3
        before, start = two.ask("processor_seconds"), time.perf_counter()
        for _ in range(10):
            one.time(2)
        assert two.ask("processor_seconds") - before < (time.perf_counter() - start) / 10
    assert multiprocessing.active_children() == []


class Settings(Bench):
    """Tells what a process has."""

    def settings(self):
        return os.getpid(), torch.get_num_threads()

    def processor_seconds(self):
        return time.process_time()


def test_a_plain_variant_is_in_place_in_its_own_process_only():
    side = step.make_sides(step.parse(["--plain", "contrastive", "--json", "-"]))["contrastive"]
    with at_work(replace(side, bench=Places), WORKLOAD, 1) as process:
        assert process.ask("contrastive_logits") == "benchmarks.plain"
    assert criterion.contrastive_logits.__module__ == "wav2vec2.criterion"


class Places(Bench):
    """Tells where a function comes from."""

    def contrastive_logits(self):
        return criterion.contrastive_logits.__module__


def test_all_sides_are_timed_in_every_round_and_none_is_always_first(monkeypatch):
    """A machine that gets slower from round to round changes no ratio; a side is begun before the next one."""
    speed, calls = {"ours": 1.0, "contrastive": 0.8, "all": 0.5}, []

    class Recorded:
        def __init__(self, side, workload, threads):
            self.name = side.name.removeprefix("plain ")

        def start(self, steps):
            calls.append(f"start {self.name}")
            peak = {"ours": 60, "contrastive": 80, "all": 120}[self.name]
            return {"memory_bytes": {"peak": peak, "before": 50}, "parameters": 7}

        def time(self, steps):
            calls.append(self.name)
            return len([call for call in calls if call == self.name]) / speed[self.name]

        def ask(self, question, *arguments):
            assert self.name == "ours"
            if question == "finish":
                return {"matrix_rate": {"flop_per_s": 1e9, "by_size": {}}, "skipped_updates": 0}
            return dict.fromkeys(PARTS, 0.1)

        def end(self):
            calls.append(f"end {self.name}")

    monkeypatch.setattr(sides, "SideProcess", Recorded)
    options = step.parse([*TINY, "--rounds", "3", "--plain", "contrastive", "all", "--json", "-"])
    result = step.measure(options, WORKLOAD, step.make_sides(options))
    names = list(speed)
    assert calls == [
        *(f"start {name}" for name in names),
        *names,
        *reversed(names),
        *names,
        *(f"end {name}" for name in reversed(names)),
    ]
    assert [result["variants"][name]["ratio"] for name in names[1:]] == pytest.approx([1.25, 2.0])
    assert result["variants"]["all"]["ratio_quartiles"] == pytest.approx([2.0, 2.0])
    assert [result["variants"][name]["memory_ratio"] for name in names[1:]] == [0.75, 0.5]
    assert result["ratio"] is result["memory_ratio"] is result["peer"] is None


def test_mistakes_are_told_in_one_line_by_flag_before_anything_is_measured(tmp_path, monkeypatch):
    empty, out = tmp_path / "empty.py", tmp_path / "out.json"
    empty.write_text("")
    monkeypatch.setattr(sides, "SideProcess", lambda *_: pytest.fail("was measured"))
    cases = [
        ((), "--json"),
        (("--json", str(tmp_path)), f"--json {re.escape(str(tmp_path))}"),
        (("--size", "huge"), "--size huge"),
        (("--size", "large", "--hourglass", "[1,(2,4),1]"), "--hourglass .*pre-LN"),
        (("--hourglass", "2,4"), "--hourglass_transformer 2,4"),
        (("--hourglass", "[1,(2,4),1]", "--against", "huggingface"), "--hourglass .*Hugging Face"),
        (("--against_runner", str(empty)), "--against_runner .*build"),
        (("--against_runner", str(tmp_path / "none.py")), "--against_runner .*no such file"),
        (("--against_runner", str(empty), "--against", "huggingface"), "--against_runner"),
        (("--checkout", str(tmp_path)), "--checkout"),
        (("--against_runner", str(empty), "--checkout", str(tmp_path / "none")), "--checkout .*none"),
        (("--cuda_graphs", "--device", "cuda"), "--cuda_graphs: needs --compile"),
        (("--cuda_graphs", "--compile"), "--cuda_graphs: needs a GPU"),
        (("--compile", "--plain", "optimizer"), "--plain: .*--compile"),
        (("--rounds", "0"), "--rounds 0"),
        (("--secnods", "3"), "--seconds"),
    ]
    if not torch.cuda.is_available():
        cases.append((("--device", "cuda"), "--device cuda"))
    for flags, message in cases:
        given = flags if "--json" in flags or not flags else (*flags, "--json", str(out))
        with pytest.raises(ConfigError, match=message) as error:
            step.main(given)
        assert "\n" not in str(error.value)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [empty]


def test_every_size_is_a_model_with_the_widths_of_its_name():
    for name, channels, dim, final in (("small", 128, 256, 128), ("base", 512, 768, 256), ("large", 512, 1024, 768)):
        model = SIZES[name]
        assert {layer[0] for layer in model.conv_layers()} == {channels}
        assert (model.encoder_embed_dim, model.final_dim) == (dim, final)
    # of Base, per frame of 250000 samples with 46 % masked, by hand from the published sizes
    flops = training_flops(SIZES["base"], 1, 250000, 359)
    assert sum(flops.values()) / 781 == pytest.approx(922.7e6, rel=0.001)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(tmp_path: Path, precision):
    out = tmp_path / "result.json"
    step.main([*TINY, "--device", "cuda", "--precision", precision, "--json", str(out)])
    result = json.loads(out.read_text())
    check(result)
    assert result["ratio"] is result["memory_ratio"] is result["peer"] is None
    assert result["ours"]["memory_bytes"]["peak"] < 1 << 30  # the allocator's, not the process's
    assert "gpu" in result["hardware"]
