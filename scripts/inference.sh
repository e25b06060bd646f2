#!/usr/bin/env bash
# Launcher of inference.py: transcripts, WER and CER of a subset, or transcripts of TRANSCRIBE_WAV / _FILELIST.
# SPDX-License-Identifier: Apache-2.0
#
# Every value can be set from outside; further flags are passed on, and win.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

: "${DATASET_DIR:=/datasets/LibriSpeech}" "${FILELISTS_DIR:=$DATASET_DIR}" "${VALID_SUBSET:=test-other}"
: "${FINETUNED_MODEL:=results/finetune_base_960h/wav2vec2_best.pt}" "${OUTPUT_DIR:=results/inference}"
: "${BATCH_SIZE:=8}" "${FP16:=false}" "${BF16:=false}" "${USE_EMA:=true}"

python=$(find_python)
set_processes "$python" 1
# Benchmarks keep the results of every kind of batch and precision apart.
layout=$BATCH_SIZE
if [ "${MAX_TOKENS:-0}" != 0 ]; then layout=${layout}x$MAX_TOKENS; fi
OUTPUT_DIR=${OUTPUT_DIR//@LAYOUT@/${layout}_$(precision)}

add w2v_path FINETUNED_MODEL
add dictionary DICTIONARY
add output_dir OUTPUT_DIR
add device DEVICE
add num_workers NUM_WORKERS
if [ -n "${TRANSCRIBE_WAV:-}" ]; then
    add transcribe_wav TRANSCRIBE_WAV
elif [ -n "${TRANSCRIBE_FILELIST:-}" ]; then
    add transcribe_filelist TRANSCRIBE_FILELIST
else
    add data FILELISTS_DIR
    add valid_subset VALID_SUBSET
    # PREDICTION_FILE= saves no transcripts
    : "${PREDICTION_FILE=$OUTPUT_DIR/$VALID_SUBSET.predictions}"
fi
add save_predictions PREDICTION_FILE
add save_logits LOGITS_FILE
add batch_size BATCH_SIZE
add max_tokens MAX_TOKENS
add_switch fp16 FP16
add_switch bf16 BF16
add_switch_off allow_tf32 TF32
add_switch_off ema USE_EMA
add_switch reference_padding REFERENCE_PADDING
add num_repeats NUM_REPEATS
add num_warmup_repeats NUM_WARMUP_REPEATS
add warmup_steps NUM_WARMUP_STEPS

run_program "$python" inference.py ${OPTIONS[@]+"${OPTIONS[@]}"} "$@"
