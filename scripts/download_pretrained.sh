#!/usr/bin/env bash
# Download the original wav2vec 2.0 checkpoints (fairseq): `download_pretrained.sh [TARGET_DIR] [NAMES...]`.
# SPDX-License-Identifier: Apache-2.0
#
# Can be stopped and started again. The target is TARGET_DIR (results/pretrained) where it is not given, the name
# wav2vec_small, the Base model; `--list` prints all names. DRY_RUN=1 prints the command.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

: "${TARGET_DIR:=results/pretrained}"
case "${1:-}" in
    '' | -*) ;;
    *)
        TARGET_DIR=$1
        shift
        ;;
esac

python=$(find_python)
finish "$python" "$ROOT/utils/download_pretrained.py" "$TARGET_DIR" "$@"
