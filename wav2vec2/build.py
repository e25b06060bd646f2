"""Put a run together: model -> weights -> dtype -> DDP -> optimizer -> data; the only `if mode`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import checkpoint, distributed, flags, rng, sharding
from common.ema import Ema
from common.errors import ConfigError, found_by_all, size
from common.labels import Dictionary
from common.lock import FolderLock
from common.logger import RunLogger
from common.optim import parameter_groups
from common.precision import LossScaler, MixedPrecisionOptimizer, to_half
from common.preemption import Preemption
from common.schedules import make_schedule
from common.watchdog import Watchdog
from wav2vec2.build_data import build_loaders
from wav2vec2.config import Config
from wav2vec2.layout import scale_window, solved, sub_batches_per_update
from wav2vec2.logging import METRICS
from wav2vec2.memory_probe import probe
from wav2vec2.model import TransformerLayer, Wav2Vec2Ctc, Wav2Vec2Model
from wav2vec2.norms import ChannelNorm, LayerNorm
from wav2vec2.run import Run
from wav2vec2.start import find_start
from wav2vec2.task import FinetuneTask, PretrainTask

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def build_run(
    config: Config,
    device: torch.device,
    command: list[str],
    *,
    preemption: Preemption | None = None,
    watchdog: Watchdog | None = None,
) -> Run:
    """A run that is ready to train, resumed where --resume finds a checkpoint.

    `preemption` and `watchdog` are entered already; without them no signal is noticed, and no other process.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.precision.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.precision.allow_tf32
    _check_writable(Path(config.run.output_dir))
    lock = _lock(config) if distributed.is_main() else None
    with found_by_all():
        start = find_start(solved(config, distributed.world_size()))
    config, dictionary = start.config, start.dictionary
    model = build_model(config, dictionary)
    trunk(model).encoder.checkpoint_activations = config.run.checkpoint_activations
    start.fill(model)
    _freeze_idle(model, config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    sharded = _is_sharded(config)
    o2 = config.precision.o2 and not sharded
    master = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters() if o2}
    if o2:
        to_half(model, HALF[config.precision.name], fp32_modules(model, config.precision.kept_in_fp32()))
    task = build_task(config, model)
    if config.run.cuda_graphs and device.type != "cuda":
        raise ConfigError("--cuda_graphs: needs a GPU, and the run is on the CPU; drop it")
    if config.run.compile:
        compile_regions(task, cuda_graphs=config.run.cuda_graphs)
    engine = (
        shard_task(config, task, device)
        if sharded
        else distributed.wrap(task.to(device), device, bucket_cap_mb=config.run.bucket_cap_mb)
    )
    optimizer = build_optimizer(config, model)
    if o2:
        optimizer.load_master({name: master[name] for name in optimizer.master_weights()})
    with found_by_all():
        train, valid = build_loaders(config, device, dictionary)
    run = Run(
        config=config,
        device=device,
        task=task,
        engine=engine,
        optimizer=optimizer,
        schedule=make_schedule(**config.optim.schedule(config.model.encoder_embed_dim)),
        ema=Ema(config.optim.ema, optimizer.master_weights()),
        train_loader=train,
        valid_loader=valid,
        dictionary=dictionary,
        logger=RunLogger(
            config.run.output_dir,
            metrics=METRICS,
            enabled=distributed.is_main(),
            total_updates=config.optim.max_update,
        ),
        frozen_weights=frozen,
        preemption=preemption or Preemption(),
        watchdog=watchdog or Watchdog(),
        lock=lock,
    )
    if start.state and start.path:
        run.load_state_dict(start.state, start.path)
        log.info("resumed %s: update %d, epoch %d", start.path, run.progress.step, run.train_loader.epoch)
        if run.finished:
            log.info("the run is finished already; raise --max_update to train longer")
    if config.run.save and distributed.is_main():
        _check_disk(run)
    probe(run)
    _describe(run, command)
    return run


def build_model(config: Config, dictionary: Dictionary | None) -> Wav2Vec2Model | Wav2Vec2Ctc:
    """The model with fresh weights, which the seed decides."""
    rng.seed_all(config.run.seed, "weights")
    fp32_softmax = "mha_softmax" in config.precision.kept_in_fp32()
    if config.mode == "pretrain":
        return Wav2Vec2Model(config.model, config.dropout, fp32_softmax=fp32_softmax)
    if dictionary is None:
        raise ConfigError("fine-tuning needs a dictionary")
    return Wav2Vec2Ctc(
        config.model,
        config.dropout,
        num_symbols=len(dictionary),
        blank_weight=config.ctc.blank_weight,
        blank_mode=config.ctc.blank_mode,
        fp32_softmax=fp32_softmax,
    )


def trunk(model: Wav2Vec2Model | Wav2Vec2Ctc) -> Wav2Vec2Model:
    """The model without its output layer."""
    return model.w2v if isinstance(model, Wav2Vec2Ctc) else model


def fp32_modules(model: Wav2Vec2Model | Wav2Vec2Ctc, ops: tuple[str, ...]) -> list[nn.Module]:
    """The modules whose weights stay in fp32 under O2, and which therefore compute in it."""
    extractor, encoder = trunk(model).feature_extractor, trunk(model).encoder
    found: list[nn.Module] = []
    if "conv_norms" in ops:
        found += [m for m in extractor.modules() if isinstance(m, (ChannelNorm, LayerNorm))]
    if "pos_conv" in ops:
        found.append(encoder.pos_conv)
    if "transformer_layernorm" in ops:
        found += [m for m in encoder.modules() if isinstance(m, LayerNorm)]
    return found


def _check_writable(folder: Path) -> None:
    """Make the output folder; refuse one that cannot be written before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{distributed.rank()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        refused = ConfigError(f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder")
        refused.by_all = False  # it may be one machine that cannot
        raise refused from None


def _lock(config: Config) -> FolderLock:
    """The folder's lock; after a restart by the launcher the process before may be a little longer about its end."""
    return FolderLock(config.run.output_dir, patience=_PATIENCE if distributed.is_elastic() else 0.0)


def _check_disk(run: Run) -> None:
    """Refuse a disk that has no room for a checkpoint; tell of one that has none for all that will be kept."""
    folder, one = run.config.run.output_dir, run.checkpoint_bytes()
    checkpoint.check_space(folder, one)
    ahead = [update for update in run.config.milestones() if update > run.progress.step]
    kept = len(ahead) + checkpoint.Retention().keep_last + 2  # the best one, and the one that is being written
    free = shutil.disk_usage(folder).free
    if free < kept * one:
        log.warning(
            "--output_dir %s: %s are free, and the checkpoints to come may take %s (%d of %s); the run ends with the "
            "last one whole when the disk is full",
            *(folder, size(free), size(kept * one), kept, size(one)),
        )


def _freeze_idle(model: nn.Module, config: Config) -> None:
    """Parameters that no loss reaches take no part in DDP and in the optimizer."""
    if isinstance(model, Wav2Vec2Ctc) and config.mask.mask_prob == 0:
        model.w2v.mask_emb.requires_grad_(False)


def build_task(config: Config, model: Wav2Vec2Model | Wav2Vec2Ctc) -> PretrainTask | FinetuneTask:
    """What DDP wraps: the model with its objective."""
    amp_dtype = HALF[config.precision.name] if config.precision.amp else None
    if isinstance(model, Wav2Vec2Ctc):
        return FinetuneTask(
            model,
            seed=config.run.seed,
            layerdrop=config.dropout.encoder_layerdrop,
            freeze_updates=config.ctc.freeze_finetune_updates,
            reference_padding=config.data.reference_padding,
            amp_dtype=amp_dtype,
        )
    return PretrainTask(
        model,
        config.objective,
        seed=config.run.seed,
        layerdrop=config.dropout.encoder_layerdrop,
        reference_padding=config.data.reference_padding,
        fp32_cosine=config.precision.name == "fp32" or "cosine_sim" in config.precision.kept_in_fp32(),
        amp_dtype=amp_dtype,
    )


def _is_sharded(config: Config) -> bool:
    """Whether the processes split the model; one alone has nothing to split."""
    wanted, several = config.run.parallel == "fsdp", distributed.world_size() > 1
    if wanted and not several:
        log.info("--parallel fsdp: there is one process, so it holds the whole model")
    return wanted and several


def shard_task(config: Config, task: PretrainTask | FinetuneTask, device: torch.device) -> sharding.Sharded:
    """The task with its parameters in shards, layer by layer.

    Under O2 the shares are the master weights, and a layer is gathered in half precision.
    """
    model, precision = task.model, config.precision
    half = HALF[precision.name] if precision.o2 else None
    return sharding.shard(
        task,
        # what is called as a whole, also in validation
        root=task if isinstance(task, PretrainTask) else model,
        groups=[module for module in trunk(model).encoder.modules() if isinstance(module, TransformerLayer)],
        device=device,
        half=half,
        keep_fp32=fp32_modules(model, precision.kept_in_fp32()) if half else (),
    )


def compile_regions(task: PretrainTask | FinetuneTask, *, cuda_graphs: bool) -> None:
    """Compile what is called over and over: conv blocks, transformer layers, the contrastive logits.

    The parts keep their names and weights, and all layers share their compiled code. A second length makes it one for
    any length, so the number of compilations does not grow with that of lengths. CUDA graphs need equal shapes.
    """
    # With and without wanted frames, keys and gradients, one row or more, fixed and free lengths: beyond torch's 8.
    torch._dynamo.config.recompile_limit = 32
    extractor, encoder = trunk(task.model).feature_extractor, trunk(task.model).encoder
    encoder.knows_lengths = False
    options: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False} if cuda_graphs else {}
    layers = [module for module in encoder.modules() if isinstance(module, TransformerLayer)]
    for part in [*extractor.blocks[1:], *layers]:
        part.compile(**options)
    if isinstance(task, PretrainTask):
        task.contrastive_logits = torch.compile(task.contrastive_logits, **options)
    if cuda_graphs:  # results of the pass before may be written over
        task.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def build_optimizer(config: Config, model: nn.Module) -> MixedPrecisionOptimizer:
    """Adam over all trained parameters; the trunk is a group of its own where it can be frozen."""
    groups = parameter_groups(model, lambda name: "w2v" if name.startswith("w2v.") else "head")
    precision = config.precision
    scaler = None
    if precision.fp16:
        scaler = LossScaler(
            init=precision.fp16_init_scale,
            minimum=precision.min_loss_scale,
            window=scale_window(config, distributed.world_size()),
        )
    optim = config.optim
    return MixedPrecisionOptimizer(
        groups,
        betas=(optim.adam_betas[0], optim.adam_betas[1]),
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
        scaler=scaler,
    )


def _describe(run: Run, command: list[str]) -> None:
    """Write the resolved configuration to config.json and the log, and the sizes of the run to the console."""
    config = run.config
    model = run.task.model
    data = config.data
    log.info(
        "%s: %.2f M parameters (%.2f M trained), %s, %s; %d processes x %d concatenated batches x %d accumulated for "
        "%d sub-batches per update",
        config.mode,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6,
        run.device,
        config.precision.name,
        distributed.world_size(),
        data.num_concat_batches,
        data.update_freq,
        sub_batches_per_update(data, distributed.world_size()),
    )
    description = {
        "command": command,
        "config": flags.to_dict(config),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "commit": _commit(),
        "world_size": distributed.world_size(),
        "device": str(run.device),
    }
    run.logger.parameters(description, "config.json")


def _commit() -> str | None:
    """The commit of the toolkit, where it runs from a git checkout."""
    root = Path(sys.modules[__name__].__file__ or ".").parent
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
