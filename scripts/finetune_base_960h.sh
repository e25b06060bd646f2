#!/usr/bin/env bash
# Fine-tune the Base model with CTC on LibriSpeech 960 h. Every value can be set from outside.
# SPDX-License-Identifier: Apache-2.0
#
# NUM_NODES x NUM_GPUS x NUM_CONCAT_BATCHES x UPDATE_FREQ = 8 sub-batches of MAX_TOKENS samples; UPDATE_FREQ is solved.
# The architecture, the Hourglass included, comes from PRETRAINED_MODEL.
: "${OUTPUT_DIR:=results/finetune_base_960h}" "${SAVE_FREQUENCY:=10}"
: "${PRETRAINED_MODEL:=results/pretrain_base/wav2vec2_update400000.pt}" "${FREEZE_FINETUNE_UPDATES:=0}"
# Batches
: "${RECIPE_BATCHES:=8}" "${MAX_TOKENS:=3200000}" "${NUM_CONCAT_BATCHES:=1}"
# Optimizer; tri-stage: 10 % warm-up, 40 % hold, 50 % decay
: "${MAX_UPDATE:=320000}" "${LEARNING_RATE:=0.0001}" "${LR_POLICY:=exp}"
: "${WARMUP_PERCENT:=10}" "${HOLD_PERCENT:=40}" "${INITIAL_LR_SCALE:=0.01}" "${FINAL_LR_SCALE:=0.05}"
: "${ADAM_BETAS:=0.9 0.98}" "${ADAM_EPS:=1e-8}" "${WEIGHT_DECAY:=0.0}" "${CLIP_NORM:=0.0}"
# Masks
: "${MASK_PROB:=0.5}" "${MASK_LENGTH:=10}" "${MASK_CHANNEL_PROB:=0.1}" "${MASK_CHANNEL_LENGTH:=64}"
# Regularisation; the feature extractor is frozen
: "${DROPOUT:=0.0}" "${ATTENTION_DROPOUT:=0.0}" "${ACTIVATION_DROPOUT:=0.1}" "${DROPOUT_INPUT:=0.0}"
: "${FINAL_DROPOUT:=0.0}" "${ENCODER_LAYERDROP:=0.1}" "${FEATURE_GRAD_MULT:=0.0}"

. "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" finetune "$@"
