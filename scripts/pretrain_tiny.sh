#!/usr/bin/env bash
# Pre-train a tiny model with the Hourglass, for two CPU cores: the Base recipe with these values.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/pretrain_tiny}" "${TRAIN_SUBSET:=train}" "${VALID_SUBSET:=dev}"
: "${NUM_GPUS:=1}" "${RECIPE_BATCHES:=1}" "${MAX_TOKENS:=480000}" "${NUM_CONCAT_BATCHES:=1}"
: "${MIN_SAMPLE_SIZE:=8000}" "${MAX_SAMPLE_SIZE:=160000}"
# so few updates need a high learning rate, and regularisation only slows them down
: "${MAX_UPDATE:=500}" "${LEARNING_RATE:=0.003}" "${SAVE_FREQUENCY:=10}" "${VALIDATE_FREQUENCY:=3}" "${LOG_FREQUENCY:=25}"
: "${DROPOUT:=0.0}" "${ATTENTION_DROPOUT:=0.0}" "${DROPOUT_INPUT:=0.0}" "${DROPOUT_FEATURES:=0.0}"
: "${CONV_FEATURE_LAYERS:=[(96,10,5)]+[(96,3,2)]*4+[(96,2,2)]*2}" "${CONV_POS:=32}" "${CONV_POS_GROUPS:=8}"
: "${HOURGLASS_CONFIG=[1,(2,2),1]}" "${ENCODER_LAYERS:=4}"
: "${ENCODER_EMBED_DIM:=144}" "${ENCODER_FFN_EMBED_DIM:=576}" "${ENCODER_ATTENTION_HEADS:=4}"
: "${FINAL_DIM:=64}" "${LATENT_VARS:=64}" "${LATENT_GROUPS:=2}" "${FEATURE_GRAD_MULT:=1.0}" "${ENCODER_LAYERDROP:=0.0}"
# the temperature falls to its end within the run
: "${LATENT_TEMP:=2.0 0.5 0.999}"

. "$(dirname -- "${BASH_SOURCE[0]}")/pretrain_base.sh" "$@"
