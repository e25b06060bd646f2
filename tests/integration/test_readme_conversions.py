"""Every line of README's "Moving models in and out", on tiny models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from tiny import corpus
from tiny_contents import SYMBOLS, adam, finetuned, pretrained
from tiny_model import HOURGLASS

import inference
import train
from utils import convert_checkpoint, inspect_checkpoint
from wav2vec2.convert import fairseq, huggingface, native, nvidia
from wav2vec2.convert.load_any import load_any

QUICK = ["--num_workers", "0", "--device", "cpu"]
PRETRAIN = ["--max_tokens", "40000", "--num_negatives", "10", "--mask_length", "3", *QUICK]
# program -> how it is started, and flags for tiny data behind those of the line
PROGRAMS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "utils/inspect_checkpoint.py": (inspect_checkpoint.main, []),
    "utils/convert_checkpoint.py": (convert_checkpoint.main, []),
    "train.py finetune": (train.main, [*QUICK, "--max_tokens", "60000", "--max_update", "1"]),
    "train.py pretrain": (train.main, [*PRETRAIN, "--max_update", "8"]),
    "inference.py": (inference.main, QUICK),
}


def lines() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## Moving models in and out\n")[1].split("\n## ")[0]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block
    return [line.split("  #")[0].strip() for line in block[1].splitlines() if line.strip()]


def prepare(folder: Path) -> None:
    """The files that the lines name."""
    corpus(folder / "lists", number=14)
    soundfile.write(folder / "speech.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    (folder / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in SYMBOLS[4:]))
    base = pretrained(step=6)
    fairseq.write(folder / "wav2vec_small.pt", base)
    fairseq.write(folder / "checkpoint_last.pt", replace(base, optimizer=adam(base.weights, 6)))
    fairseq.write(folder / "wav2vec_small_960h.pt", finetuned(labels=None))
    nvidia.write(folder / "nvidia_base.pt", pretrained(HOURGLASS))
    huggingface.write(folder / "wav2vec2-base-960h", finetuned())
    native.write(folder / "finetuned.pt", finetuned())


def test_every_direction_has_its_line():
    found = "\n".join(lines())
    for target in ("native", "fairseq", "nvidia", "huggingface"):
        assert f"--to {target}" in found
    assert found.count("--to native") == 3
    for flag in ("finetune --w2v_path", "--init_from", "--resume_from", "inference.py --w2v_path"):
        assert flag in found


@pytest.mark.parametrize("line", lines())
def test_a_line_of_the_readme_works(tmp_path, monkeypatch, line):
    prepare(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert words[0] == "python"
    name = next(name for name in PROGRAMS if " ".join(words[1:]).startswith(name))
    main, more = PROGRAMS[name]
    main([*words[2:], *more])
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    if name == "utils/convert_checkpoint.py":
        output, target = words[3], words[words.index("--to") + 1]
        assert load_any(tmp_path / output).source == target
    elif name.startswith("train.py"):
        assert any(path.name.startswith("wav2vec2_update") for path in made)
    else:
        assert not made
