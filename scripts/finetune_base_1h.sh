#!/usr/bin/env bash
# Fine-tune the Base model on the 1 h split: the 960 h recipe with these values.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/finetune_base_1h}" "${TRAIN_SUBSET:=train-1h}" "${SAVE_FREQUENCY:=50}"
# an epoch is a few updates only
: "${VALIDATE_FREQUENCY:=1000}"
: "${MAX_UPDATE:=13000}" "${FREEZE_FINETUNE_UPDATES:=10000}" "${LEARNING_RATE:=0.00005}"
: "${MASK_PROB:=0.65}" "${MASK_CHANNEL_PROB:=0.25}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_base_960h.sh" "$@"
