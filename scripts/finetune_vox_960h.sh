#!/usr/bin/env bash
# Fine-tune a Large model on LibriSpeech 960 h: the Base recipe with these values, 24 sub-batches per update.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/finetune_vox_960h}" "${PRETRAINED_MODEL:=results/pretrain_large/wav2vec2_update800000.pt}"
: "${RECIPE_BATCHES:=24}" "${MAX_TOKENS:=1280000}" "${NUM_CONCAT_BATCHES:=3}"
: "${FREEZE_FINETUNE_UPDATES:=10000}" "${LEARNING_RATE:=0.00003}" "${MASK_CHANNEL_PROB:=0.25}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_base_960h.sh" "$@"
