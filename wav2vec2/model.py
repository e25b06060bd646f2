"""wav2vec 2.0 (Baevski et al. 2020), in the order of the paper, with the Hourglass transformer (Nawrot et al. 2021).

waveform [B, S] -> conv feature extractor [B, T, C] -> layer norm, projection [B, T, D] -> masking -> transformer
encoder [B, T, D]; pre-training adds the Gumbel quantizer and the two projections in which predictions and targets
meet, fine-tuning one output projection. Modules compute in the type of their own weights.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wav2vec2.attention import Runs, SelfAttention, keys_of
from wav2vec2.config import DropoutConfig, ModelConfig
from wav2vec2.convolutions import PositionalConv, flat_windows, normed_first_conv, row_pitch, strided_conv
from wav2vec2.dropout import Dropout
from wav2vec2.gradients import ScaleGradient, touch
from wav2vec2.norms import ChannelNorm, LayerNorm, at_least_fp32, valid_positions


def num_frames(samples: Any, conv_layers: Sequence[tuple[int, int, int]]) -> Any:
    """Frames that a waveform gives: floor((n - kernel) / stride) + 1, layer by layer.

    Works on integers, NumPy arrays and tensors. The result is below 1 for a waveform shorter than the receptive field.
    """
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


# ---- Section 2: the feature encoder ---------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Convolution, norm (of channels over time, of frames over channels, or none), GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, norm: str | None, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module | None = None
        if norm == "channel":
            self.norm = ChannelNorm(outputs)
        elif norm == "frame":
            self.norm = LayerNorm(outputs)

    def forward(self, x_RI: Tensor, *, gelu: bool) -> Tensor:
        """Frames of the block before [R, I], of which the GELU is still to be taken or not -> [R / stride, C] likewise.

        The GELU belongs to the next product, which computes it again in backward rather than keep what it gives.
        """
        x_RC = strided_conv(x_RI, self.conv.weight, self.conv.bias, stride=self.conv.stride[0], gelu=gelu)
        return x_RC if self.norm is None else self.norm(x_RC)

    def forward_audio(self, audio_BS: Tensor, lengths_B: Tensor | None, pitch: int) -> tuple[Tensor, bool]:
        """The first block, with `pitch` places for each waveform: [B x pitch, C], and whether its GELU is to be taken.

        `lengths_B` are the frames over which a channel is normalised, None for all of them.
        """
        conv = self.conv
        if isinstance(self.norm, ChannelNorm):
            x_BRC = normed_first_conv(
                *(audio_BS, conv.weight, conv.bias, *self.norm()),
                stride=conv.stride[0],
                lengths_B=lengths_B,
                eps=self.norm.eps,
                pitch=pitch,
            )
            return x_BRC.flatten(0, 1), False
        windows_Rk = flat_windows(audio_BS.to(conv.weight.dtype), conv.kernel_size[0], conv.stride[0], pitch)
        x_RC = strided_conv(windows_Rk, conv.weight.transpose(1, 2), conv.bias, stride=1, gelu=False)
        return x_RC if self.norm is None else self.norm(x_RC), True


class FeatureExtractor(nn.Module):
    """Seven conv blocks: one frame every 20 ms from 25 ms of 16 kHz audio."""

    def __init__(self, conv_layers: Sequence[tuple[int, int, int]], *, mode: str, bias: bool) -> None:
        super().__init__()
        self.conv_layers = list(conv_layers)
        self.blocks = nn.ModuleList()
        inputs = 1
        for index, (outputs, kernel, stride) in enumerate(conv_layers):
            norm = "frame" if mode == "layer_norm" else "channel" if index == 0 else None
            self.blocks.append(ConvBlock(inputs, outputs, kernel, stride, norm=norm, bias=bias))
            inputs = outputs

    def forward(self, audio_BS: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """[B, S] -> [B, T, C]; `lengths_B` are the samples over which each row is normalised, None for all of them.

        Raises ValueError for a waveform that is too short for a frame.
        """
        B, S = audio_BS.shape
        T = num_frames(S, self.conv_layers)
        if T < 1:
            raise ValueError(f"{S} samples are too short for a frame of this model")
        first_lengths_B = None if lengths_B is None else num_frames(lengths_B, self.conv_layers[:1])
        pitch = row_pitch(num_frames(S, self.conv_layers[:1]), [stride for _, _, stride in self.conv_layers[1:]])
        x_RC, gelu = cast(ConvBlock, self.blocks[0]).forward_audio(audio_BS, first_lengths_B, pitch)
        for block in self.blocks[1:]:
            x_RC, gelu = block(x_RC, gelu=gelu), True
        x_BTC = x_RC.unflatten(0, (B, -1))[:, :T]
        return F.gelu(x_BTC) if gelu else x_BTC


# ---- Section 2: contextualized representations with transformers ----------------------------------------------------


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward block, each with a residual; the norm stands before or after them."""

    def __init__(self, config: ModelConfig, dropout: DropoutConfig, *, fp32_softmax: bool = False) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.layer_norm_first = config.layer_norm_first
        self.self_attn = SelfAttention(
            dim, config.encoder_attention_heads, dropout=dropout.attention_dropout, fp32_softmax=fp32_softmax
        )
        self.self_attn_layer_norm = LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, dim)
        self.final_layer_norm = LayerNorm(dim)
        self.dropout = Dropout(dropout.dropout)
        self.activation_dropout = Dropout(dropout.activation_dropout)

    def forward(self, x_BTD: Tensor, keys: Tensor | Runs | None = None, wanted_R: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], or [R, D] of the wanted frames (b x T + t); `keys` are those of SelfAttention.

        Only attention mixes frames: what follows it is computed for the wanted ones alone.
        """
        x = x_BTD if wanted_R is None else x_BTD.flatten(0, 1).index_select(0, wanted_R)
        if self.layer_norm_first:
            x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x_BTD), keys, wanted_R))
            return x + self._feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x_BTD, keys, wanted_R)))
        return self.final_layer_norm(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.activation_dropout(F.gelu(self.fc1(x)))))


class Downsample(nn.Module):
    """Shorten a sequence by a factor: the mean of neighbours, or a projection of them side by side."""

    def __init__(self, dim: int, factor: int, method: str) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(factor * dim, dim) if method == "linear" else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, P x factor, D] -> [B, P, D]."""
        x_BPfD = x_BTD.unflatten(1, (-1, self.factor))
        return x_BPfD.mean(2) if self.linear is None else self.linear(x_BPfD.flatten(2))


class Upsample(nn.Module):
    """Lengthen a sequence by a factor: repeat every frame, or project it to several."""

    def __init__(self, dim: int, factor: int, method: str) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(dim, factor * dim) if method == "linear" else None

    def forward(self, x_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, P x factor, D]."""
        if self.linear is None:
            return x_BPD.repeat_interleave(self.factor, dim=1)
        return self.linear(x_BPD).unflatten(2, (self.factor, -1)).flatten(1, 2)


class TransformerEncoder(nn.Module):
    """Positional convolution and transformer layers; with the Hourglass most of them at a lower frame rate."""

    def __init__(self, config: ModelConfig, dropout: DropoutConfig, *, fp32_softmax: bool = False) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        hourglass = config.hourglass()
        before, middle, factor, after = hourglass or (config.encoder_layers, 0, 1, 0)

        def stack(number: int) -> nn.ModuleList:
            return nn.ModuleList(TransformerLayer(config, dropout, fp32_softmax=fp32_softmax) for _ in range(number))

        self.factor = factor
        self.layer_norm_first = config.layer_norm_first
        self.pos_conv = PositionalConv(dim, config.conv_pos, config.conv_pos_groups)
        self.layer_norm = LayerNorm(dim)
        self.dropout = Dropout(dropout.dropout)
        self.layers = stack(before)
        if hourglass:
            self.downsample = Downsample(dim, factor, config.hourglass_resample)
            self.hourglass_layers = stack(middle)
            self.upsample = Upsample(dim, factor, config.hourglass_resample)
            self.post_layers = stack(after)
        self.has_hourglass = hourglass is not None
        self.num_layers = before + middle + after
        self.kept = [True] * self.num_layers  # LayerDrop's draw of this update, set by the task
        self.checkpoint_activations = False  # set where the run is built
        self.knows_lengths = True  # not where layers are compiled: every set of lengths would be compiled in
        self.apply(_init_transformer)

    def forward(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor | None = None,
        *,
        frame_lengths: Sequence[int] | None = None,
        layer: int | None = None,
        wanted_R: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], or [R, D] of the wanted frames (b x T + t).

        `lengths_B` are valid frames per row (None when nothing is padded), `frame_lengths` the same on the host
        where they are known. With `layer` the result is that of the layer with this index, without a final norm; inside
        the Hourglass only layers after the lengthening can be asked for.
        """
        if layer is not None and self.has_hourglass and layer < self.num_layers - len(self.post_layers):
            raise ValueError(f"layer {layer}: lies before the end of the Hourglass; ask for a later one")
        valid_BT = None if lengths_B is None else valid_positions(lengths_B, x_BTD.shape[1])
        x_BTD = _zero_padding(x_BTD, valid_BT)
        x_BTD = x_BTD + self.pos_conv(x_BTD)
        if not self.layer_norm_first:
            x_BTD = self.layer_norm(x_BTD)
        if frame_lengths is not None and (
            len(frame_lengths) != len(x_BTD) or not 0 < min(frame_lengths) <= max(frame_lengths) <= x_BTD.shape[1]
        ):
            raise ValueError(
                f"frame_lengths {frame_lengths}: needs 1 to {x_BTD.shape[1]} for each of {len(x_BTD)} rows"
            )
        lengths = frame_lengths if self.knows_lengths else None
        keys = keys_of(valid_BT, lengths)
        x = self._run(self.layers, self.dropout(x_BTD), keys, 0, layer, wanted_R)
        if self.has_hourglass:
            x = x + self._hourglass(x, valid_BT, lengths)
            first = self.num_layers - len(self.post_layers)
            x = self._run(self.post_layers, x, keys, first, layer, wanted_R)
        if wanted_R is not None and x.dim() == 3:  # no layer was there to choose them
            x = x.flatten(0, 1).index_select(0, wanted_R)
        if self.layer_norm_first and layer is None:
            x = self.layer_norm(x)
        return x

    def _hourglass(self, x_BTD: Tensor, valid_BT: Tensor | None, lengths: Sequence[int] | None) -> Tensor:
        """The middle layers on the shortened sequence, brought back to the length of x."""
        T = x_BTD.shape[1]
        pad = -T % self.factor
        # Padding must not enter the last pooled frame of a row: it counts as zeros there, as behind a row run alone.
        x_BPD = self.downsample(F.pad(_zero_padding(x_BTD, valid_BT), (0, 0, 0, pad)))
        valid_BP = None if valid_BT is None else F.pad(valid_BT, (0, pad)).unflatten(1, (-1, self.factor)).any(-1)
        keys = keys_of(valid_BP, lengths and [-(-length // self.factor) for length in lengths])
        x_BPD = self._run(self.hourglass_layers, x_BPD, keys, len(self.layers))
        return self.upsample(x_BPD)[:, :T]

    def _run(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        keys: Tensor | Runs | None,
        first: int,
        last: int | None = None,
        wanted_R: Tensor | None = None,
    ) -> Tensor:
        for index, layer in enumerate(layers, start=first):
            if last is not None and index > last:
                break
            if self.training and not self.kept[index]:
                x = touch(x, layer)
                continue
            arguments = x, keys, wanted_R if index == self.num_layers - 1 else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x


def _zero_padding(x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
    return x_BTD if valid_BT is None else x_BTD * valid_BT[..., None].to(x_BTD.dtype)


def _init_transformer(module: nn.Module) -> None:
    """BERT's initialisation of the linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---- Section 2: the quantization module -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """Targets of R frames: vectors [R, target_dim], chosen codes [R, G] and the logits [R, G, V] behind them."""

    vectors_RD: Tensor
    codes_RG: Tensor
    logits_RGV: Tensor

    def rows(self, some: slice) -> Quantized:
        """The same of some of the frames."""
        return Quantized(self.vectors_RD[some], self.codes_RG[some], self.logits_RGV[some])


class GumbelQuantizer(nn.Module):
    """Product quantization: one code of every group, chosen by a straight-through Gumbel softmax."""

    def __init__(self, inputs: int, *, groups: int, codes: int, outputs: int) -> None:
        super().__init__()
        self.groups = groups
        self.codes = codes
        self.temperature = 1.0  # set by the task at every update
        self.vars = nn.Parameter(torch.rand(1, groups * codes, outputs // groups))
        self.weight_proj = nn.Linear(inputs, groups * codes)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, x_RC: Tensor, noise_RGV: Tensor | None = None) -> Quantized:
        """Quantize R frames; with Gumbel noise as in training (equation 1), without by arg-max."""
        logits_RGV = at_least_fp32(self.weight_proj(x_RC)).unflatten(-1, (self.groups, self.codes))
        if noise_RGV is None:
            codes_RG = logits_RGV.argmax(-1)
            choice_RGV = F.one_hot(codes_RG, self.codes).to(self.vars.dtype)
        else:
            soft_RGV = torch.softmax((logits_RGV + noise_RGV) / self.temperature, -1)
            codes_RG = soft_RGV.argmax(-1)
            hard_RGV = F.one_hot(codes_RG, self.codes)
            choice_RGV = (soft_RGV + (hard_RGV - soft_RGV).detach()).to(self.vars.dtype)
        return Quantized(self._look_up(choice_RGV), codes_RG, logits_RGV)

    def look_up(self, codes_RG: Tensor) -> Tensor:
        """The vectors [R, target_dim] of given codes."""
        return self._look_up(F.one_hot(codes_RG, self.codes).to(self.vars.dtype))

    def _look_up(self, choice_RGV: Tensor) -> Tensor:
        book_GVd = self.vars.view(self.groups, self.codes, -1)
        return torch.einsum("rgv,gvd->rgd", choice_RGV, book_GVd).flatten(1)

    def joint_codes(self, codes_RG: Tensor) -> Tensor:
        """One number [R] for the codes of all groups: sum of code_g V^(G-1-g)."""
        powers_G = self.codes ** torch.arange(self.groups - 1, -1, -1, device=codes_RG.device)
        return (codes_RG * powers_G).sum(-1)


# ---- The models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """What the trunk gives: contextualized frames [B, T, D] (or [R, D]), and the stages that the losses need."""

    x: Tensor
    features_BTC: Tensor  # layer-normed, before masking: the targets
    conv_features_BTC: Tensor
    frame_lengths_B: Tensor | None  # None when nothing is padded


class Wav2Vec2Model(nn.Module):
    """The trunk, and with `pretraining` the quantizer and the projections of the contrastive task."""

    def __init__(
        self,
        config: ModelConfig,
        dropout: DropoutConfig,
        *,
        pretraining: bool = True,
        fp32_softmax: bool = False,
    ) -> None:
        super().__init__()
        conv_layers = config.conv_layers()
        channels, dim = conv_layers[-1][0], config.encoder_embed_dim
        self.feature_grad_mult = dropout.feature_grad_mult
        self.feature_extractor = FeatureExtractor(conv_layers, mode=config.extractor_mode, bias=config.conv_bias)
        self.layer_norm = LayerNorm(channels)
        projects = channels != dim or config.feature_projection == "always"
        self.post_extract_proj = nn.Linear(channels, dim) if projects else nn.Identity()
        self.dropout_input = Dropout(dropout.dropout_input)
        self.mask_emb = nn.Parameter(torch.rand(dim))
        self.encoder = TransformerEncoder(config, dropout, fp32_softmax=fp32_softmax)
        if pretraining:
            self.dropout_features = Dropout(dropout.dropout_features)
            self.quantizer = (
                GumbelQuantizer(
                    channels, groups=config.latent_groups, codes=config.latent_vars, outputs=config.target_dim
                )
                if config.quantize_targets
                else None
            )
            self.project_q = nn.Linear(config.target_dim if config.quantize_targets else channels, config.final_dim)
            self.final_proj = nn.Linear(dim, config.final_dim)
        if self.feature_grad_mult == 0:
            self.feature_extractor.requires_grad_(False)

    def num_frames(self, samples: Any) -> Any:
        """Frames of a waveform of so many samples."""
        return num_frames(samples, self.feature_extractor.conv_layers)

    def forward(
        self,
        audio_BS: Tensor,
        lengths_B: Tensor | None = None,
        *,
        frame_lengths: Sequence[int] | None = None,
        norm_lengths_B: Tensor | None = None,
        mask_BT: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
        layer: int | None = None,
        wanted_R: Tensor | None = None,
    ) -> Encoded:
        """Encode waveforms.

        `lengths_B`: valid samples per row, None when nothing is padded. `norm_lengths_B`: samples over which the
        channel norm averages, None for the whole row: give it `lengths_B` for results that no padding can change.
        `mask_BT`: frames to hide behind the mask embedding; `channel_mask_BD`: channels to set to zero.
        `frame_lengths`, `layer`, `wanted_R`: see TransformerEncoder.
        """
        conv_BTC = self._extract(audio_BS, norm_lengths_B)
        features_BTC = self.layer_norm(conv_BTC)
        x_BTD = self.dropout_input(self.post_extract_proj(features_BTC))
        if mask_BT is not None:
            x_BTD = torch.where(mask_BT[..., None], self.mask_emb.to(x_BTD.dtype), x_BTD)
        if channel_mask_BD is not None:
            x_BTD = x_BTD.masked_fill(channel_mask_BD[:, None], 0)
        frame_lengths_B = None if lengths_B is None else self.num_frames(lengths_B)
        x = self.encoder(x_BTD, frame_lengths_B, frame_lengths=frame_lengths, layer=layer, wanted_R=wanted_R)
        return Encoded(x, features_BTC, conv_BTC, frame_lengths_B)

    def _extract(self, audio_BS: Tensor, norm_lengths_B: Tensor | None) -> Tensor:
        """Conv features [B, T, C], with the gradient scaled by feature_grad_mult."""
        with torch.no_grad() if self.feature_grad_mult == 0 else nullcontext():
            conv_BTC = self.feature_extractor(audio_BS, norm_lengths_B)
        if self.feature_grad_mult not in (0, 1):
            conv_BTC = ScaleGradient.apply(conv_BTC, self.feature_grad_mult)
        return conv_BTC

    def quantize(self, features_RC: Tensor, noise_RGV: Tensor | None = None) -> tuple[Tensor, Quantized | None]:
        """Targets [R, final_dim] of R unmasked frames, and what the quantizer chose (None without one)."""
        features_RC = self.dropout_features(features_RC)
        if self.quantizer is None:
            return self.project_q(features_RC), None
        quantized = self.quantizer(features_RC, noise_RGV)
        return self.project_q(quantized.vectors_RD), quantized


class Wav2Vec2Ctc(nn.Module):
    """The trunk and a linear output layer over the symbols of a dictionary (section 3.2, fine-tuning)."""

    def __init__(
        self,
        config: ModelConfig,
        dropout: DropoutConfig,
        *,
        num_symbols: int,
        blank_weight: float = 0.0,
        blank_mode: str = "add",
        fp32_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.w2v = Wav2Vec2Model(config, dropout, pretraining=False, fp32_softmax=fp32_softmax)
        self.final_dropout = Dropout(dropout.final_dropout)
        self.proj = nn.Linear(config.encoder_embed_dim, num_symbols)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.blank_weight = blank_weight
        self.blank_mode = blank_mode
        self.frozen = False  # only the output layer trains; set by the task at every update

    def forward(
        self,
        audio_BS: Tensor,
        lengths_B: Tensor | None = None,
        *,
        frame_lengths: Sequence[int] | None = None,
        norm_lengths_B: Tensor | None = None,
        mask_BT: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, K] and valid frames per row [B] (None when nothing is padded)."""
        with torch.no_grad() if self.frozen else nullcontext():
            encoded = self.w2v(
                audio_BS,
                lengths_B,
                frame_lengths=frame_lengths,
                norm_lengths_B=norm_lengths_B,
                mask_BT=mask_BT,
                channel_mask_BD=channel_mask_BD,
            )
        x_BTD = touch(encoded.x, self.w2v) if self.frozen and self.training else encoded.x
        logits_BTK = self.proj(self.final_dropout(x_BTD))
        if self.blank_weight:
            blank_BT = logits_BTK[..., 0] * (self.blank_mode == "add") + self.blank_weight
            logits_BTK = torch.cat([blank_BT[..., None], logits_BTK[..., 1:]], -1)
        return logits_BTK, encoded.frame_lengths_B
