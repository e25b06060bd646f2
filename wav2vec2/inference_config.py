"""Every option of inference: default, meaning, range."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

from common.flags import flag


@dataclass(frozen=True)
class InferenceConfig:
    """Transcribing and scoring with a fine-tuned model."""

    w2v_path: str = flag("", "fine-tuned checkpoint, of any format", required=True, metavar="PATH")
    dictionary: str = flag("", "dictionary of a checkpoint that has none, as fairseq's (dict.ltr.txt)", metavar="FILE")
    data: str = flag("", "folder with the file list and labels of --valid_subset", metavar="DIR")
    valid_subset: str = flag("", "base name of the list to score: NAME.tsv or a JSON manifest")
    labels: str = flag("ltr", "extension of the label file")
    transcribe_wav: str = flag("", "transcribe one audio file", metavar="FILE")
    transcribe_filelist: str = flag("", "transcribe the files of a list (.tsv, .json), without labels", metavar="FILE")
    output_dir: str = flag("", "folder for the log and for saved results without a folder of their own", metavar="DIR")
    save_predictions: str = flag("", "write utterance ids and transcripts, separated by a tab", metavar="FILE")
    save_logits: str = flag("", "write utterance ids, lengths and log-probabilities (torch file)", metavar="FILE")
    batch_size: int = flag(8, "utterances per batch at most; 0 is no limit", minimum=0)
    max_tokens: int = flag(4800000, "samples per batch of several rows (rows x longest); 0 is no limit", minimum=0)
    num_workers: int = flag(2, "processes that read audio; 0 reads in the process itself", minimum=0)
    device: str = flag("auto", "where to run; auto takes CUDA when there is one", choices=("auto", "cuda", "cpu"))
    fp16: bool = flag(False, "half-precision model")
    bf16: bool = flag(False, "bfloat16 model")
    allow_tf32: bool = flag(True, "TF32 for fp32 matrix products on CUDA devices that have it")
    reference_padding: bool = flag(
        False, "let padding leak through the group norm, as the original implementation does"
    )
    ema: bool = flag(True, "use the averaged weights when the checkpoint has them")
    num_repeats: int = flag(1, "passes over the data, for benchmarks", minimum=1)
    num_warmup_repeats: int = flag(0, "passes before them that are not timed", minimum=0)
    warmup_steps: int = flag(0, "batches at the start that are left out of the latencies", minimum=0)
    debug: bool = flag(False, "show tracebacks of errors")
