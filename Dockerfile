# SPDX-License-Identifier: Apache-2.0
# The toolkit on NVIDIA's PyTorch container, whose torch and libraries are kept: build with scripts/docker/build.sh.
# 26.05 has torch 2.12.0a0 (nv26.05), CUDA 13.2 and Python 3.12; 26.02 (torch 2.11.0a0) is the oldest that will do.
ARG FROM_IMAGE_NAME=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${FROM_IMAGE_NAME}

# An environment over the container's own packages: pip cannot replace what lies below it.
ENV VENV_DIR=/opt/wav2vec2
WORKDIR /workspace/wav2vec2
COPY requirements.txt requirements-dev.txt constraints.txt ./
COPY scripts/lib.sh scripts/setup_env.sh scripts/
# dllogger is no package of PyPI, only a tag of its repository
RUN export PIP_NO_CACHE_DIR=1 && \
    bash scripts/setup_env.sh && \
    "$VENV_DIR/bin/python" -m pip install --no-deps \
        "git+https://github.com/NVIDIA/dllogger@v1.0.0#egg=dllogger"
ENV VIRTUAL_ENV=/opt/wav2vec2 PATH=/opt/wav2vec2/bin:$PATH

COPY . .
