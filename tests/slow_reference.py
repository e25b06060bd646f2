"""wav2vec 2.0 once more, from the formulas of the paper: NumPy, float64, loops, one utterance at a time, no padding.

It shares no code with the toolkit but the names of weights and options. It is slow and has no gradients.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from wav2vec2.config import ModelConfig

Array = np.ndarray
gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))), otypes=[float])


def normed(x: Array, axis: int) -> Array:
    """Zero mean and unit variance along an axis."""
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / max(np.sqrt(a @ a) * np.sqrt(b @ b), 1e-30))


def conv(x_TC: Array, weight: Array, stride: int, groups: int = 1) -> Array:
    """Frame by frame: every group of outputs sees its own group of inputs."""
    outputs, inputs, kernel = weight.shape
    y = np.zeros(((len(x_TC) - kernel) // stride + 1, outputs))
    for t in range(len(y)):
        for g in range(groups):
            seen, own = slice(g * inputs, (g + 1) * inputs), slice(g * outputs // groups, (g + 1) * outputs // groups)
            y[t, own] = np.einsum("kc,ock->o", x_TC[t * stride : t * stride + kernel, seen], weight[own])
    return y


class SlowModel:
    """The model of one set of weights; `weights` by the toolkit's names."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.config, self.weights = config, weights

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Array, axis: int = -1) -> Array:
        return normed(x, axis) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def conv_features(self, audio_S: Array) -> Array:
        """[S] -> [T, C]."""
        x = audio_S[:, None]
        for i, (_, _, stride) in enumerate(self.config.conv_layers()):
            block = f"feature_extractor.blocks.{i}"
            x = conv(x, self.weights[f"{block}.conv.weight"], stride) + self.weights.get(f"{block}.conv.bias", 0)
            if self.config.extractor_mode == "layer_norm":
                x = self.norm(f"{block}.norm", x)
            elif i == 0:
                x = self.norm(f"{block}.norm", x, axis=0)  # every channel over time
            x = gelu(x)
        return x

    def features(self, conv_TC: Array) -> Array:
        return self.norm("layer_norm", conv_TC)

    def encode(
        self, features_TC: Array, mask_T: Array | None = None, channels_D: Array | None = None, layer: int | None = None
    ) -> Array:
        """[T, C] -> [T, D]; with `layer` the output of that layer."""
        projects = "post_extract_proj.weight" in self.weights
        x = self.linear("post_extract_proj", features_TC) if projects else features_TC.copy()
        if mask_T is not None:
            x[mask_T] = self.weights["mask_emb"]
        if channels_D is not None:
            x[:, channels_D] = 0
        x = x + self.positions(x)
        pre = self.config.layer_norm_first
        if not pre:
            x = self.norm("encoder.layer_norm", x)
        before, middle, factor, after = self.config.hourglass() or (self.config.encoder_layers, 0, 1, 0)
        x = self.stack("layers", before if layer is None else min(before, layer + 1), x)
        if middle:
            x = x + self.shortened(x, middle, factor)
            x = self.stack("post_layers", after if layer is None else layer + 1 - before - middle, x)
        return self.norm("encoder.layer_norm", x) if pre and layer is None else x

    def positions(self, x_TD: Array) -> Array:
        """Weight norm per kernel tap; padded on both sides, an even kernel has one frame too many."""
        v, g = self.weights["encoder.pos_conv.weight_v"], self.weights["encoder.pos_conv.weight_g"]
        kernel = v.shape[-1]
        weight = np.stack([v[..., k] * g[0, 0, k] / np.sqrt((v[..., k] ** 2).sum()) for k in range(kernel)], -1)
        padded = np.pad(x_TD, ((kernel // 2, kernel // 2), (0, 0)))
        y = conv(padded, weight, 1, self.config.conv_pos_groups)[: len(x_TD)]
        return gelu(y + self.weights["encoder.pos_conv.bias"])

    def stack(self, name: str, number: int, x: Array) -> Array:
        for i in range(number):
            x = self.layer(f"encoder.{name}.{i}", x)
        return x

    def layer(self, name: str, x: Array) -> Array:
        def feed_forward(y: Array) -> Array:
            return self.linear(f"{name}.fc2", gelu(self.linear(f"{name}.fc1", y)))

        parts: list[tuple[str, Callable[[Array], Array]]] = [
            ("self_attn_layer_norm", lambda y: self.attention(f"{name}.self_attn", y)),
            ("final_layer_norm", feed_forward),
        ]
        for norm, part in parts:
            if self.config.layer_norm_first:
                x = x + part(self.norm(f"{name}.{norm}", x))
            else:
                x = self.norm(f"{name}.{norm}", x + part(x))
        return x

    def attention(self, name: str, x_TD: Array) -> Array:
        q, k, v = np.split(self.linear(f"{name}.qkv_proj", x_TD), 3, -1)
        d = x_TD.shape[1] // self.config.encoder_attention_heads
        y = np.zeros_like(x_TD)
        for head in range(self.config.encoder_attention_heads):
            own = slice(head * d, (head + 1) * d)
            for t in range(len(x_TD)):
                y[t, own] = softmax(k[:, own] @ q[t, own] / math.sqrt(d)) @ v[:, own]
        return self.linear(f"{name}.out_proj", y)

    def shortened(self, x_TD: Array, layers: int, factor: int) -> Array:
        """The middle of the Hourglass: the sequence in pieces of `factor` frames, filled up with zeros."""
        T, D = x_TD.shape
        pieces = np.pad(x_TD, ((0, -T % factor), (0, 0))).reshape(-1, factor, D)
        linear = self.config.hourglass_resample == "linear"
        x = self.linear("encoder.downsample.linear", pieces.reshape(len(pieces), -1)) if linear else pieces.mean(1)
        x = self.stack("hourglass_layers", layers, x)
        longer = self.linear("encoder.upsample.linear", x).reshape(-1, D) if linear else np.repeat(x, factor, 0)
        return longer[:T]

    def quantize(self, x_RC: Array, noise_RGV: Array | None, temperature: float) -> tuple[Array, Array, Array]:
        """Vectors [R, target_dim], codes [R, G] and logits [R, G, V]; without a quantizer the frames themselves."""
        if not self.config.quantize_targets:
            return x_RC, x_RC, np.zeros((len(x_RC), 0, 1))
        groups, codes = self.config.latent_groups, self.config.latent_vars
        logits = self.linear("quantizer.weight_proj", x_RC).reshape(-1, groups, codes)
        chosen = (logits if noise_RGV is None else (logits + noise_RGV) / temperature).argmax(-1)
        return self.look_up(chosen), chosen, logits

    def look_up(self, codes_RG: Array) -> Array:
        book = self.weights["quantizer.vars"].reshape(self.config.latent_groups, self.config.latent_vars, -1)
        return np.array([np.concatenate([book[g, code] for g, code in enumerate(row)]) for row in codes_RG])


def perplexity(probabilities_GV: Array) -> float:
    return sum(math.exp(-sum(p * math.log(p + 1e-7) for p in group)) for group in probabilities_GV)


def code_statistics(logits_RGV: Array) -> tuple[float, float]:
    """Perplexity of the most likely codes, and of the mean probabilities."""
    used = np.eye(logits_RGV.shape[-1])[logits_RGV.argmax(-1)]
    return perplexity(used.mean(0)), perplexity(softmax(logits_RGV).mean(0))


def contrastive(
    prediction_F: Array, target_F: Array, identity: Array, candidates: Sequence[tuple[Array, Array]], temperature: float
) -> list[float]:
    """Logits of one masked frame: the target, then its candidates (vector, identity); those equal to it are -inf."""
    others = [
        -math.inf if np.array_equal(same, identity) else cosine(prediction_F, vector) / temperature
        for vector, same in candidates
    ]
    return [cosine(prediction_F, target_F) / temperature, *others]


def cross_entropy(logits: Sequence[float]) -> float:
    """Of the first entry, in nats."""
    return max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits)) - logits[0]


def ctc(log_probs_TK: Array, labels: Sequence[int]) -> float:
    """Negative log-likelihood by the forward recursion over the labels with blanks (symbol 0) between them."""
    states = [0, *(symbol for label in labels for symbol in (label, 0))]
    alpha = [log_probs_TK[0, state] if s < 2 else -math.inf for s, state in enumerate(states)]
    for frame in log_probs_TK[1:]:
        before = alpha
        alpha = []
        for s, state in enumerate(states):
            skips = s > 1 and state not in (0, states[s - 2])
            reached = np.logaddexp.reduce([before[i] for i in range(max(0, s - 2 if skips else s - 1), s + 1)])
            alpha.append(reached + frame[state])
    return -float(np.logaddexp.reduce(alpha[-2:]))
