"""Every option of training and inference: its default, its meaning, and which values cannot work together."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from common.checkpoint import default_milestones
from common.errors import ConfigError, one_line
from common.flags import flag
from wav2vec2.data_config import FINETUNE, PRETRAIN, DataConfig, ShardConfig
from wav2vec2.health_config import HealthConfig
from wav2vec2.run_config import RunConfig

# A checkpoint says how large a model is to be made: no more than this, whoever wrote it.
MAX_LAYERS = 500
MAX_WIDTH = 100_000
_MAX_CONV_TEXT = 1000

FP32_OPS = ("conv_norms", "pos_conv", "transformer_layernorm", "mha_softmax", "cosine_sim")
DEFAULT_FP32_OPS = {
    "fp16": ("conv_norms", "pos_conv", "cosine_sim"),
    "bf16": ("pos_conv", "cosine_sim"),
    "fp32": (),
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. Fine-tuning and inference read it from the checkpoint."""

    extractor_mode: str = flag(
        "default",
        "norm in the conv feature extractor: 'default' is a group norm in the first block, "
        "'layer_norm' a layer norm in every block",
        modes=PRETRAIN,
        choices=("default", "layer_norm"),
    )
    conv_feature_layers: str = flag(
        "[(512,10,5)]+[(512,3,2)]*4+[(512,2,2)]*2",
        "conv blocks of the feature extractor as a list of (channels, kernel, stride); + joins, * repeats",
        modes=PRETRAIN,
    )
    conv_bias: bool = flag(False, "biases in the conv feature extractor", modes=PRETRAIN)
    feature_projection: str = flag(
        "needed",
        "linear layer between feature extractor and transformer: 'needed' where their widths differ, or 'always', as "
        "models of Hugging Face have it",
        modes=PRETRAIN,
        choices=("needed", "always"),
    )
    encoder_layers: int = flag(
        12, "transformer layers (not used with an Hourglass)", modes=PRETRAIN, minimum=1, maximum=MAX_LAYERS
    )
    encoder_embed_dim: int = flag(768, "width of the transformer", modes=PRETRAIN, minimum=1, maximum=MAX_WIDTH)
    encoder_ffn_embed_dim: int = flag(
        3072, "width of its feed-forward blocks", modes=PRETRAIN, minimum=1, maximum=MAX_WIDTH
    )
    encoder_attention_heads: int = flag(12, "attention heads", modes=PRETRAIN, minimum=1)
    layer_norm_first: bool = flag(False, "pre-LN transformer (Large models)", modes=PRETRAIN)
    hourglass_transformer: str = flag(
        "",
        "Hourglass '[n_pre,(n_mid,factor),n_post]': layers before, at 1/factor of the frame rate, and after; "
        "empty is off",
        modes=PRETRAIN,
    )
    hourglass_resample: str = flag(
        "naive",
        "how the Hourglass changes the frame rate: average and repeat, or learned projections",
        modes=PRETRAIN,
        choices=("naive", "linear"),
    )
    conv_pos: int = flag(
        128, "kernel of the positional convolution, in frames", modes=PRETRAIN, minimum=1, maximum=MAX_WIDTH
    )
    conv_pos_groups: int = flag(16, "groups of the positional convolution", modes=PRETRAIN, minimum=1)
    final_dim: int = flag(
        256, "width of the space in which predictions and targets meet", modes=PRETRAIN, minimum=1, maximum=MAX_WIDTH
    )
    quantize_targets: bool = flag(True, "targets go through the Gumbel quantizer", modes=PRETRAIN)
    latent_vars: int = flag(320, "codes per group of the quantizer", modes=PRETRAIN, minimum=1, maximum=MAX_WIDTH)
    latent_groups: int = flag(2, "groups of the quantizer", modes=PRETRAIN, minimum=1, maximum=MAX_WIDTH)
    latent_dim: int = flag(
        0, "width of a quantized target; 0 takes --final_dim", modes=PRETRAIN, minimum=0, maximum=MAX_WIDTH
    )
    normalize: bool = flag(
        False, "normalise every waveform to zero mean and unit variance (Large models)", modes=PRETRAIN
    )
    sample_rate: int = flag(16000, "sample rate of the model and of all its audio, in Hz", modes=PRETRAIN, minimum=1)

    def __post_init__(self) -> None:
        """Refuse architectures that cannot be built."""
        self.conv_layers()
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, name):
                raise ConfigError(
                    f"--{name} {getattr(self, name)}: must divide --encoder_embed_dim {self.encoder_embed_dim}"
                )
        if self.hourglass() and self.layer_norm_first:
            raise ConfigError(
                "--hourglass_transformer: needs a post-LN transformer; leave it empty or drop --layer_norm_first"
            )
        if self.quantize_targets and self.target_dim % self.latent_groups:
            raise ConfigError(
                f"--latent_groups {self.latent_groups}: must divide --latent_dim (or --final_dim) {self.target_dim}"
            )

    def conv_layers(self) -> list[tuple[int, int, int]]:
        """The conv blocks as (channels, kernel, stride) each."""
        text = one_line(self.conv_feature_layers, 80)
        try:
            if len(self.conv_feature_layers) > _MAX_CONV_TEXT:
                raise ValueError(f"is longer than {_MAX_CONV_TEXT} characters")
            layers = _evaluate_list(ast.parse(self.conv_feature_layers, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"--conv_feature_layers {text}: {one_line(error)}; write it as [(512,10,5)]+[(512,3,2)]*4"
            ) from None
        if not layers or any(len(layer) != 3 or min(layer) < 1 for layer in layers):
            raise ConfigError(f"--conv_feature_layers {text}: every block is (channels, kernel, stride), all 1 or more")
        return layers

    def hourglass(self) -> tuple[int, int, int, int] | None:
        """(layers before, layers in the middle, shortening factor, layers after), or None when it is off."""
        if not self.hourglass_transformer:
            return None
        text, number = one_line(self.hourglass_transformer, 80), r"\s*([0-9]{1,4})\s*"
        match = re.fullmatch(rf"\s*\[{number},\s*\({number},{number}\)\s*,{number}\]\s*", self.hourglass_transformer)
        if match is None:
            raise ConfigError(
                f"--hourglass_transformer {text}: write it as [2,(8,4),2]: "
                "layers before, (layers in the middle, shortening factor), layers after"
            )
        before, middle, factor, after = (int(group) for group in match.groups())
        if factor < 1 or middle < 1 or before + middle + after > MAX_LAYERS:
            raise ConfigError(
                f"--hourglass_transformer {text}: needs at least one middle layer, a factor of 1 or more and at most "
                f"{MAX_LAYERS} layers"
            )
        return before, middle, factor, after

    @property
    def target_dim(self) -> int:
        """Width of a quantized target."""
        return self.latent_dim or self.final_dim


def _evaluate_list(node: ast.expr) -> list[tuple[int, int, int]]:
    """Read lists of tuples of integers, joined by + and repeated by *; nothing else is evaluated."""
    if isinstance(node, ast.List):
        return [_integers(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        joined = _evaluate_list(node.left) + _evaluate_list(node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = node.right.value if isinstance(node.right, ast.Constant) else None
        if not isinstance(times, int) or not 0 <= times <= 100:
            raise ValueError("a list can be repeated 0 to 100 times")
        joined = _evaluate_list(node.left) * times
    else:
        raise ValueError("only lists of (channels, kernel, stride), + and * are understood")
    if len(joined) > 100:
        raise ValueError("more than 100 blocks")
    return joined


def _integers(node: ast.expr) -> tuple[int, int, int]:
    items = node.elts if isinstance(node, ast.Tuple) else []
    values = [item.value for item in items if isinstance(item, ast.Constant) and type(item.value) is int]
    if len(items) != 3 or len(values) != 3 or max(values) > MAX_WIDTH:
        raise ValueError(f"every block is a tuple of three integers, none above {MAX_WIDTH}")
    return values[0], values[1], values[2]


@dataclass(frozen=True)
class DropoutConfig:
    """Regularisation of the model during training."""

    dropout: float = flag(0.1, "dropout in the transformer", minimum=0.0, maximum=1.0)
    attention_dropout: float = flag(0.1, "dropout of attention weights", minimum=0.0, maximum=1.0)
    activation_dropout: float = flag(
        0.0, "dropout after the activation of the feed-forward blocks", minimum=0.0, maximum=1.0
    )
    encoder_layerdrop: float = flag(
        0.0, "probability of leaving out a transformer layer in an update", minimum=0.0, maximum=1.0
    )
    dropout_input: float = flag(0.0, "dropout of the input of the transformer", minimum=0.0, maximum=1.0)
    dropout_features: float = flag(
        0.0, "dropout of the input of the quantizer", modes=PRETRAIN, minimum=0.0, maximum=1.0
    )
    final_dropout: float = flag(0.0, "dropout before the output projection", modes=FINETUNE, minimum=0.0, maximum=1.0)
    feature_grad_mult: float = flag(
        1.0, "factor on the gradient of the conv feature extractor; 0 freezes it", minimum=0.0
    )


@dataclass(frozen=True)
class MaskConfig:
    """Span masking of frames (time) and of transformer inputs (channels)."""

    mask_prob: float = flag(0.65, "share of frames chosen, before overlaps; 0 masks none", minimum=0.0, maximum=1.0)
    mask_length: int = flag(10, "frames per span", minimum=1)
    mask_selection: str = flag(
        "static", "how span lengths are drawn", choices=("static", "uniform", "normal", "poisson")
    )
    mask_other: float = flag(0.0, "second parameter of --mask_selection", minimum=0.0)
    no_mask_overlap: bool = flag(False, "spans may not overlap")
    mask_min_space: int = flag(1, "frames between spans that may not overlap", minimum=0)
    mask_channel_prob: float = flag(0.0, "share of channels set to zero, before overlaps", minimum=0.0, maximum=1.0)
    mask_channel_length: int = flag(10, "channels per span", minimum=1)
    mask_channel_selection: str = flag(
        "static", "how channel span lengths are drawn", choices=("static", "uniform", "normal", "poisson")
    )
    mask_channel_other: float = flag(0.0, "second parameter of --mask_channel_selection", minimum=0.0)
    no_mask_channel_overlap: bool = flag(False, "channel spans may not overlap")
    mask_channel_min_space: int = flag(1, "channels between spans that may not overlap", minimum=0)

    def of_time(self) -> dict[str, Any]:
        """How spans of frames are drawn, for SpanMasking."""
        return {
            "prob": self.mask_prob,
            "length": self.mask_length,
            "selection": self.mask_selection,
            "other": self.mask_other,
            "no_overlap": self.no_mask_overlap,
            "min_space": self.mask_min_space,
        }

    def of_channels(self) -> dict[str, Any]:
        """How spans of channels are drawn, for SpanMasking."""
        return {
            "prob": self.mask_channel_prob,
            "length": self.mask_channel_length,
            "selection": self.mask_channel_selection,
            "other": self.mask_channel_other,
            "no_overlap": self.no_mask_channel_overlap,
            "min_space": self.mask_channel_min_space,
        }


@dataclass(frozen=True)
class ObjectiveConfig:
    """Pre-training: contrastive task, diversity and feature penalty."""

    num_negatives: int = flag(
        100, "negatives from other masked frames of the same utterance", modes=PRETRAIN, minimum=0
    )
    cross_sample_negatives: int = flag(
        0, "negatives from masked frames of all utterances of the sub-batch", modes=PRETRAIN, minimum=0
    )
    codebook_negatives: int = flag(0, "negatives drawn from the codebook", modes=PRETRAIN, minimum=0)
    negatives_from_everywhere: bool = flag(
        False, "negatives come from all frames, not only the masked ones", modes=PRETRAIN
    )
    logit_temp: float = flag(0.1, "temperature of the similarities", modes=PRETRAIN, minimum=1e-6)
    latent_temp: tuple[float, ...] = flag(
        (2.0, 0.5, 0.999995), "Gumbel temperature: start, end, factor per update", modes=PRETRAIN, nargs=3
    )
    loss_weights: tuple[float, ...] = flag(
        (0.1, 10.0), "weights of the diversity term and of the feature penalty", modes=PRETRAIN, nargs=2
    )


@dataclass(frozen=True)
class CtcConfig:
    """Fine-tuning: CTC on a pre-trained model."""

    w2v_path: str = flag(
        "", "pre-trained (or fine-tuned) checkpoint to start from, of any format", modes=FINETUNE, metavar="PATH"
    )
    freeze_finetune_updates: int = flag(
        0, "updates at the start that train the output projection only", modes=FINETUNE, minimum=0
    )
    blank_weight: float = flag(0.0, "number added to (or put in place of) the blank's logit", modes=FINETUNE)
    blank_mode: str = flag("add", "what --blank_weight does", modes=FINETUNE, choices=("add", "set"))


@dataclass(frozen=True)
class OptimConfig:
    """Adam with decoupled weight decay, and the learning rate."""

    max_update: int = flag(400000, "length of the training in updates", minimum=1)
    lr: float = flag(0.0005, "peak learning rate", minimum=0.0)
    lr_policy: str = flag("poly", "learning rate after the warm-up", choices=("poly", "exp", "cosine", "noam"))
    warmup_updates: int = flag(0, "updates of linear warm-up", minimum=0)
    hold_updates: int | None = flag(None, "updates at the peak (poly, exp, cosine)", minimum=0)
    initial_lr_scale: float | None = flag(
        None, "learning rate at the start, as a share of --lr (poly and cosine 0, exp 0.01)", minimum=0.0, maximum=1.0
    )
    final_lr_scale: float | None = flag(
        None, "learning rate at the end, as a share of --lr (poly 0, exp 0.05, cosine 0.1)", minimum=0.0, maximum=1.0
    )
    lr_poly_power: float | None = flag(None, "power of the polynomial decay (1)", minimum=0.0)
    lr_exp_decay: float | None = flag(
        None, "factor per update of the exponential decay; without it the decay ends at --final_lr_scale", minimum=0.0
    )
    adam_betas: tuple[float, ...] = flag((0.9, 0.98), "decay rates of Adam's moments", nargs=2)
    adam_eps: float = flag(1e-6, "Adam's epsilon", minimum=1e-15)
    weight_decay: float = flag(0.0, "decoupled weight decay", minimum=0.0)
    clip_norm: float = flag(0.0, "largest gradient norm; 0 is off", minimum=0.0)
    ema: float = flag(
        0.0,
        "decay of the moving average of weights used in validation and 'best'; 0 is off",
        minimum=0.0,
        maximum=1.0,
    )

    def schedule(self, width: int) -> dict[str, Any]:
        """The learning rate's settings for make_schedule(); `width` of the transformer is for noam."""
        noam = self.lr_policy == "noam"
        return {
            "policy": self.lr_policy,
            "lr": self.lr,
            "warmup_updates": self.warmup_updates,
            "hold_updates": self.hold_updates,
            "initial_lr_scale": self.initial_lr_scale,
            "final_lr_scale": self.final_lr_scale,
            "power": self.lr_poly_power,
            "lr_exp_decay": self.lr_exp_decay,
            "max_update": None if noam else self.max_update,  # noam has no end,
            "d_model": width if noam else None,  # and depends on the width
        }


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    fp16: bool = flag(False, "half-precision model with fp32 master weights (O2) and dynamic loss scaling")
    bf16: bool = flag(False, "bfloat16 model with fp32 master weights (O2)")
    amp: bool = flag(False, "with --fp16 or --bf16: autocast over fp32 weights instead of O2")
    fp32_ops: tuple[str, ...] | None = flag(
        None,
        f"operations kept in fp32 under O2, of: {', '.join(FP32_OPS)}, none (default: by precision)",
        nargs="+",
    )
    fp16_init_scale: float = flag(128.0, "first loss scale of fp16", minimum=1e-4)
    fp16_scale_window: int = flag(
        0,
        "updates without overflow before the loss scale doubles; 0: 16384 / processes / --update_freq",
        minimum=0,
    )
    min_loss_scale: float = flag(1e-4, "training stops when the loss scale would fall to this", minimum=0.0)
    allow_tf32: bool = flag(True, "TF32 for fp32 matrix products on CUDA devices that have it")

    @property
    def name(self) -> str:
        """The working precision: fp32, fp16 or bf16."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"

    @property
    def o2(self) -> bool:
        """Whether the model's weights are of half precision, over fp32 master weights."""
        return (self.fp16 or self.bf16) and not self.amp

    def kept_in_fp32(self) -> tuple[str, ...]:
        """Operations that stay in fp32 under O2."""
        if self.fp32_ops is None:
            return DEFAULT_FP32_OPS[self.name]
        return () if self.fp32_ops == ("none",) else self.fp32_ops


@dataclass(frozen=True)
class Config:
    """The resolved configuration of a training run."""

    mode: str
    model: ModelConfig = field(default_factory=ModelConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ctc: CtcConfig = field(default_factory=CtcConfig)
    data: DataConfig = field(default_factory=DataConfig)
    shards: ShardConfig = field(default_factory=ShardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def milestones(self) -> tuple[int, ...]:
        """Updates whose checkpoints are kept for good."""
        if self.run.keep_milestones is not None:
            return self.run.keep_milestones
        return default_milestones(self.optim.max_update)


TRAIN_SECTIONS = {
    "model": ModelConfig,
    "dropout": DropoutConfig,
    "mask": MaskConfig,
    "objective": ObjectiveConfig,
    "ctc": CtcConfig,
    "data": DataConfig,
    "shards": ShardConfig,
    "optim": OptimConfig,
    "precision": PrecisionConfig,
    "health": HealthConfig,
    "run": RunConfig,
}
