#!/usr/bin/env bash
# Functions that the scripts share: messages, choice of Python, sub-batches per update, the final command.
# SPDX-License-Identifier: Apache-2.0
#
# Sourced, never run. Everything here runs under bash 3.2 with the tools of a bare Linux or macOS.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

note() { printf '%s\n' "$*" >&2; }

# usage_error MESSAGE...: every argument is a line; exit status 2 is a mistake of usage
usage_error() {
    printf 'error: %s\n' "$1" >&2
    shift
    if [ "$#" -gt 0 ]; then printf '%s\n' "$@" >&2; fi
    exit 2
}

# print_help SCRIPT: the comment at the head of a script
print_help() { awk 'NR == 1 || /SPDX-/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$1"; }

# is_true NAME: whether the variable NAME is switched on; unset and empty are off
is_true() {
    case "${!1:-}" in
        true | True | TRUE | yes | 1) return 0 ;;
        false | False | FALSE | no | 0 | '') return 1 ;;
        *) usage_error "$1=${!1}: must be true or false" ;;
    esac
}

# precision: the working precision in a word
precision() {
    if is_true FP16; then
        printf 'fp16\n'
    elif is_true BF16; then
        printf 'bf16\n'
    else
        printf 'fp32\n'
    fi
}

# require_count NAME...: every variable NAME holds an integer of 1 or more
require_count() {
    local name
    for name in "$@"; do
        case "${!name:-}" in
            '' | 0* | *[!0-9]*) usage_error "$name=${!name:-}: must be an integer of 1 or more" ;;
        esac
    done
}

# require_percent NAME...: every variable NAME holds a whole number from 0 to 100, or nothing
require_percent() {
    local name
    for name in "$@"; do
        case "${!name:-0}" in
            0 | [1-9] | [1-9][0-9] | 100) ;;
            *) usage_error "$name=${!name}: must be a whole number from 0 to 100" ;;
        esac
    done
}

# make_folder NAME FOLDER: make FOLDER, the value of the variable NAME, where it is not there; it must be writable
make_folder() {
    if ! mkdir -p -- "$2" 2>/dev/null || [ ! -w "$2" ]; then
        usage_error "$1=$2: this folder cannot be made or written; set $1 to another one, or check the permissions"
    fi
}

# ------------------------------------------------------------------------------------------------- Python

# environment_folder: where this toolkit makes its own environment
environment_folder() { printf '%s\n' "${VENV_DIR:-$ROOT/.venv}"; }

# find_python: the interpreter that recipes run with: PYTHON, else the active environment, else .venv, else python3;
# it need not be there when nothing is run
find_python() {
    local python=python3
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        python=$VIRTUAL_ENV/bin/python
    elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        python=$CONDA_PREFIX/bin/python
    elif [ -x "$(environment_folder)/bin/python" ]; then
        python=$(environment_folder)/bin/python
    elif ! command -v python3 >/dev/null 2>&1 && command -v python >/dev/null 2>&1; then
        python=python
    fi
    if ! is_true DRY_RUN && ! command -v "$python" >/dev/null 2>&1; then
        usage_error "PYTHON=$python: no such program; run scripts/setup_env.sh, or set PYTHON to Python 3.10 or newer"
    fi
    printf '%s\n' "$python"
}

# set_up_environment [--dev]: install what is missing and let PYTHON be the interpreter that has it
set_up_environment() {
    PYTHON=$(bash "$ROOT/scripts/setup_env.sh" "$@") || exit "$?"
    export PYTHON
}

# ---------------------------------------------------------------------------------- processes and sub-batches

# count_cuda_devices PYTHON: visible CUDA devices as torch sees them, or as nvidia-smi does where torch is absent
count_cuda_devices() {
    local count listed visible
    # importing torch takes seconds: not on a machine without any driver
    if ! command -v nvidia-smi >/dev/null 2>&1 && [ ! -e /dev/nvidiactl ]; then
        printf '0\n'
        return
    fi
    if count=$("$1" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null); then
        printf '%s\n' "$count"
        return
    fi
    listed=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        # CUDA ignores what follows the first negative number
        visible=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | awk '/^ *-/ { exit } NF { n++ } END { print n + 0 }')
        if [ "$visible" -lt "$listed" ]; then listed=$visible; fi
    fi
    printf '%s\n' "$listed"
}

# set_processes PYTHON DEFAULT: NUM_NODES and NUM_GPUS (= processes per node); DEFAULT is a number, or "all" devices
set_processes() {
    : "${NUM_NODES:=1}" "${MIN_NODES:=$NUM_NODES}" "${DEVICE:=auto}"
    if [ -z "${NUM_GPUS:-}" ]; then
        NUM_GPUS=$2
        if [ "$2" = all ]; then
            NUM_GPUS=1
            if [ "$DEVICE" != cpu ]; then NUM_GPUS=$(count_cuda_devices "$1"); fi
            if [ "$NUM_GPUS" = 0 ]; then NUM_GPUS=1; fi
        fi
    fi
    require_count NUM_NODES MIN_NODES NUM_GPUS
    if [ "$MIN_NODES" -gt "$NUM_NODES" ]; then
        usage_error "MIN_NODES=$MIN_NODES: must be at most NUM_NODES=$NUM_NODES, the number of machines with none lost"
    fi
    # A run that may lose machines starts again without them; any other ends with the first process that is lost.
    if [ -z "${MAX_RESTARTS:-}" ]; then
        MAX_RESTARTS=0
        if [ "$MIN_NODES" -lt "$NUM_NODES" ]; then MAX_RESTARTS=10; fi
    fi
    case "$MAX_RESTARTS" in
        0?* | *[!0-9]*) usage_error "MAX_RESTARTS=$MAX_RESTARTS: must be an integer of 0 or more" ;;
    esac
    if [ "$MAX_RESTARTS" -gt 0 ] && [ -n "${RESUME:-}" ] && ! is_true RESUME; then
        usage_error "MAX_RESTARTS=$MAX_RESTARTS: a restart goes on from a checkpoint and needs RESUME=true; or set MAX_RESTARTS=0"
    fi
}

# scaled NUMBER TIMES OVER: NUMBER x TIMES / OVER
scaled() { awk -v number="$1" -v times="$2" -v over="$3" 'BEGIN { printf "%.6g\n", number * times / over }'; }

# solve_update_freq: set UPDATE_FREQ so that NUM_NODES x NUM_GPUS x NUM_CONCAT_BATCHES x UPDATE_FREQ is the number
# of sub-batches per update: WORLD_BATCHES (the user's) or RECIPE_BATCHES (the recipe's); without both, any number is
solve_update_freq() {
    local per_pass wanted
    : "${UPDATE_FREQ:=${UPDATE_FREQUENCY:-}}" "${NUM_CONCAT_BATCHES:=1}"
    require_count NUM_CONCAT_BATCHES
    if [ -n "$UPDATE_FREQ" ]; then require_count UPDATE_FREQ; fi
    if [ -n "${WORLD_BATCHES:-}" ]; then require_count WORLD_BATCHES; fi
    per_pass=$((NUM_NODES * NUM_GPUS * NUM_CONCAT_BATCHES))
    wanted=${WORLD_BATCHES:-${RECIPE_BATCHES:-}}
    if [ "$MIN_NODES" -lt "$NUM_NODES" ]; then
        leave_update_freq "${wanted:-$((per_pass * ${UPDATE_FREQ:-1}))}"
        return
    fi
    if [ -z "$wanted" ]; then
        : "${UPDATE_FREQ:=1}"
        wanted=$((per_pass * UPDATE_FREQ))
    fi
    if [ -z "$UPDATE_FREQ" ] && [ $((wanted % per_pass)) -eq 0 ]; then UPDATE_FREQ=$((wanted / per_pass)); fi
    if [ -z "$UPDATE_FREQ" ] || [ $((per_pass * UPDATE_FREQ)) -ne "$wanted" ]; then
        refuse_layout "$wanted" "$per_pass"
    fi
    note "$wanted sub-batches per update = $NUM_NODES (NUM_NODES) x $NUM_GPUS (NUM_GPUS)" \
        "x $NUM_CONCAT_BATCHES (NUM_CONCAT_BATCHES) x $UPDATE_FREQ (UPDATE_FREQ)"
    if [ -n "${LEARNING_RATE:-}" ] && [ "$wanted" -ne "${RECIPE_BATCHES:-$wanted}" ]; then
        note "The recipe has $RECIPE_BATCHES. LEARNING_RATE stays $LEARNING_RATE; linear scaling would suggest" \
            "LEARNING_RATE=$(scaled "$LEARNING_RATE" "$wanted" "$RECIPE_BATCHES")"
    fi
}

# leave_update_freq WANTED: where machines may come and go, train.py divides WANTED by the processes that are there
leave_update_freq() {
    if [ -n "$UPDATE_FREQ" ] && [ $((per_pass * UPDATE_FREQ)) -ne "$1" ]; then refuse_layout "$1" "$per_pass"; fi
    UPDATE_FREQ=''
    OPTIONS+=(--world_batches "$1")
    note "$1 sub-batches per update, shared among $MIN_NODES (MIN_NODES) to $NUM_NODES (NUM_NODES) machines" \
        "x $NUM_GPUS (NUM_GPUS), $NUM_CONCAT_BATCHES (NUM_CONCAT_BATCHES) at a time"
}

# refuse_layout WANTED PER_PASS: stop, and print the values that would multiply to WANTED
refuse_layout() {
    local wanted=$1 per_pass=$2 gpus=$NUM_GPUS below=$(($1 / $2 * $2)) lines=() concat rest
    while [ "$gpus" -gt 0 ] && [ $((wanted % (NUM_NODES * gpus))) -ne 0 ]; do gpus=$((gpus - 1)); done
    if [ "$gpus" -gt 0 ]; then
        rest=$((wanted / (NUM_NODES * gpus)))
        concat=$rest
        lines=("These do:")
        while [ "$concat" -gt 0 ]; do
            if [ $((rest % concat)) -eq 0 ]; then
                lines+=("  NUM_GPUS=$gpus NUM_CONCAT_BATCHES=$concat UPDATE_FREQ=$((rest / concat))")
            fi
            concat=$((concat - 1))
        done
    fi
    if [ -n "$UPDATE_FREQ" ]; then
        below=$((per_pass * UPDATE_FREQ))
    elif [ "$below" -eq 0 ]; then
        below=$per_pass
    fi
    usage_error "NUM_NODES=$NUM_NODES x NUM_GPUS=$NUM_GPUS x NUM_CONCAT_BATCHES=$NUM_CONCAT_BATCHES x\
 UPDATE_FREQ=${UPDATE_FREQ:-?} does not multiply to the $wanted sub-batches of an update." \
        ${lines[@]+"${lines[@]}"} \
        "Or train with another number of sub-batches: WORLD_BATCHES=$below (the learning rate is then yours to judge)."
}

# --------------------------------------------------------------------------------------------- the command

OPTIONS=()

# note_near_names NAME...: name the environment variables that differ by underscores or a final S only from one that
# is read: the NAMEs and those in the `add` lines of train.sh
note_near_names() {
    awk -v names="$*" '
        function bare(name) { gsub(/_/, "", name); sub(/S$/, "", name); return name }
        function know(name) { sub(/;$/, "", name); exact[name]; near[bare(name)] = name }
        { for (i = 1; i + 2 <= NF; i++) if ($i ~ /^add(_list|_switch|_switch_off)?$/) know($(i + 2)) }
        END {
            count = split(names, list, " ")
            for (i = 1; i <= count; i++) know(list[i])
            for (name in ENVIRON) {
                if (!(name in exact) && bare(name) in near) {
                    printf "%s is set, but nothing reads it; did you mean %s?\n", name, near[bare(name)]
                }
            }
        }' "$ROOT/scripts/train.sh" >&2
}

# add FLAG VARIABLE: --flag value, when the variable is set and not empty
add() {
    if [ -n "${!2:-}" ]; then OPTIONS+=("--$1" "${!2}"); fi
}

# add_list FLAG VARIABLE: the same for a flag of several values, separated by spaces
add_list() {
    local words=()
    if [ -n "${!2:-}" ]; then
        read -r -a words <<<"${!2}"
        OPTIONS+=("--$1" ${words[@]+"${words[@]}"})
    fi
}

# add_switch FLAG VARIABLE: --flag, when the variable is true
add_switch() {
    if is_true "$2"; then OPTIONS+=("--$1"); fi
}

# add_switch_off FLAG VARIABLE: --no_flag, when the variable is set and false
add_switch_off() {
    if [ -n "${!2:-}" ] && ! is_true "$2"; then OPTIONS+=("--no_$1"); fi
}

# quoted WORD...: the words on one line, as a shell reads them back
quoted() {
    local word quote="'" escaped="'\\''" separator=''
    for word in "$@"; do
        case "$word" in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$quote/$escaped}'" ;;
        esac
        printf '%s%s' "$separator" "$word"
        separator=' '
    done
    printf '\n'
}

# finish COMMAND...: become the command; with DRY_RUN=1 only print it
finish() {
    if is_true DRY_RUN; then
        quoted "$@"
        exit 0
    fi
    quoted "$@" >&2
    exec "$@"
}

# run_program PYTHON PROGRAM ARGUMENT...: the program in one process, or in NUM_GPUS processes on NUM_NODES machines
run_program() {
    local python=$1 folder=$ROOT/ program=$2 cores launcher=()
    shift 2
    # a path that can be pasted: short where the user stands in the checkout
    if [ "$PWD" -ef "$ROOT" ]; then folder=''; fi
    if [ "$NUM_NODES" -gt 1 ]; then
        if [ -z "${MASTER_ADDR:-}" ]; then
            usage_error "NUM_NODES=$NUM_NODES: needs MASTER_ADDR, a machine of the run, by the name or address that the others know"
        fi
        # The machines meet at MASTER_ADDR and number themselves; how soon one counts as lost: utils/launch.py
        launcher=(--nnodes "$MIN_NODES:$NUM_NODES" --nproc_per_node "$NUM_GPUS" --max_restarts "$MAX_RESTARTS"
            --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_id "${RDZV_ID:-wav2vec2}")
        if [ -n "${JOIN_TIMEOUT:-}" ]; then
            require_count JOIN_TIMEOUT
            launcher+=(--rdzv_conf "join_timeout=$JOIN_TIMEOUT")
        fi
    elif [ "$NUM_GPUS" -gt 1 ] || [ "$MAX_RESTARTS" -gt 0 ]; then
        # --standalone takes a free port: several runs can share a machine
        launcher=(--standalone --nproc_per_node "$NUM_GPUS")
        if [ "$MAX_RESTARTS" -gt 0 ]; then launcher+=(--max_restarts "$MAX_RESTARTS"); fi
    fi
    if [ "${#launcher[@]}" -gt 0 ]; then launcher=("${folder}utils/launch.py" "${launcher[@]}"); fi
    if [ "$NUM_GPUS" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
        # processes that all take every core slow each other down
        cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || printf '1')
        OMP_NUM_THREADS=$((cores / NUM_GPUS > 0 ? cores / NUM_GPUS : 1))
        if [ "$DEVICE" != cpu ] && [ -e /dev/nvidiactl ]; then OMP_NUM_THREADS=1; fi
        export OMP_NUM_THREADS
    fi
    finish "$python" ${launcher[@]+"${launcher[@]}"} "$folder$program" "$@"
}
