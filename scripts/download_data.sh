#!/usr/bin/env bash
# Download and unpack LibriSpeech: `download_data.sh [TARGET_DATA_DIR] [OPTIONS of utils/download_librispeech.py]`.
# SPDX-License-Identifier: Apache-2.0
#
# Can be stopped and started again. The target is DATASET_DIR where it is not given. SUBSETS names the parts, separated
# by spaces; by default all seven and librispeech_finetuning (Libri-light's 1 h and 10 h). DRY_RUN=1 prints the command.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

: "${DATASET_DIR:=/datasets/LibriSpeech}" "${SUBSETS:=}"
case "${1:-}" in
    '' | -*) ;;
    *)
        DATASET_DIR=$1
        shift
        ;;
esac
if [ -z "$SUBSETS" ]; then
    SUBSETS="train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other"
    SUBSETS="$SUBSETS librispeech_finetuning"
fi

python=$(find_python)
# shellcheck disable=SC2086 # SUBSETS is a list
finish "$python" "$ROOT/utils/download_librispeech.py" "$DATASET_DIR" --subsets $SUBSETS "$@"
