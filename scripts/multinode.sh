#!/usr/bin/env bash
# Run a recipe on this machine as one of NUM_NODES: the same command on each of them.
# SPDX-License-Identifier: Apache-2.0
#
#   NUM_NODES=2 MASTER_ADDR=node0 bash scripts/multinode.sh scripts/pretrain_base.sh [FLAG...]
#
# NUM_NODES     machines in the run (under Slurm: its number)
# MASTER_ADDR   one of them, where the others find it: name or address
# MASTER_PORT   a free port there (default 29500)
# MIN_NODES     go on with as few machines when others are lost (default NUM_NODES: the run ends)
# MAX_RESTARTS  how often the run starts again when a process or a machine is lost (default 0; 10 with MIN_NODES)
# JOIN_TIMEOUT  seconds to wait for machines that are late, or that replace others (default 600)
# RDZV_ID       name of the run: machines of another one are refused (default: the number of the Slurm job)
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

recipe=${1:-}
if [ ! -f "$recipe" ]; then
    usage_error "${recipe:-nothing}: no such recipe; call it as bash scripts/multinode.sh scripts/pretrain_base.sh"
fi
shift
NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-}}
: "${MASTER_PORT:=29500}" "${RDZV_ID:=${SLURM_JOB_ID:-wav2vec2}}"
require_count NUM_NODES MASTER_PORT
export NUM_NODES MASTER_PORT RDZV_ID
if [ "$NUM_NODES" -gt 1 ]; then export MASTER_ADDR="${MASTER_ADDR:-}"; fi
exec bash "$recipe" "$@"
