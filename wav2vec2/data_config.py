"""Every option of the data: lists, which lengths are trained on, how they become batches, shards and streams."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigError
from common.flags import flag

PRETRAIN = ("pretrain",)
FINETUNE = ("finetune",)


@dataclass(frozen=True)
class DataConfig:
    """File lists, lengths and batches."""

    data: str = flag("", "folder with the file lists (.tsv), labels and dictionary", required=True, metavar="DIR")
    train_subset: str = flag("train", "base name of the training file list, or several separated by commas")
    valid_subset: str = flag("valid", "base name of the validation file list")
    manifest_format: str = flag(
        "auto",
        "format of the lists: NAME.tsv or JSON lines; auto takes what is there",
        choices=("auto", "tsv", "json"),
    )
    dataset_weights: str = flag(
        "", "how often the utterances of every list of --train_subset come in an epoch, as 1,0.3 (default: once)"
    )
    dataset_temperature: float = flag(
        0.0,
        "with several lists: a list of h hours is drawn in proportion to h^(1/T), which lifts small ones; 0 is off",
        minimum=0.0,
    )
    labels: str = flag("ltr", "extension of the label files", modes=FINETUNE)
    on_bad_file: str = flag(
        "error",
        "what a file that cannot be used does: end the run, or be left out, counted and listed in bad_files.txt",
        choices=("error", "skip"),
    )
    max_bad_share: float = flag(
        0.01, "with --on_bad_file skip: the run ends when more of the files are bad", minimum=0.0, maximum=1.0
    )
    min_duration: float = flag(0.0, "shorter utterances are left out of training; in seconds", minimum=0.0)
    max_duration: float = flag(
        0.0, "longer utterances are left out of training; in seconds, 0 is no limit", minimum=0.0
    )
    min_sample_size: int = flag(0, "shorter utterances are left out of training; in samples", minimum=0)
    max_sample_size: int = flag(0, "longer utterances are cropped to this many samples; 0 is no limit", minimum=0)
    join_short: float = flag(
        0.0, "neighbours of one speaker are joined up to this many seconds; 0 is off", modes=PRETRAIN, minimum=0.0
    )
    trim_silence: bool = flag(False, "cut off what is 60 dB below the peak, at both ends of an utterance")
    random_segment_sec: float = flag(
        0.0, "train on a random segment of this many seconds; 0 is off", modes=PRETRAIN, minimum=0.0
    )
    random_segment_prob: float = flag(
        1.0, "probability of taking a segment; else the utterance stays whole", modes=PRETRAIN, minimum=0.0, maximum=1.0
    )
    random_segment_pad: bool = flag(False, "fill shorter utterances with zeros to the segment's length", modes=PRETRAIN)
    random_segment_min_rms_db: float | None = flag(
        None, "draw a segment again, up to 10 times, while it is quieter than this; in dB of full scale", modes=PRETRAIN
    )
    max_tokens: int = flag(1400000, "samples per sub-batch (rows x longest)", minimum=1)
    max_tokens_valid: int = flag(0, "the same in validation; 0 takes --max_tokens", minimum=0)
    batch_size: int = flag(0, "rows per sub-batch at most, in validation too; 0 is no limit", minimum=0)
    required_batch_size_multiple: int = flag(8, "rows of a sub-batch above this number are a multiple of it", minimum=1)
    num_concat_batches: int = flag(1, "sub-batches joined for one pass through the model", minimum=1)
    update_freq: int = flag(1, "passes (micro-batches) per update and process", minimum=1)
    world_batches: int = flag(
        0,
        "sub-batches per update over all processes; solves --update_freq for any number of processes, 0: their product",
        minimum=0,
    )
    enable_padding: bool = flag(
        False,
        "pad a sub-batch to its longest utterance instead of cropping it to its shortest",
        modes=PRETRAIN,
    )
    reference_padding: bool = flag(
        False, "let padding leak through the group norm, as the original implementation does, for comparisons"
    )
    num_batch_buckets: int = flag(
        0, "length buckets; a sub-batch is padded to the end of its bucket; 0 is off", minimum=0
    )
    bucketing_type: str = flag(
        "percentile",
        "buckets of equally many utterances, or of equally wide ranges of length",
        choices=("percentile", "equal_width"),
    )
    bucketing_strategy: str = flag(
        "mixed",
        "order of the buckets in an epoch: all mixed, one after another as they are, in a random order that all "
        "processes share, or in one of every process's own",
        choices=("mixed", "fixed_order", "synced_randomized", "fully_randomized"),
    )
    bucketing_batch_size: tuple[int, ...] | None = flag(
        None,
        "rows of the sub-batches of every bucket, instead of --max_tokens; one number b gives bucket i of n (n - i) b",
        nargs="+",
        minimum=1,
    )
    bucketing_weights: tuple[int, ...] | None = flag(
        None, "how often every bucket comes in an epoch", nargs="+", minimum=1
    )
    semi_sorted: float = flag(
        0.0, "noise on the lengths before utterances are sorted, as a share of their range", minimum=0.0, maximum=1.0
    )
    num_workers: int = flag(
        2, "processes that read audio, per training process; 0 reads in the process itself", minimum=0
    )

    def train_subsets(self) -> list[str]:
        """The lists of --train_subset."""
        names = [name.strip() for name in self.train_subset.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(f"--train_subset {self.train_subset}: an empty name, or one twice; write it as a,b")
        return names

    def weights(self) -> list[float] | None:
        """The weights of the lists, None where every utterance comes once."""
        if not self.dataset_weights:
            return None
        names = self.train_subsets()
        try:
            weights = [float(weight) for weight in self.dataset_weights.split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(names) or not all(0 < weight < 1000 for weight in weights):
            raise ConfigError(
                f"--dataset_weights {self.dataset_weights}: needs a number above 0 for each of the {len(names)} lists "
                "of --train_subset, as 1,0.3"
            )
        return weights


@dataclass(frozen=True)
class ShardConfig:
    """Training clips in tar shards, read at random or as a stream."""

    is_tarred: bool = flag(False, "train on the clips of --tarred_filepaths instead of the files of --train_subset")
    tarred_filepaths: str = flag(
        "", "the shards: names, or a pattern such as DIR/train-{000..127}.tar; several separated by commas"
    )
    shard_manifests: str = flag(
        "",
        "lists of the clips to train on, a pattern too (default: NAME.tsv beside NAME.tar; of a stream all)",
    )
    streaming: bool = flag(
        False, "read the shards one after another, without an index: also from pipe:COMMAND and http addresses"
    )
    epoch_size: int = flag(0, "updates of an epoch of a stream", minimum=0)
    shuffle_n: int = flag(2048, "clips among which a stream is shuffled; 0 does not shuffle", minimum=0)
    stream_short: str = flag(
        "keep",
        "what clips of a stream below --max_sample_size do: stay as they are, are left out, or get zeros up to it",
        choices=("keep", "skip", "pad"),
    )
    tarred_shard_strategy: str = flag(
        "scatter",
        "how processes share the shards of a stream: each has its part, or each reads all",
        choices=("scatter", "replicate"),
    )
