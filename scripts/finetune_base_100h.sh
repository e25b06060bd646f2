#!/usr/bin/env bash
# Fine-tune the Base model on the 100 h of train-clean-100: the 960 h recipe with these values.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/finetune_base_100h}" "${TRAIN_SUBSET:=train-clean-100}"
: "${MAX_UPDATE:=80000}" "${LEARNING_RATE:=0.00003}" "${MASK_PROB:=0.65}" "${MASK_CHANNEL_PROB:=0.5}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_base_960h.sh" "$@"
