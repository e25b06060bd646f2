#!/usr/bin/env bash
# Run all that is to be measured on a GPU, unattended and in under 8 minutes, and join the results to one file.
# SPDX-License-Identifier: Apache-2.0
#
#   bash benchmarks/gpu_suite.sh
#   CHECKOUT=/path/to/NVIDIAs/wav2vec2 bash benchmarks/gpu_suite.sh
#
# Needs torch and what the toolkit imports; all data are made. Every part has a time limit and its own process, so one
# that fails does not lose the others: the file says of every part how it ended, with its last lines and its results.
# The exit status is 0 when all parts worked, 1 when one did not, 2 for a mistake of usage. DRY_RUN=1 prints the commands.
#
# OUT       file for the results, or a folder for gpu_suite.json (default benchmarks/results)
# PARTS     parts to run, separated by spaces (default all): tests step_hourglass step_huggingface step_runner
#           hourglass utterance idle step_plain step_compile padding step_large scaling
# LIMIT     seconds for all parts together (default 465)
# ROUNDS    repetitions of every comparison (default 5; step_plain has 3)
# CHECKOUT  NVIDIA's folder PyTorch/SpeechRecognition/wav2vec2, for step_runner, which is left out without it
# NUM_GPUS  processes for scaling, which needs 2 (default: all visible CUDA devices)
# PYTHON    interpreter
#
# What is measured: DEVICE, SIZE, LARGE_SIZE, HOURGLASS_CONFIG, FACTORS, NUM_LENGTHS (of padded rows), PLAIN (names of
# benchmarks/plain.py), PRECISION, BATCH, LARGE_BATCH and PLAIN_BATCH (rows; all of step_plain are in memory together), LENGTH (seconds of a row), and for
# idle MAX_TOKENS (samples of a sub-batch). The default update is one GPU's share of the Base recipe's: 8 sub-batches of
# at most 1.4M samples, which are 5 rows of 250,000 each.
: "${OUT:=}" "${LIMIT:=465}" "${ROUNDS:=5}" "${CHECKOUT:=}" "${NUM_GPUS:=}"
all_parts="tests step_hourglass step_huggingface step_runner hourglass utterance idle step_plain step_compile padding"
all_parts="$all_parts step_large scaling"
: "${PARTS:=$all_parts}"
: "${DEVICE:=cuda}" "${SIZE:=base}" "${LARGE_SIZE:=large}" "${PRECISION:=bf16}"
: "${HOURGLASS_CONFIG:=[2,(8,4),2]}" "${FACTORS:=1 2 3 4 5 6}" "${NUM_LENGTHS:=4 8 16 40}"
: "${BATCH:=40}" "${LARGE_BATCH:=20}" "${PLAIN_BATCH:=20}" "${LENGTH:=15.6}" "${MAX_TOKENS:=1400000}"
: "${PLAIN:=contrastive quantizer first_block conv_stack positional_conv last_layer optimizer}"

. "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/lib.sh"

case "$#:${1:-}" in
    0:) ;;
    1:--help)
        print_help "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) usage_error "$*: gpu_suite.sh takes no arguments but --help; variables set what it does" ;;
esac
for name in $PARTS; do
    case " $all_parts " in
        *" $name "*) ;;
        *) usage_error "PARTS=$PARTS: no part is called $name; there are $all_parts" ;;
    esac
done
require_count LIMIT ROUNDS BATCH LARGE_BATCH PLAIN_BATCH MAX_TOKENS
if [ -n "$CHECKOUT" ]; then
    if [ ! -d "$CHECKOUT" ]; then usage_error "CHECKOUT=$CHECKOUT: no such folder; name the one of NVIDIA's code"; fi
    CHECKOUT=$(CDPATH='' cd -- "$CHECKOUT" && pwd)
fi
python=$(find_python)
if [ -z "$NUM_GPUS" ]; then
    NUM_GPUS=1
    if [ "$DEVICE" != cpu ]; then NUM_GPUS=$(count_cuda_devices "$python"); fi
fi
: "${OUT:=$ROOT/benchmarks/results}"
if [ -d "$OUT" ]; then OUT=$OUT/gpu_suite.json; fi
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
work=WORK
if ! is_true DRY_RUN; then
    if ! command -v timeout >/dev/null 2>&1; then
        usage_error "timeout: no such program; install the coreutils (a Mac has none, but no CUDA device either)"
    fi
    make_folder OUT "$(dirname -- "$OUT")"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
cd "$ROOT" || exit
SECONDS=0

# chosen NAME: whether PARTS has it
chosen() { case " $PARTS " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# has_module NAME: whether the interpreter can import it
has_module() {
    is_true DRY_RUN || "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" >/dev/null 2>&1
}

# outcome NAME STATUS SECONDS: a line for join_results.py; STATUS is an exit status, or why the part was left out
outcome() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$work/outcomes.tsv"
    note "   $1: $2 after $3 s"
}

# leave_out NAME REASON: a part that cannot run here
leave_out() {
    if ! chosen "$1" || is_true DRY_RUN; then return; fi
    outcome "$1" "$2" 0
}

# part NAME LIMIT COMMAND...: run a command of a part that was chosen, for LIMIT seconds or what is left of the whole
part() {
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    if ! chosen "$name"; then return; fi
    if is_true DRY_RUN; then
        quoted "$@"
        return
    fi
    if [ "$((LIMIT - begin))" -lt "$limit" ]; then limit=$((LIMIT - begin)); fi
    note ""
    note "== $name, at most $limit s"
    # 124 is what `timeout` itself gives
    if [ "$limit" -le 0 ]; then
        status=124
        note "   LIMIT=$LIMIT: no time is left" 2>"$work/$name.log"
    else
        timeout --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1 || status=$?
    fi
    cat "$work/$name.log" >&2
    outcome "$name" "$status" $((SECONDS - begin))
}

# measure NAME LIMIT PROGRAM FLAG...: a part that is a program of benchmarks/, which writes NAME.json
measure() {
    local name=$1 limit=$2 program=$ROOT/benchmarks/$3
    shift 3
    part "$name" "$limit" "$python" "$program" --device "$DEVICE" --precision "$PRECISION" "$@" --json "$work/$name.json"
}

# compare NAME LIMIT PROGRAM FLAG...: such a part that repeats steps on rows of LENGTH
compare() {
    local name=$1 limit=$2 program=$3
    shift 3
    measure "$name" "$limit" "$program" --seconds "$LENGTH" --rounds "$ROUNDS" "$@"
}

if has_module pytest; then
    part tests 150 "$python" -m pytest -q -p no:cacheprovider -m gpu "$ROOT/tests/gpu"
else
    leave_out tests "left out: pytest is not installed"
fi
compare step_hourglass 100 step.py --size "$SIZE" --batch "$BATCH" --hourglass "$HOURGLASS_CONFIG"
if has_module transformers; then
    compare step_huggingface 130 step.py --size "$SIZE" --batch "$BATCH" --against huggingface
else
    leave_out step_huggingface "left out: transformers is not installed"
fi
if [ -n "$CHECKOUT" ]; then
    compare step_runner 130 step.py --size "$SIZE" --batch "$BATCH" --hourglass "$HOURGLASS_CONFIG" \
        --against_runner "$ROOT/benchmarks/nvidia_runner.py" --checkout "$CHECKOUT"
else
    leave_out step_runner "left out: CHECKOUT is not set"
fi
# shellcheck disable=SC2086 # FACTORS is a list
compare hourglass 160 hourglass.py --size "$SIZE" --batch "$BATCH" --factors $FACTORS
measure utterance 40 utterance.py --size "$SIZE"
measure idle 60 idle.py --size "$SIZE" --hourglass "$HOURGLASS_CONFIG" --max_tokens "$MAX_TOKENS"
# shellcheck disable=SC2086 # PLAIN is a list
measure step_plain 120 step.py --size "$SIZE" --batch "$PLAIN_BATCH" --seconds "$LENGTH" \
    --hourglass "$HOURGLASS_CONFIG" --rounds 3 --steps 3 --plain $PLAIN
compare step_compile 90 step.py --size "$SIZE" --batch "$BATCH" --hourglass "$HOURGLASS_CONFIG" --compile
# shellcheck disable=SC2086 # NUM_LENGTHS is a list
measure padding 40 padding.py --size "$SIZE" --batch "$BATCH" --seconds "$LENGTH" --groups $NUM_LENGTHS
compare step_large 110 step.py --size "$LARGE_SIZE" --batch "$LARGE_BATCH"
if [ "$NUM_GPUS" -gt 1 ]; then
    compare scaling 120 scaling.py --size "$SIZE" --batch "$BATCH" --hourglass "$HOURGLASS_CONFIG" --passes 1
else
    leave_out scaling "left out: needs 2 GPUs, there are $NUM_GPUS"
fi
if is_true DRY_RUN; then exit 0; fi

note ""
note "== results"
"$python" "$ROOT/benchmarks/join_results.py" "$work" "$OUT"
