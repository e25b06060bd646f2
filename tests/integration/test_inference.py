"""inference.py on tiny fine-tuned checkpoints: the same result in any batch, order and number of processes; errors."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from tiny import WORDS, corpus
from tiny_model import HOURGLASS, LARGE, MODEL, NO_DROPOUT

import inference
from common import checkpoint, flags
from common.data.collate import Collator
from common.data.dataset import Sample
from common.data.sampler import PlannedSubBatch
from common.entry import run_program
from common.labels import SPECIAL_SYMBOLS, Dictionary
from utils import convert_manifest
from wav2vec2 import decoding
from wav2vec2.arg_parser import parse_inference
from wav2vec2.config import Config, DropoutConfig, ModelConfig
from wav2vec2.latency import Stopwatch
from wav2vec2.model import Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.transcribe import FileList, Recognizer

SYMBOLS = [*SPECIAL_SYMBOLS, *sorted({*"".join(WORDS), "|"})]
NUMBER = 9
WER_LINE = re.compile(r"WER: (\d+\.\d\d) %")


def finetuned(
    path: Path, architecture: ModelConfig = MODEL, seed: int = 1, dropout: DropoutConfig = NO_DROPOUT, **changes: Any
) -> Path:
    """A checkpoint as a fine-tuning run saves it, with random weights that write much text."""
    config = Config(mode="finetune", model=architecture, dropout=dropout)
    state = {
        "mode": "finetune",
        "config": flags.to_dict(config),
        "model": weights(architecture, seed),
        "labels": SYMBOLS,
        "sample_rate": architecture.sample_rate,
        "normalize": architecture.normalize,
        "ema": None,
        "progress": {"step": 3, "best": 12.5, "skipped": 0},
    }
    checkpoint.save(path, state | changes)
    return path


def weights(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    network = Wav2Vec2Ctc(model, NO_DROPOUT, num_symbols=len(SYMBOLS))
    with torch.no_grad():
        network.proj.weight.mul_(2)
        network.proj.bias[1:4] = -20  # special symbols
    return network.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Recordings of quite different lengths with labels, and a fine-tuned model."""
    folder = corpus(tmp_path_factory.mktemp("inference"), number=NUMBER, low=0.1, high=1.5)
    finetuned(folder / "model.pt")
    return folder


def infer(model: Path, *more: object) -> None:
    inference.main(["--w2v_path", str(model), "--num_workers", "0", "--device", "cpu", *map(str, more)])


def score(folder: Path, *more: object, model: Path | None = None) -> None:
    infer(model or folder / "model.pt", "--data", folder, "--valid_subset", "valid", *more)


def fails(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, str]:
    """Exit status and the error, which must be one line."""
    with pytest.raises(SystemExit) as ended:
        run_program(inference.main, ["--num_workers", "0", "--device", "cpu", *map(str, command)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return ended.value.code, lines[0]


def opened(folder: Path, *more: object, model: Path | None = None) -> tuple[Recognizer, FileList]:
    """The recogniser and the batches of `valid` as the program makes them."""
    command = ["--w2v_path", model or folder / "model.pt", "--data", folder, "--valid_subset", "valid", *more]
    config = parse_inference(["--num_workers", "0", *map(str, command)])
    recognizer = inference.open_recognizer(config, torch.device("cpu"))
    speech = inference.open_speech(config, recognizer, pin_memory=False)
    assert isinstance(speech, FileList)
    return recognizer, speech


def log_probs(recognizer: Recognizer, waves: list[np.ndarray]) -> list[torch.Tensor]:
    """Log-probabilities of the valid frames of every row of one batch, in this order."""
    rows = [Sample(str(row), wave_S, text=None, labels=None) for row, wave_S in enumerate(waves)]
    batch = Collator(recognizer.num_frames, seed=0)([PlannedSubBatch(0, 0, 0)], [rows])
    with torch.inference_mode():
        log_probs_BTK = recognizer.log_probs(batch)
    return [row[:frames] for row, frames in zip(log_probs_BTK, batch.frame_lengths, strict=True)]


def read_predictions(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def edits(reference: Any, hypothesis: Any) -> int:
    """Levenshtein's distance by the textbook's table."""
    table = np.zeros((len(reference) + 1, len(hypothesis) + 1), int)
    table[:, 0], table[0] = np.arange(len(reference) + 1), np.arange(len(hypothesis) + 1)
    for i, r in enumerate(reference, start=1):
        for j, h in enumerate(hypothesis, start=1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (r != h))
    return int(table[-1, -1])


@pytest.mark.parametrize(
    "model", [MODEL, replace(HOURGLASS, hourglass_resample="linear"), LARGE], ids=["base", "hourglass", "large"]
)
def test_a_result_does_not_depend_on_what_an_utterance_is_batched_with(folder, tmp_path, model):
    path = finetuned(tmp_path / "model.pt", model)
    files = {}
    limits = [(1, 0), (4, 0), (NUMBER, 0), (0, 30000), (3, 50000)]  # batch_size, max_tokens
    for size, budget in limits:
        output = ("--save_logits", tmp_path / "out.pt", "--save_predictions", tmp_path / f"{size}.txt")
        score(folder, "--batch_size", size, "--max_tokens", budget, *output, model=path)
        files[size] = torch.load(tmp_path / "out.pt", weights_only=True)["log_probs"]
    for size, _ in limits[1:]:
        assert (tmp_path / f"{size}.txt").read_text() == (tmp_path / "1.txt").read_text()
        for found, expected in zip(files[size], files[1], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len({text for _, text in read_predictions(tmp_path / "1.txt")}) > NUMBER // 2


@pytest.mark.parametrize("model", [MODEL, HOURGLASS, LARGE], ids=["base", "hourglass", "large"])
def test_rows_of_any_length_and_order_give_what_each_gives_alone(folder, tmp_path, model):
    recognizer, _ = opened(folder, model=finetuned(tmp_path / "model.pt", model))
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(size).astype(np.float32) for size in (400, 719, 720, 5000, 12345, 16000, 30000)]
    alone = [log_probs(recognizer, [wave_S])[0] for wave_S in waves]
    assert [len(row) for row in alone[:3]] == [1, 1, 2]
    for _ in range(3):
        order = rng.permutation(len(waves))
        for found, row in zip(log_probs(recognizer, [waves[row] for row in order]), order, strict=True):
            torch.testing.assert_close(found, alone[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [500, 16000, 25000, 60000, 10**9])
@pytest.mark.parametrize("batch_size", [0, 3])
def test_batches_keep_the_budget_and_use_it(folder, max_tokens, batch_size):
    _, speech = opened(folder, "--max_tokens", max_tokens, "--batch_size", batch_size)
    sizes = [soundfile.info(folder / f"audio/{number}.wav").frames for number in range(NUMBER)]
    batches = [[sizes[place] for place in places] for _, places in speech]
    assert sorted(place for _, places in speech for place in places) == list(range(NUMBER))
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        assert len(batch) == 1 or len(batch) * max(batch) <= max_tokens
        assert len(batch) <= (batch_size or NUMBER)
        if following:  # its longest would not have fitted, too
            assert len(batch) == batch_size or (len(batch) + 1) * max(batch) > max_tokens


def test_an_utterance_above_the_budget_is_transcribed_whole(folder, tmp_path):
    for name, more in (("free", ()), ("tight", ("--max_tokens", "500"))):
        score(folder, "--save_predictions", tmp_path / f"{name}.txt", "--save_logits", tmp_path / f"{name}.pt", *more)
    assert (tmp_path / "tight.txt").read_text() == (tmp_path / "free.txt").read_text()
    lengths = [torch.load(tmp_path / f"{name}.pt", weights_only=True)["lengths"] for name in ("free", "tight")]
    assert lengths[0] == lengths[1]


def test_nothing_of_training_is_left(folder, tmp_path):
    """Dropouts, LayerDrop, frozen parts and autograd's records have no part in the results."""
    every = dict.fromkeys(DropoutConfig.__dataclass_fields__, 0.5)
    plain, _ = opened(folder)
    trained, speech = opened(folder, model=finetuned(tmp_path / "model.pt", dropout=DropoutConfig(**every)))
    trained.task.requires_grad_(True)
    found = [
        inference.recognize(recognizer, speech, Stopwatch(torch.device("cpu")), keep_log_probs=True)
        for recognizer in (plain, trained)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.log_probs_TK, other.log_probs_TK)
        assert other.log_probs_TK.is_inference()


def test_what_inference_keeps_for_later_can_be_trained_with(folder, tmp_path):
    model = replace(MODEL, conv_pos=10)  # a shape that no other test uses: nothing of it is kept yet
    score(folder, model=finetuned(tmp_path / "model.pt", model))
    network = Wav2Vec2Ctc(model, NO_DROPOUT, num_symbols=len(SYMBOLS))
    logits_BTK, _ = network(torch.randn(2, 3000), torch.tensor([3000, 2000]))
    logits_BTK.sum().backward()
    assert all(parameter.grad is not None for name, parameter in network.named_parameters() if "mask_emb" not in name)


def test_nothing_but_the_best_symbol_of_every_frame_is_read_from_the_device(folder, monkeypatch):
    recognizer, speech = opened(folder, "--batch_size", "4")
    batches = list(speech)
    read = []

    def recorded(name):
        original = getattr(torch.Tensor, name)

        def reading(tensor, *arguments, **options):
            read.append(tensor)
            return original(tensor, *arguments, **options)

        return reading

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, recorded(name))
    inference.recognize(recognizer, batches, Stopwatch(torch.device("cpu")), keep_log_probs=False)
    monkeypatch.undo()
    frames = [batch.num_rows * max(batch.frame_lengths) for batch, _ in batches]
    assert [tensor.numel() for tensor in read] == frames
    assert not any(tensor.is_floating_point() for tensor in read)


def test_padding_leaks_as_in_the_original_only_when_asked(folder, tmp_path):
    found = {}
    for size in (1, NUMBER):
        path = tmp_path / f"{size}.pt"
        score(folder, "--reference_padding", "--batch_size", size, "--save_logits", path)
        found[size] = torch.load(path, weights_only=True)["log_probs"]
    differences = [float((a - b).abs().max()) for a, b in zip(found[1], found[NUMBER], strict=True)]
    assert max(differences) > 1e-2
    longest = max(range(NUMBER), key=lambda place: len(found[1][place]))
    assert differences[longest] < 1e-4


def test_predictions_stand_in_the_order_of_the_list(folder, tmp_path):
    score(folder, "--save_predictions", tmp_path / "out.txt", "--batch_size", "2")
    found = read_predictions(tmp_path / "out.txt")
    assert [name for name, _ in found] == [str(number) for number in range(NUMBER)]
    texts = []
    for number in range(NUMBER):
        infer(
            folder / "model.pt",
            *("--transcribe_wav", folder / f"audio/{number}.wav", "--save_predictions", tmp_path / "one.txt"),
        )
        texts.append(read_predictions(tmp_path / "one.txt")[0][1])
    assert [text for _, text in found] == texts


def test_a_file_that_is_listed_twice_is_transcribed_twice(folder, tmp_path, capsys):
    lines = (folder / "valid.tsv").read_text().splitlines()
    soundfile.write(folder / "audio/3.flac", soundfile.read(folder / "audio/4.wav")[0], 16000)
    flac = f"3.flac\t{soundfile.info(folder / 'audio/3.flac').frames}"  # the id of 3.wav, the sound of 4.wav
    (tmp_path / "twice.tsv").write_text("\n".join([lines[0], flac, *lines[1:], lines[3]]) + "\n")
    score(folder, "--save_predictions", tmp_path / "once.txt")
    expected = read_predictions(tmp_path / "once.txt")
    capsys.readouterr()
    infer(folder / "model.pt", "--transcribe_filelist", tmp_path / "twice.tsv", "--batch_size", "3")
    found = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert found == [["3", expected[4][1]], *expected, expected[2]]


def test_saved_log_probabilities_decode_to_the_predictions(folder, tmp_path):
    score(folder, "--output_dir", tmp_path, "--save_logits", "logits.pt", "--save_predictions", "out.txt")
    saved = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (saved["format"], saved["format_version"]) == ("wav2vec2-log-probs", 1)
    assert saved["symbols"] == SYMBOLS
    assert saved["lengths"] == [len(log_probs) for log_probs in saved["log_probs"]]
    dictionary = Dictionary.from_symbols(saved["symbols"])
    texts = []
    for log_probs_TK, length in zip(saved["log_probs"], saved["lengths"], strict=True):
        assert log_probs_TK.dtype == torch.float32
        torch.testing.assert_close(log_probs_TK.exp().sum(-1), torch.ones(length))
        texts.append(dictionary.decode(decoding.greedy(log_probs_TK[None], [length])[0][0]))
    assert [list(pair) for pair in zip(saved["ids"], texts, strict=True)] == read_predictions(tmp_path / "out.txt")


def test_error_rates_agree_with_an_edit_distance_written_anew(folder, tmp_path, capsys):
    labels = (folder / "valid.ltr").read_text().splitlines()
    labels[1], labels[2] = "", "é t é | S I X |"  # silence; characters that the model does not know
    data = tmp_path / "data"
    data.mkdir()
    (data / "valid.tsv").write_text((folder / "valid.tsv").read_text())
    (data / "valid.ltr").write_text("\n".join(labels) + "\n")
    score(data, "--save_predictions", tmp_path / "out.txt", model=folder / "model.pt")
    output = capsys.readouterr()
    references = ["".join(line.split()).replace("|", " ").strip() for line in labels]
    texts = [text for _, text in read_predictions(tmp_path / "out.txt")]
    pairs = list(zip(references, texts, strict=True))
    wer = sum(edits(r.split(), h.split()) for r, h in pairs) / sum(len(r.split()) for r in references)
    cer = sum(edits(r, h) for r, h in pairs) / sum(map(len, references))
    lines = output.out.splitlines()
    assert lines[-1] == f"WER: {100 * wer:.2f} %"
    assert lines[-2].startswith(f"CER: {100 * cer:.2f} % (")
    assert lines[-4] == f"utterances: {NUMBER}"
    assert wer > 0
    assert "2 characters that the model cannot write" in output.err
    assert "1 empty lines" in output.err


def test_two_processes_give_the_result_of_one(folder, tmp_path, capsys):
    command = ["--w2v_path", folder / "model.pt", "--data", folder, "--valid_subset", "valid", "--device", "cpu"]
    command += ["--batch_size", "2", "--save_predictions", tmp_path / "two.txt", "--save_logits", tmp_path / "two.pt"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "inference.py"), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    score(folder, "--batch_size", "2", "--save_predictions", tmp_path / "one.txt", "--save_logits", tmp_path / "one.pt")
    scores = [[line for line in text.splitlines() if "ER: " in line] for text in (done.stdout, capsys.readouterr().out)]
    assert len(scores[0]) == 2
    assert scores[0] == scores[1]
    assert (tmp_path / "two.txt").read_text() == (tmp_path / "one.txt").read_text()
    two, one = (torch.load(tmp_path / name, weights_only=True) for name in ("two.pt", "one.pt"))
    assert two["ids"] == one["ids"]
    for found, expected in zip(two["log_probs"], one["log_probs"], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_number_of_workers_changes_nothing(folder, tmp_path):
    for workers in (0, 2):
        score(folder, "--num_workers", workers, "--save_predictions", tmp_path / f"{workers}.txt")
    assert (tmp_path / "2.txt").read_text() == (tmp_path / "0.txt").read_text()


def test_averaged_weights_are_used_unless_refused(folder, tmp_path):
    averaged = finetuned(tmp_path / "averaged.pt", ema=weights(MODEL, seed=2))
    plain = finetuned(tmp_path / "plain.pt", seed=2)
    runs = {"ema": (averaged, ()), "plain": (plain, ()), "off": (averaged, ("--no_ema",)), "old": (None, ())}
    for name, (model, more) in runs.items():
        score(folder, "--save_predictions", tmp_path / name, *more, model=model)
    texts = {name: (tmp_path / name).read_text() for name in runs}
    assert texts["ema"] == texts["plain"] != texts["off"] == texts["old"]


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_stays_near_full_precision(folder, tmp_path, precision):
    for name, more in (("half", (precision,)), ("full", ())):
        score(folder, "--save_logits", tmp_path / name, *more)
    half, full = (torch.load(tmp_path / name, weights_only=True)["log_probs"] for name in ("half", "full"))
    difference = torch.cat(half).exp() - torch.cat(full).exp()
    assert {log_probs.dtype for log_probs in half} == {torch.float32}
    assert 0 < difference.abs().mean() < 0.03


def tones(folder: Path, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A corpus of tones that stand for symbols 4 to 7, one after the other: waves, and the symbol of every sample."""
    rng = np.random.default_rng(0)
    waves, symbols = [], []
    for _ in range(number):
        names = [int(rng.integers(4, 8))]
        for step in rng.integers(1, 4, rng.integers(1, 6)):
            names.append(4 + (names[-1] - 4 + int(step)) % 4)  # another one than before
        sizes = rng.integers(3200, 8000, len(names))
        parts = [
            0.3 * np.sin(2 * np.pi * {4: 300, 5: 800, 6: 2000, 7: 5000}[name] * np.arange(size) / 16000)
            for name, size in zip(names, sizes, strict=True)
        ]
        waves.append((np.concatenate(parts) + 0.01 * rng.standard_normal(sizes.sum())).astype(np.float32))
        symbols.append(np.repeat(names, sizes))
        soundfile.write(folder / f"{len(waves)}.wav", waves[-1], 16000, subtype="FLOAT")
        with (folder / "valid.ltr").open("a") as labels:
            labels.write(" ".join(SYMBOLS[name] for name in names) + " |\n")
    lines = [str(folder), *(f"{place}.wav\t{len(wave_S)}" for place, wave_S in enumerate(waves, start=1))]
    (folder / "valid.tsv").write_text("\n".join(lines) + "\n")
    return waves, symbols


@pytest.mark.parametrize("model", [MODEL, HOURGLASS], ids=["base", "hourglass"])
def test_a_model_that_is_sure_writes_the_truth_in_every_precision(tmp_path, capsys, model):
    waves, symbols = tones(tmp_path, number=9)
    torch.manual_seed(0)
    network = Wav2Vec2Ctc(model, NO_DROPOUT, num_symbols=len(SYMBOLS))
    lengths_B = torch.tensor([len(wave_S) for wave_S in waves])
    audio_BS = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave_S) for wave_S in waves], batch_first=True)
    middles = [200 + 320 * np.arange(network.w2v.num_frames(len(row))) for row in symbols]
    targets = [torch.from_numpy(row[places]) for row, places in zip(symbols, middles, strict=True)]
    targets_BT = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(40):
        logits_BTK, _ = network(audio_BS, lengths_B, norm_lengths_B=lengths_B)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_BTK.transpose(1, 2), targets_BT).backward()
        optimizer.step()
    path = finetuned(tmp_path / "model.pt", model, model=network.state_dict())
    for precision in ((), ("--bf16",), ("--fp16",)):
        score(tmp_path, "--max_tokens", 100000, *precision, model=path)
        assert capsys.readouterr().out.splitlines()[-1] == "WER: 0.00 %", precision


def test_blank_weight_of_the_checkpoint_holds(folder, tmp_path):
    config = Config(mode="finetune", model=MODEL, dropout=NO_DROPOUT)
    config = replace(config, ctc=replace(config.ctc, blank_weight=100.0))
    path = finetuned(tmp_path / "blank.pt", config=flags.to_dict(config))
    score(folder, "--save_predictions", tmp_path / "out.txt", model=path)
    assert {text for _, text in read_predictions(tmp_path / "out.txt")} == {""}


def test_numbers_are_logged_and_warm_up_is_left_out(folder, tmp_path, capsys):
    more = ("--num_warmup_repeats", "1", "--num_repeats", "3", "--warmup_steps", "2", "--batch_size", "4")
    score(folder, *more, "--output_dir", tmp_path)
    output = capsys.readouterr()
    lines = [json.loads(line.removeprefix("DLLL ")) for line in (tmp_path / "nvlog.json").read_text().splitlines()]
    values = next(line["data"] for line in lines if "inference_wer" in line.get("data", {}))
    assert f"WER: {values['inference_wer']:.2f} %" == output.out.splitlines()[-1]
    assert values["inference_utterances"] == NUMBER
    hours = sum(soundfile.info(folder / f"audio/{number}.wav").duration for number in range(NUMBER)) / 3600
    assert values["inference_hours"] == pytest.approx(hours)
    assert values["inference_speech_rate"] > 0
    for stage in ("data", "model", "data+model"):
        latencies = [values[f"inference_latency_{stage}_{name}"] for name in ("90", "95", "99")]
        assert 0 < latencies[0] <= latencies[1] <= latencies[2]
    parts = values["inference_latency_data_avg"] + values["inference_latency_model_avg"]
    assert values["inference_latency_data+model_avg"] == pytest.approx(parts)
    table = [
        line.split()[:5] for line in output.err.splitlines() if line.startswith(("data ", "model ", "data+model "))
    ]
    assert [row[0] for row in table] == ["data", "model", "data+model"]
    assert f"utterances of {3600 * hours / NUMBER:.2f} s on average" in output.err
    score(folder, "--warmup_steps", "100")
    assert WER_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])


def test_latencies_are_averages_and_percentiles_over_the_steps_that_count():
    watch = inference.Stopwatch(torch.device("cpu"))
    watch.data, watch.model, watch.seconds = [9.0, *np.arange(101) / 1000], [9.0, *np.full(101, 0.002)], 4.0
    values = inference.latency.timing(watch, warmup_steps=1, hours=2.0)
    found = [values[f"latency_data_{name}"] for name in ("avg", "90", "95", "99")]
    assert found == pytest.approx([50, 90, 95, 99])
    assert values["latency_data+model_95"] == pytest.approx(97)
    assert values["speech_rate"] == pytest.approx(1800)


def test_a_single_file_is_printed_as_plain_text(folder, capsys):
    score(folder, "--output_dir", folder / "out", "--save_predictions", "all.txt")
    capsys.readouterr()
    infer(folder / "model.pt", "--transcribe_wav", folder / "audio/0.wav")
    assert capsys.readouterr().out == read_predictions(folder / "out/all.txt")[0][1] + "\n"


def test_a_long_utterance_is_transcribed_whole(folder, tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", 0.1 * rng.standard_normal(16000 * 40), 16000)
    (tmp_path / "long.tsv").write_text(f"{tmp_path}\nlong.wav\t{16000 * 40}\n")
    infer(folder / "model.pt", "--transcribe_filelist", tmp_path / "long.tsv", "--save_logits", tmp_path / "long.pt")
    frames = Wav2Vec2Model(MODEL, NO_DROPOUT).num_frames(16000 * 40)
    assert torch.load(tmp_path / "long.pt", weights_only=True)["lengths"] == [frames]


def test_wrong_use_ends_with_status_2(folder, tmp_path, capsys):
    model = ("--w2v_path", folder / "model.pt")
    subset = (*model, "--data", folder, "--valid_subset", "valid")
    (tmp_path / "file").touch()
    for command, reason in {
        ("--w2v_path", tmp_path / "none.pt", *subset[2:]): "--w2v_path .*no such file",
        (*model,): "exactly one",
        (*model, "--transcribe_wav", tmp_path / "none.wav"): "--transcribe_wav .*no such file",
        (*model, "--transcribe_wav", 300 * "long"): "--transcribe_wav .*no such file",
        (*subset, "--transcribe_wav", folder / "audio/0.wav"): "exactly one",
        (*subset, "--fp16", "--bf16"): "--fp16 --bf16",
        (*subset, "--batch_sise", "3"): "--batch_size",
        (*subset, "--batch_size", "0", "--max_tokens", "0"): "--batch_size 0 --max_tokens 0",
        (*subset, "--save_predictions", tmp_path): "--save_predictions .*folder",
        (*subset, "--save_logits", tmp_path / "file/a.pt"): "--save_logits .*cannot be written",
        (*subset, "--save_logits", "/tmp/a", "--save_predictions", "/tmp/a"): "--save_logits",
    }.items():
        status, line = fails(capsys, *command)
        assert status == 2, line
        assert re.search(reason, line)


def test_files_that_are_no_fine_tuned_model_end_with_status_1(folder, tmp_path, capsys):
    torch.manual_seed(0)
    pretrained = Config(mode="pretrain", model=MODEL)
    finetuned(
        tmp_path / "pretrained.pt",
        mode="pretrain",
        config=flags.to_dict(pretrained),
        model=Wav2Vec2Model(MODEL, NO_DROPOUT).state_dict(),
        labels=None,
    )
    finetuned(tmp_path / "other.pt", config=flags.to_dict(replace(pretrained, model=LARGE)))
    finetuned(tmp_path / "labels.pt", labels=["A", "B"])
    finetuned(tmp_path / "config.pt", config={"mode": "finetune", "modle": {}})
    (tmp_path / "short.pt").write_bytes((folder / "model.pt").read_bytes()[:5000])
    torch.save({"model": {}, "cfg": {}}, tmp_path / "foreign.pt")
    for name, reason in {
        "pretrained": "fine-tune it first",
        "other": "not those of its architecture",
        "labels": "labels",
        "config": "modle",
        "short": "truncated|damaged",
        "foreign": "fairseq",
    }.items():
        status, line = fails(capsys, "--w2v_path", tmp_path / f"{name}.pt", "--transcribe_wav", folder / "audio/0.wav")
        assert status == 1, line
        assert f"{name}.pt" in line
        assert re.search(reason, line)


def test_bad_audio_ends_with_status_1(folder, tmp_path, capsys):
    wave = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(tmp_path / "infinite.wav", np.append(wave, np.inf), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", wave[:300], 16000)
    (tmp_path / "text.wav").write_text("no audio")
    for name, samples, reason in (
        ("infinite", 16001, "NaN or infinite"),
        ("short", 300, "too short"),
        ("text", 16000, "not audio"),
    ):
        status, line = fails(capsys, "--w2v_path", folder / "model.pt", "--transcribe_wav", tmp_path / f"{name}.wav")
        assert (status, bool(re.search(reason, line))) == (1, True), line
        (tmp_path / "list.tsv").write_text(f"{tmp_path}\n{name}.wav\t{samples}\n")
        for workers in ("0", "1"):
            command = ("--transcribe_filelist", tmp_path / "list.tsv", "--num_workers", workers)
            status, line = fails(capsys, "--w2v_path", folder / "model.pt", *command)
            assert (status, bool(re.search(reason, line))) == (1, True), line
            assert "list.tsv:2" in line


def test_labels_without_words_are_no_reference(folder, tmp_path, capsys):
    (tmp_path / "valid.tsv").write_text((folder / "valid.tsv").read_text())
    (tmp_path / "valid.ltr").write_text("\n" * NUMBER)
    status, line = fails(capsys, "--w2v_path", folder / "model.pt", "--data", tmp_path, "--valid_subset", "valid")
    assert status == 1
    assert "valid.ltr" in line
    (tmp_path / "valid.ltr").unlink()
    status, line = fails(capsys, "--w2v_path", folder / "model.pt", "--data", tmp_path, "--valid_subset", "valid")
    assert (status, "valid.ltr: no such file" in line) == (1, True)


def test_the_program_itself_ends_with_one_line_and_no_traceback(folder):
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--w2v_path",
        str(folder / "dict.ltr.txt"),
        "--device",
        "cpu",
    ]
    command += ["--transcribe_wav", str(folder / "audio/0.wav")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    traced = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120, check=False)
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr


def test_a_manifest_is_scored_like_its_list(folder, tmp_path, capsys):
    score(folder, "--save_predictions", tmp_path / "list.txt")
    scored = capsys.readouterr().out
    convert_manifest.main([str(folder / "valid.tsv"), str(tmp_path / "valid.json")])
    capsys.readouterr()
    infer(
        folder / "model.pt", "--data", tmp_path, "--valid_subset", "valid", "--save_predictions", tmp_path / "json.txt"
    )
    rates = [re.findall(r"(?:WER|CER): [\d.]+", text) for text in (scored, capsys.readouterr().out)]
    assert rates[0] == rates[1]
    assert len(rates[0]) >= 1
    texts = [[line[1:] for line in read_predictions(tmp_path / name)] for name in ("list.txt", "json.txt")]
    assert texts[0] == texts[1]
