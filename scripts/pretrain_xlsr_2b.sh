#!/usr/bin/env bash
# Pre-train a model of the size of XLS-R 2B (2.16 billion parameters) in shards: the 1B recipe with these values.
# SPDX-License-Identifier: Apache-2.0
: "${OUTPUT_DIR:=results/pretrain_xlsr_2b}"
# 2.7 hours of speech
: "${MAX_TOKENS:=800000}"
: "${ENCODER_EMBED_DIM:=1920}" "${ENCODER_FFN_EMBED_DIM:=7680}"

. "$(dirname -- "${BASH_SOURCE[0]}")/pretrain_xlsr_1b.sh" "$@"
