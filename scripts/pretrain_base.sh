#!/usr/bin/env bash
# Pre-train the Base model with the Hourglass on LibriSpeech 960 h. Every value can be set from outside.
# SPDX-License-Identifier: Apache-2.0
#
# NUM_NODES x NUM_GPUS x NUM_CONCAT_BATCHES x UPDATE_FREQ = 64 sub-batches of MAX_TOKENS samples; UPDATE_FREQ is solved.
# Less memory: a lower NUM_CONCAT_BATCHES. Another number than 64: WORLD_BATCHES.
: "${OUTPUT_DIR:=results/pretrain_base}" "${SAVE_FREQUENCY:=1}"
# Batches
: "${RECIPE_BATCHES:=64}" "${MAX_TOKENS:=1400000}" "${NUM_CONCAT_BATCHES:=8}"
: "${MIN_SAMPLE_SIZE:=32000}" "${MAX_SAMPLE_SIZE:=250000}"
# Optimizer; the warm-up is 32000 of 400000 updates
: "${MAX_UPDATE:=400000}" "${LEARNING_RATE:=0.0005}" "${LR_POLICY:=poly}" "${WARMUP_PERCENT:=8}"
: "${ADAM_BETAS:=0.9 0.98}" "${ADAM_EPS:=1e-6}" "${WEIGHT_DECAY:=0.01}" "${CLIP_NORM:=25}"
# Model; HOURGLASS_CONFIG= is the plain transformer of ENCODER_LAYERS layers
: "${HOURGLASS_CONFIG=[2,(8,4),2]}" "${EXTRACTOR_MODE:=default}"
: "${ENCODER_LAYERS:=12}" "${ENCODER_EMBED_DIM:=768}" "${ENCODER_FFN_EMBED_DIM:=3072}" "${ENCODER_ATTENTION_HEADS:=12}"
: "${FINAL_DIM:=256}" "${LATENT_VARS:=320}" "${LATENT_GROUPS:=2}"
# Objective
: "${MASK_PROB:=0.65}" "${MASK_LENGTH:=10}" "${NUM_NEGATIVES:=100}"
: "${LATENT_TEMP:=2.0 0.5 0.999995}" "${LOSS_WEIGHTS:=0.1 10.0}"
# Regularisation
: "${DROPOUT:=0.1}" "${ATTENTION_DROPOUT:=0.1}" "${DROPOUT_INPUT:=0.1}" "${DROPOUT_FEATURES:=0.1}"
: "${ENCODER_LAYERDROP:=0.05}" "${FEATURE_GRAD_MULT:=0.1}"

. "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" pretrain "$@"
