"""Every option of how a run goes on: files, saving, stopping, speed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

from common.flags import flag
from wav2vec2.data_config import PRETRAIN


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run goes on."""

    output_dir: str = flag("", "folder for checkpoints and logs", required=True, metavar="DIR")
    device: str = flag("auto", "where to train; auto takes CUDA when there is one", choices=("auto", "cuda", "cpu"))
    seed: int = flag(1, "random seed of weights, masks, negatives, crops and order", minimum=0)
    resume: bool = flag(False, "go on from the newest valid checkpoint of --output_dir")
    resume_from: str = flag(
        "",
        "go on from this checkpoint, of any format, while --output_dir holds none: weights, optimizer and update",
        metavar="PATH",
    )
    init_from: str = flag(
        "",
        "continue pre-training with the weights of this checkpoint, of any format; optimizer and schedule begin anew",
        modes=PRETRAIN,
        metavar="PATH",
    )
    save: bool = flag(True, "write checkpoints")
    save_frequency: int = flag(1, "epochs between checkpoints", minimum=1)
    save_interval_updates: int = flag(0, "updates between checkpoints, besides; 0 is off", minimum=0)
    save_interval_minutes: float = flag(0.0, "minutes between checkpoints, besides; 0 is off", minimum=0.0)
    keep_milestones: tuple[int, ...] | None = flag(
        None,
        "updates whose checkpoints are kept for good (default: every quarter of --max_update)",
        nargs="+",
    )
    validate_frequency: int = flag(1, "epochs between validations", minimum=1)
    validate_interval_updates: int = flag(0, "updates between validations, besides; 0 is off", minimum=0)
    log_frequency: int = flag(10, "updates between lines of the log", minimum=1)
    num_epochs: int = flag(0, "stop after this many epochs, for benchmarks; 0 trains to --max_update", minimum=0)
    num_warmup_epochs: int = flag(0, "epochs left out of the benchmark's averages", minimum=0)
    parallel: str = flag(
        "ddp",
        "what several processes share: 'ddp' the work, 'fsdp' also weights, gradients and optimizer state, for models "
        "that do not fit one device",
        choices=("ddp", "fsdp"),
    )
    bucket_cap_mb: int = flag(25, "size of DDP's gradient buckets in MiB", minimum=1)
    compile: bool = flag(False, "compile conv blocks, transformer layers and contrastive logits with torch.compile")
    cuda_graphs: bool = flag(False, "with --compile: replay the compiled parts as CUDA graphs; for equal lengths")
    checkpoint_activations: bool = flag(
        False, "keep only the input of every transformer layer for backward: less memory, about a third more work"
    )
    preempt_exit_code: int = flag(
        75, "exit status of a run that a signal asked to stop and that has saved", minimum=1, maximum=255
    )
    heartbeat_timeout: float = flag(
        20.0, "seconds without a sign of life from another process until the run ends", minimum=1.0
    )
    hang_timeout: float = flag(1200.0, "seconds in one place until the run ends, telling where; 0 is off", minimum=0.0)
    probe_memory: bool = flag(True, "try the largest batch before training and tell what memory it takes")
    auto_batch: bool = flag(
        False, "where the largest batch is too large: join fewer sub-batches in more passes, for the same updates"
    )
    debug: bool = flag(False, "show tracebacks of errors")

    def watched(self) -> dict[str, float]:
        """The watchdog's settings."""
        return {"heartbeat_timeout": self.heartbeat_timeout, "hang_timeout": self.hang_timeout}
