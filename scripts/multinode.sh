#!/usr/bin/env bash
# Run a recipe on this machine as one of NUM_NODES: the same command on each of them, with its NODE_RANK.
# SPDX-License-Identifier: Apache-2.0
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/multinode.sh scripts/pretrain_base.sh [FLAG...]
#
# NUM_NODES     machines in the run (under Slurm: its number)
# NODE_RANK     0 on the first machine, 1 on the next ... (under Slurm: its number)
# MASTER_ADDR   name or address of the first machine, as the others reach it
# MASTER_PORT   a free port there (default 29500)
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

recipe=${1:-}
if [ ! -f "$recipe" ]; then
    usage_error "${recipe:-nothing}: no such recipe; call it as bash scripts/multinode.sh scripts/pretrain_base.sh"
fi
shift
NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
: "${MASTER_PORT:=29500}"
require_count NUM_NODES MASTER_PORT
export NUM_NODES NODE_RANK MASTER_PORT
if [ "$NUM_NODES" -gt 1 ]; then export MASTER_ADDR="${MASTER_ADDR:-}"; fi
exec bash "$recipe" "$@"
