"""What fairseq's and NVIDIA's checkpoints have in common: the names of weights, and how an optimizer numbers them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError
from wav2vec2.convert import adam_state
from wav2vec2.convert.contents import (
    Contents,
    check_complete,
    check_part,
    listed,
    needed_shapes,
    output_rows,
    weights_of,
)
from wav2vec2.convert.names import optimizer_groups, original_names
from wav2vec2.convert.options import to_config
from wav2vec2.convert.stand_ins import count_in, table_in

# A fine-tuned file may still hold what only pre-training uses.
_IDLE_HEAD = re.compile(r"w2v_encoder\.w2v_model\.(quantizer|project_q|final_proj)\.")


def read(
    where: str,
    source: str,
    mode: str,
    options: Mapping[str, Any],
    *,
    weights: Any,
    averaged: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    position: Mapping[str, Any],
    stacked: bool = False,
) -> Contents:
    """Configuration, weights, averages, optimizer and epoch; the rest is told by each program in its own way.

    `stacked`: the optimizer sees q, k and v as one parameter. Raises CheckpointError naming the file.
    """
    config, remarks = to_config(where, mode, options)
    found = weights_of(where, weights)
    idle = [name for name in found if mode == "finetune" and _IDLE_HEAD.match(name)]
    used = {name: tensor for name, tensor in found.items() if name not in idle}
    num_symbols = output_rows(where, mode, used, "w2v_encoder.proj.weight")
    names, shapes = original_names(config.model), needed_shapes(config, num_symbols)
    native = names.to_native(where, used, shapes)
    check_complete(where, native, config, num_symbols)
    average = names.to_native(where, weights_of(where, averaged, "averaged weights"), shapes)
    check_part(where, "averaged weights", average, native)
    moments, told = None, [f"{listed(idle)}: of pre-training, not used here"] if idle else []
    if table_in(optimizer, "state"):
        groups = optimizer_groups(found, stacked=stacked)
        moments, counted = adam_state.read(where, optimizer, groups, found, names, list(native), idle)
        told += counted
    epoch = count_in(position, "epoch")
    return Contents(
        source=source,
        config=config,
        weights=native,
        averaged=average or None,
        optimizer=moments,
        scaler=adam_state.scaler_state(optimizer),
        loader=None if epoch is None else {"epoch": epoch, "position": 0},
        remarks=(*remarks, *told),
    )


def refuse_projection(program: str, contents: Contents) -> None:
    """The originals have no projection of the features where it does not change their width."""
    model = contents.config.model
    if model.feature_projection == "always" and model.conv_layers()[-1][0] == model.encoder_embed_dim:
        raise CheckpointError(
            f"--to {program}: its models do not project features that have the width of the transformer "
            f"({model.encoder_embed_dim}), and this one does; huggingface and native can hold it"
        )
