"""Small models with everything that goes into them from closed formulas, and what the slow implementation gives.

`PYTHONPATH=. python tests/golden_cases.py` writes wav2vec2/golden_numbers.json anew.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from slow_reference import SlowModel, code_statistics, contrastive, cross_entropy, ctc

from wav2vec2.config import Config, ModelConfig, ObjectiveConfig
from wav2vec2.convert.contents import needed_shapes

Array = np.ndarray
STORED = Path(__file__).parent / "wav2vec2/golden_numbers.json"
LENGTHS = (290, 211, 150)  # samples
LABELS = ((4, 5, 5, 6), (2, 3), (6,))
SYMBOLS, MASKED, NEGATIVES, TEMPERATURE = 7, 5, 4, 0.7

BASE = ModelConfig(
    conv_feature_layers="[(8,5,3)]+[(8,3,2)]+[(8,2,2)]",
    encoder_layers=2,
    encoder_embed_dim=12,
    encoder_ffn_embed_dim=20,
    encoder_attention_heads=3,
    conv_pos=4,
    conv_pos_groups=2,
    final_dim=6,
    latent_vars=5,
)
LARGE = replace(
    BASE,
    conv_feature_layers="[(8,5,3)]+[(8,3,2)]+[(12,2,2)]",  # as wide as the transformer: no projection
    extractor_mode="layer_norm",
    layer_norm_first=True,
    conv_bias=True,
    conv_pos=5,
    quantize_targets=False,
)


@dataclass(frozen=True)
class Case:
    """A model, its objective, whether noise chooses the codes, and whether padding leaks through the group norm."""

    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(logit_temp=0.2, loss_weights=(0.3, 4.0)))
    noisy: bool = False
    leaking: bool = False


PLAIN = Case(BASE)
CASES = {
    "base": replace(PLAIN, noisy=True),
    "base_leaking": replace(PLAIN, leaking=True),
    "base_across": replace(PLAIN, objective=replace(PLAIN.objective, cross_sample_negatives=3, codebook_negatives=2)),
    "large": replace(PLAIN, model=LARGE),
    "hourglass": replace(PLAIN, model=replace(BASE, hourglass_transformer="[1,(1,3),1]", latent_dim=8)),
    "hourglass_linear": replace(
        PLAIN, model=replace(BASE, hourglass_transformer="[0,(2,2),0]", hourglass_resample="linear", latent_groups=3)
    ),
}


# ---- Everything that goes in, from closed formulas -------------------------------------------------------------------


def wave(shape: tuple[int, ...], number: int) -> Array:
    """Numbers between -1 and 1 without an apparent pattern: a sine of growing frequency."""
    count = np.arange(1, int(np.prod(shape)) + 1, dtype=float)
    return np.sin(0.37 * count**2 + 1.7 * count + number).reshape(shape)


@cache
def weights(config: ModelConfig) -> dict[str, Array]:
    """Weights of about the size of trained ones; those of the output layer among them."""
    found = {}
    output = {"proj.weight": (SYMBOLS, config.encoder_embed_dim), "proj.bias": (SYMBOLS,)}
    shapes = {**needed_shapes(Config("pretrain", model=config), 0), **output}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        value = wave(tuple(shape), number)
        if re.search(r"norm\.weight$|weight_g$", name):
            found[name] = 1 + 0.3 * value
        elif name.endswith("bias"):
            found[name] = 0.2 * value
        else:
            found[name] = value * 2 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 4)
    return found


def audio() -> list[Array]:
    return [0.5 * wave((length,), 100 + row) for row, length in enumerate(LENGTHS)]


def mask(frames: int) -> Array:
    """[B, T]; the same number in every row."""
    found = np.zeros((len(LENGTHS), frames), bool)
    for row in range(len(LENGTHS)):
        found[row, np.array([0, 1, 4, 5, 8]) + row + 1] = True
    return found


def noise(groups: int, codes: int) -> Array:
    """Gumbel noise of all masked frames."""
    uniform = 0.5 + 0.49 * wave((len(LENGTHS) * MASKED, groups, codes), 200)
    return -np.log(-np.log(uniform))


def negatives(case: Case) -> Array:
    """[B, M, N] places among the masked frames of all rows, never that of the frame itself."""
    rows, m, n = np.ogrid[: len(LENGTHS), :MASKED, :NEGATIVES]
    within = rows * MASKED + (m + 1 + (rows + 2 * m + n) % (MASKED - 1)) % MASKED
    n = np.arange(case.objective.cross_sample_negatives)
    own, total = rows * MASKED + m, len(LENGTHS) * MASKED
    return np.concatenate([within, (own + 1 + (3 * own + 5 * n) % (total - 1)) % total], -1)


def codes(case: Case) -> Array:
    """[B, M, n, G] codes that are drawn from the codebook."""
    shape = (len(LENGTHS), MASKED, case.objective.codebook_negatives, case.model.latent_groups)
    return np.arange(np.prod(shape)).reshape(shape) * 7 % case.model.latent_vars


# ---- What the slow implementation gives ------------------------------------------------------------------------------


def slow_rows(case: Case, model: SlowModel) -> list[tuple[Array, Array, Array]]:
    """Of every row: conv features as they are penalised, normed ones without padding, and the mask over these."""
    found = []
    for row, masked in zip(audio(), mask(len(model.conv_features(audio()[0]))), strict=True):
        frames = len(model.conv_features(row))
        given = np.pad(row, (0, max(LENGTHS) - len(row))) if case.leaking else row
        conv = model.conv_features(given)
        found.append((conv, model.features(conv)[:frames], masked[:frames]))
    return found


def slow_numbers(case: Case, given: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Everything that a pre-training pass gives, with other weights if they are given."""
    model = SlowModel(case.model, given or weights(case.model))
    rows = slow_rows(case, model)
    encoded = [model.encode(features, masked) for _, features, masked in rows]
    drawn = noise(case.model.latent_groups, case.model.latent_vars) if case.noisy else None
    candidates = np.concatenate([features[masked] for _, features, masked in rows])
    vectors, chosen, logits = model.quantize(candidates, drawn, TEMPERATURE)
    targets = model.linear("project_q", vectors)
    predictions = np.concatenate([model.linear("final_proj", x[row[2]]) for x, row in zip(encoded, rows, strict=True)])
    indices, drawn_codes = (draw(case).reshape(len(targets), *draw(case).shape[2:]) for draw in (negatives, codes))
    similarities = []
    for place, prediction in enumerate(predictions):
        others = [(targets[index], chosen[index]) for index in indices[place]]
        others += [(model.linear("project_q", model.look_up(code[None])[0]), code) for code in drawn_codes[place]]
        similarities.append(contrastive(prediction, targets[place], chosen[place], others, case.objective.logit_temp))
    size, (diversity_weight, penalty_weight) = len(similarities), case.objective.loss_weights
    found = {
        "conv_features": np.concatenate([conv[: len(features)] for conv, features, _ in rows]),
        "features": np.concatenate([features for _, features, _ in rows]),
        "encoded": np.concatenate(encoded),
        "logits": np.array(similarities),
        "contrastive": np.array(sum(map(cross_entropy, similarities))),
        "penalty": penalty_weight * size * np.square(np.concatenate([conv for conv, _, _ in rows])).mean(),
    }
    found["total"] = found["contrastive"] + found["penalty"]
    if case.model.quantize_targets:
        count = logits[0].size
        found["codes"] = chosen
        found["code_perplexity"], found["prob_perplexity"] = map(np.array, code_statistics(logits))
        found["diversity"] = diversity_weight * size * (count - found["prob_perplexity"]) / count
        found["total"] = found["total"] + found["diversity"]
    return found


def slow_ctc(case: Case) -> dict[str, Array]:
    model = SlowModel(case.model, weights(case.model))
    logits = [
        model.linear("proj", model.encode(features, masked, hidden))
        for (_, features, masked), hidden in zip(slow_rows(case, model), hidden_channels(), strict=True)
    ]
    log_probs = [row - np.logaddexp.reduce(row, -1, keepdims=True) for row in logits]
    total = sum(ctc(row, labels) for row, labels in zip(log_probs, LABELS, strict=True))
    return {"ctc_logits": np.concatenate(logits), "ctc": np.array(total)}


def hidden_channels() -> Array:
    """[B, D] bool."""
    return wave((len(LENGTHS), 12), 300) > 0.5


# ---- What is stored --------------------------------------------------------------------------------------------------


def digest(value: Array) -> list[float]:
    """A number, or of an array: size, infinite ones, and of the finite ones mean, root mean square, first and last."""
    numbers = np.asarray(value, float).ravel()
    if len(numbers) == 1:
        return numbers.tolist()
    finite = numbers[np.isfinite(numbers)]
    size = [len(numbers), len(numbers) - len(finite)]
    return [*size, finite.mean(), np.sqrt((finite**2).mean()), finite[0], finite[-1]]


def write() -> None:
    """Store what the slow implementation gives."""
    numbers = {
        name: {
            key: [float(f"{number:.12g}") for number in digest(value)]
            for key, value in {**slow_numbers(case), **slow_ctc(case)}.items()
        }
        for name, case in CASES.items()
    }
    lines = [
        f' "{name}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in values.items()) + "\n }"
        for name, values in numbers.items()
    ]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
