"""From the command line to a configuration; nothing else sees argv."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import flags
from wav2vec2.config import TRAIN_SECTIONS, Config
from wav2vec2.config_checks import check_inference_config, check_train_config
from wav2vec2.inference_config import InferenceConfig

TITLES = {
    "model": "model",
    "dropout": "regularisation",
    "mask": "masking",
    "objective": "contrastive task",
    "ctc": "fine-tuning with CTC",
    "data": "data and batches",
    "shards": "tar shards and streams",
    "optim": "optimizer and learning rate",
    "precision": "precision",
    "health": "health",
    "run": "run",
}


def parse_train(argv: Sequence[str]) -> Config:
    """The configuration of a training run. Raises ConfigError; --help prints and ends the program."""
    parser = flags.Parser(
        prog="train.py", description="Train wav2vec 2.0: self-supervised, or with CTC on transcripts."
    )
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{pretrain,finetune}")
    for mode, needed, help_text in (
        ("pretrain", "", "Learn speech representations from audio alone."),
        ("finetune", " --w2v_path PATH", "Learn to transcribe, from a pre-trained checkpoint."),
    ):
        usage = f"train.py {mode} --data DIR --output_dir DIR{needed} [FLAG ...]"
        subparser = modes.add_parser(mode, usage=usage, help=help_text, description=help_text)
        for name, section in TRAIN_SECTIONS.items():
            flags.add_flags(subparser, section, mode, TITLES[name])
    namespace = parser.parse_args(list(argv))
    sections: dict[str, Any] = {
        name: flags.from_namespace(section, namespace) for name, section in TRAIN_SECTIONS.items()
    }
    config = Config(mode=namespace.mode, **sections)
    check_train_config(config, flags.explicit(namespace))
    return config


def parse_inference(argv: Sequence[str]) -> InferenceConfig:
    """The configuration of inference.py. Raises ConfigError; --help prints and ends the program."""
    parser = flags.Parser(
        prog="inference.py",
        usage="inference.py --w2v_path PATH (--data DIR --valid_subset NAME | --transcribe_wav FILE | "
        "--transcribe_filelist FILE) [FLAG ...]",
        description="Transcribe speech and score transcripts with a fine-tuned model.",
    )
    flags.add_flags(parser, InferenceConfig, "pretrain", "model, speech and results")
    namespace = parser.parse_args(list(argv))
    config = flags.from_namespace(InferenceConfig, namespace)
    check_inference_config(config, flags.explicit(namespace))
    return config
