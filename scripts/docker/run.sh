#!/usr/bin/env bash
# Start a shell, or the given command, in the container image.
# SPDX-License-Identifier: Apache-2.0
#
# DATASET_DIR  folder on this machine that becomes /datasets, so that DATASET_DIR/LibriSpeech is where recipes look
#              (default: datasets/ of the checkout); it must exist
# RESULTS_DIR  folder on this machine that becomes results/ of the workspace (default: results/ of the checkout)
# IMAGE        name of the image (default wav2vec2:latest)
# GPUS         which GPUs the container sees, as docker's --gpus (default all; empty: none)
#
# The checkout becomes the workspace, so that what is changed outside is changed inside.
. "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"

: "${DATASET_DIR:=$ROOT/datasets}" "${RESULTS_DIR:=$ROOT/results}" "${GPUS=all}"
workspace=/workspace/wav2vec2
# docker would take a relative path for the name of a volume
case "$DATASET_DIR" in /*) ;; *) DATASET_DIR=$PWD/$DATASET_DIR ;; esac
case "$RESULTS_DIR" in /*) ;; *) RESULTS_DIR=$PWD/$RESULTS_DIR ;; esac

# what is not there docker would make, as root
if ! is_true DRY_RUN; then
    if [ ! -d "$DATASET_DIR" ]; then
        usage_error "DATASET_DIR=$DATASET_DIR: no such folder; set DATASET_DIR to the folder that holds LibriSpeech/"
    fi
    make_folder RESULTS_DIR "$RESULTS_DIR"
fi

arguments=()
if [ -t 0 ] && [ -t 1 ]; then arguments=(--interactive --tty); fi
if [ -n "$GPUS" ]; then arguments=(${arguments[@]+"${arguments[@]}"} --gpus "$GPUS"); fi
if [ "$#" -eq 0 ]; then set -- bash; fi
# data loaders share memory with the program: --ipc=host lifts docker's limit of 64 MiB
finish docker run --rm ${arguments[@]+"${arguments[@]}"} --ipc=host --env PYTHONDONTWRITEBYTECODE=1 \
    --volume "$DATASET_DIR:/datasets" --volume "$ROOT:$workspace" --volume "$RESULTS_DIR:$workspace/results" \
    --workdir "$workspace" "${IMAGE:-wav2vec2:latest}" "$@"
