#!/usr/bin/env bash
# Fine-tune the tiny model with CTC, for two CPU cores: the Base recipe with these values.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/finetune_tiny}" "${TRAIN_SUBSET:=train}" "${VALID_SUBSET:=dev}"
: "${PRETRAINED_MODEL:=results/pretrain_tiny/wav2vec2_update500.pt}"
: "${NUM_GPUS:=1}" "${RECIPE_BATCHES:=1}" "${MAX_TOKENS:=480000}" "${NUM_CONCAT_BATCHES:=1}"
: "${MAX_UPDATE:=1200}" "${LEARNING_RATE:=0.003}" "${CLIP_NORM:=1.0}"
: "${SAVE_FREQUENCY:=10}" "${VALIDATE_FREQUENCY:=3}" "${LOG_FREQUENCY:=25}"
: "${MASK_PROB:=0.1}" "${MASK_CHANNEL_PROB:=0.0}" "${MASK_CHANNEL_LENGTH:=16}"
# so short a pre-training leaves the feature extractor much to learn
: "${FEATURE_GRAD_MULT:=1.0}" "${ENCODER_LAYERDROP:=0.0}" "${ACTIVATION_DROPOUT:=0.0}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_base_960h.sh" "$@"
