#!/usr/bin/env bash
# Measure the speed of inference: NUM_REPEATS passes over a subset after NUM_WARMUP_REPEATS that do not count.
# SPDX-License-Identifier: Apache-2.0
#
# Batches are of BATCH_SIZE utterances, whatever their lengths, unless MAX_TOKENS is set.
: "${BATCH_SIZE:=1}" "${MAX_TOKENS:=0}" "${NUM_REPEATS:=10}" "${NUM_WARMUP_REPEATS:=2}" "${PREDICTION_FILE=}"
: "${OUTPUT_DIR:=results/inference_benchmark_bs@LAYOUT@}"

. "$(dirname -- "${BASH_SOURCE[0]}")/inference.sh" "$@"
