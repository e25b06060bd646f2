#!/usr/bin/env bash
# Fine-tune a Large model that was pre-trained on several corpora (LV-60, CV, SWBD, FSH) on LibriSpeech 960 h.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/finetune_vox_960h_cv}"
: "${MAX_UPDATE:=80000}" "${FREEZE_FINETUNE_UPDATES:=0}" "${LEARNING_RATE:=0.00002}"
: "${MASK_PROB:=0.25}" "${MASK_CHANNEL_PROB:=0.5}"

. "$(dirname -- "${BASH_SOURCE[0]}")/finetune_vox_960h.sh" "$@"
