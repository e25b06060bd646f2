"""Options of the data that cannot work together, or would have no effect."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from wav2vec2.arg_parser import parse_train


@pytest.fixture
def parse(tmp_path):
    def parsed(*given: str, mode: str = "pretrain"):
        start = () if mode == "pretrain" else ("--w2v_path", str(tmp_path))
        return parse_train([mode, "--data", str(tmp_path), "--output_dir", str(tmp_path / "out"), *start, *given])

    return parsed


SHARDS = ("--tarred_filepaths", "s_{0..3}.tar")
STREAM = ("--streaming", "--epoch_size", "10", *SHARDS)
LISTS = ("--train_subset", "a,b")
BUCKETS = ("--enable_padding", "--num_batch_buckets", "4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--max_bad_share", "0.1"), "--max_bad_share: has an effect only with --on_bad_file skip"),
        (("--random_segment_pad",), "--random_segment_pad: has an effect only with --random_segment_sec"),
        (("--random_segment_prob", "0.5"), "--random_segment_prob: has an effect only with --random_segment_sec"),
        (("--bucketing_strategy", "fixed_order"), "--bucketing_strategy: has an effect only with --num_batch_buckets"),
        (("--num_batch_buckets", "4"), "--num_batch_buckets: .* needs --enable_padding"),
        ((*BUCKETS, "--bucketing_batch_size", "8", "--max_tokens", "9"), "--max_tokens: has an effect only without"),
        (("--dataset_weights", "1,2"), "--dataset_weights: has an effect only with several lists"),
        ((*LISTS, "--dataset_weights", "1"), "--dataset_weights 1: needs a number above 0 for each of the 2 lists"),
        ((*LISTS, "--dataset_weights", "1,-1"), "--dataset_weights 1,-1: needs a number above 0"),
        ((*LISTS, "--dataset_weights", "1,x"), "--dataset_weights 1,x: needs a number above 0"),
        ((*LISTS, "--dataset_weights", "1,2", "--dataset_temperature", "2"), "--dataset_temperature: .* only without"),
        (("--train_subset", "a,,b"), "--train_subset a,,b: an empty name"),
        (("--train_subset", "a,a"), "--train_subset a,a: .* twice"),
        (("--min_duration", "5", "--max_duration", "4"), "--max_duration 4: is below --min_duration 5"),
        (SHARDS, "--tarred_filepaths: has an effect only with --is_tarred or --streaming"),
        (("--is_tarred",), "--is_tarred: needs the shards; name them with --tarred_filepaths"),
        (("--streaming", *SHARDS), "--streaming: a stream has no end; .* --epoch_size"),
        (("--is_tarred", *SHARDS, "--shuffle_n", "9"), "--shuffle_n: has an effect only with --streaming"),
        (("--is_tarred", *SHARDS, *LISTS), "--train_subset: has an effect only without --is_tarred"),
        ((*STREAM, "--join_short", "9"), "--join_short: has an effect only without --streaming"),
        ((*STREAM, *BUCKETS), "--num_batch_buckets: has an effect only without --streaming"),
    ],
)
def test_what_cannot_work_names_the_flag(parse, given, message):
    with pytest.raises(ConfigError, match=message):
        parse(*given)


@pytest.mark.parametrize(
    "given",
    [
        (*LISTS, "--dataset_weights", "1,0.3"),
        (*LISTS, "--dataset_temperature", "2"),
        (*BUCKETS, "--bucketing_strategy", "fully_randomized", "--bucketing_batch_size", "8"),
        (*BUCKETS, "--bucketing_weights", "1", "1", "2", "1", "--bucketing_type", "equal_width"),
        ("--random_segment_sec", "16", "--random_segment_prob", "0.5", "--random_segment_min_rms_db", "-40"),
        ("--on_bad_file", "skip", "--max_bad_share", "0.1"),
        ("--is_tarred", *SHARDS),
        (*STREAM, "--shuffle_n", "0", "--tarred_shard_strategy", "replicate"),
        ("--min_duration", "8", "--max_duration", "16.7", "--trim_silence", "--join_short", "15"),
    ],
)
def test_what_can_work_is_taken(parse, given):
    parse(*given)


def test_in_finetuning_what_cuts_audio_but_not_labels_is_unknown(parse):
    for flag in ("--random_segment_sec", "--join_short"):
        with pytest.raises(ConfigError, match=flag):
            parse(flag, "5", mode="finetune")
    parse("--num_batch_buckets", "4", mode="finetune")
