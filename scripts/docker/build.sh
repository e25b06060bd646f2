#!/usr/bin/env bash
# Build the container image; arguments go to docker build.
# SPDX-License-Identifier: Apache-2.0
#
# IMAGE            name of the image (default wav2vec2:latest)
# FROM_IMAGE_NAME  NGC PyTorch image to build on (default: the Dockerfile's)
. "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"

arguments=()
if [ -n "${FROM_IMAGE_NAME:-}" ]; then arguments=(--build-arg "FROM_IMAGE_NAME=$FROM_IMAGE_NAME"); fi
finish docker build --tag "${IMAGE:-wav2vec2:latest}" ${arguments[@]+"${arguments[@]}"} "$@" "$ROOT"
