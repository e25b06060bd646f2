#!/usr/bin/env bash
# Fine-tune the Base model on the 10 h split: the 960 h recipe with these values.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/finetune_base_10h}" "${TRAIN_SUBSET:=train-10h}" "${SAVE_FREQUENCY:=50}"
# an epoch is a few updates only
: "${VALIDATE_FREQUENCY:=50}"
: "${MAX_UPDATE:=20000}" "${FREEZE_FINETUNE_UPDATES:=10000}" "${LEARNING_RATE:=0.00005}"
: "${MASK_PROB:=0.65}" "${MASK_CHANNEL_PROB:=0.5}" "${ENCODER_LAYERDROP:=0.05}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_base_960h.sh" "$@"
