#!/usr/bin/env bash
# Measure the speed of Base pre-training: NUM_EPOCHS epochs after NUM_WARMUP_EPOCHS that do not count, nothing saved.
# SPDX-License-Identifier: Apache-2.0
: "${NUM_EPOCHS:=5}" "${NUM_WARMUP_EPOCHS:=2}" "${TRAIN_SUBSET:=train-clean-100}"
: "${SAVE:=false}" "${RESUME:=false}" "${OUTPUT_DIR:=results/pretrain_base_benchmark_@LAYOUT@}"

. "$(dirname -- "${BASH_SOURCE[0]}")/pretrain_base.sh" "$@"
