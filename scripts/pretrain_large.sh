#!/usr/bin/env bash
# Pre-train the Large model (24 pre-LN layers, no Hourglass). Every value can be set from outside.
# SPDX-License-Identifier: Apache-2.0
#
# NUM_NODES x NUM_GPUS x NUM_CONCAT_BATCHES x UPDATE_FREQ = 128 sub-batches of MAX_TOKENS samples; UPDATE_FREQ is solved.
: "${OUTPUT_DIR:=results/pretrain_large}" "${SAVE_FREQUENCY:=1}"
# Batches
: "${RECIPE_BATCHES:=128}" "${MAX_TOKENS:=1200000}" "${NUM_CONCAT_BATCHES:=1}"
: "${MIN_SAMPLE_SIZE:=32000}" "${MAX_SAMPLE_SIZE:=320000}"
# Optimizer; the warm-up is 32000 of 800000 updates
: "${MAX_UPDATE:=800000}" "${LEARNING_RATE:=0.005}" "${LR_POLICY:=poly}" "${WARMUP_PERCENT:=4}"
: "${ADAM_BETAS:=0.9 0.98}" "${ADAM_EPS:=1e-6}" "${WEIGHT_DECAY:=0.01}" "${CLIP_NORM:=25}"
# Model
: "${EXTRACTOR_MODE:=layer_norm}" "${CONV_BIAS:=true}" "${NORMALIZE:=true}" "${LAYER_NORM_FIRST:=true}"
: "${ENCODER_LAYERS:=24}" "${ENCODER_EMBED_DIM:=1024}" "${ENCODER_FFN_EMBED_DIM:=4096}" "${ENCODER_ATTENTION_HEADS:=16}"
: "${FINAL_DIM:=768}" "${LATENT_VARS:=320}" "${LATENT_GROUPS:=2}"
# Objective
: "${MASK_PROB:=0.65}" "${MASK_LENGTH:=10}" "${NUM_NEGATIVES:=100}"
: "${LATENT_TEMP:=2.0 0.1 0.999995}" "${LOSS_WEIGHTS:=0.1 0.0}"
# Regularisation
: "${DROPOUT:=0.0}" "${ATTENTION_DROPOUT:=0.0}" "${DROPOUT_INPUT:=0.0}" "${DROPOUT_FEATURES:=0.0}"
: "${ENCODER_LAYERDROP:=0.0}" "${FEATURE_GRAD_MULT:=1.0}"

. "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" pretrain "$@"
