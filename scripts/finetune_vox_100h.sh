#!/usr/bin/env bash
# Fine-tune a Large model on the 100 h of train-clean-100: the 960 h recipe with these values.
# SPDX-License-Identifier: Apache-2.0
#
# 16 sub-batches divide over 8 GPUs; the original recipe has 20 (WORLD_BATCHES=20, for 1, 2, 4, 5 or 10 processes).
: "${OUTPUT_DIR:=results/finetune_vox_100h}" "${TRAIN_SUBSET:=train-clean-100}"
: "${RECIPE_BATCHES:=16}" "${NUM_CONCAT_BATCHES:=2}" "${MAX_UPDATE:=80000}" "${MASK_CHANNEL_PROB:=0.5}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_vox_960h.sh" "$@"
