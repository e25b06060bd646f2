#!/usr/bin/env bash
# Pre-train a model of the size of XLS-R 1B (965 million parameters) in shards: the Large recipe with these values.
# SPDX-License-Identifier: Apache-2.0
#
# docs/parallel.md says which values are published, which are a choice, and how much memory they need.
: "${OUTPUT_DIR:=results/pretrain_xlsr_1b}"
: "${PARALLEL:=fsdp}" "${BF16:=true}" "${CHECKPOINT_ACTIVATIONS:=true}"
# Batches; 3.3 hours of speech
: "${RECIPE_BATCHES:=192}" "${MAX_TOKENS:=1000000}"
# Optimizer; the warm-up is 40000 updates
: "${MAX_UPDATE:=1000000}" "${LEARNING_RATE:=0.001}"
# Model
: "${ENCODER_LAYERS:=48}" "${ENCODER_EMBED_DIM:=1280}" "${ENCODER_FFN_EMBED_DIM:=5120}" "${FINAL_DIM:=1024}"

. "$(dirname -- "${BASH_SOURCE[0]}")/pretrain_large.sh" "$@"
