#!/usr/bin/env bash
# From nothing to a word error rate: environment, a small corpus, pre-training, fine-tuning, inference.
# SPDX-License-Identifier: Apache-2.0
#
#   bash scripts/quickstart.sh
#   QUICKSTART_DIR=/my/corpus bash scripts/quickstart.sh     # folders train, dev and test in LibriSpeech's layout
#
# Everything is written below QUICKSTART_WORK; run again, it goes on where it stopped. The stages are the commands of
# the README with smaller values, and every variable of the recipes works here too. DRY_RUN=1 prints the commands.
#
# QUICKSTART_WORK   folder for the corpus, the lists and the results (default quickstart)
# QUICKSTART_DIR    a corpus of your own; nothing is written into it
# HOURS             speech to synthesise for training, without QUICKSTART_DIR (default 0.5)
# PRETRAIN_UPDATES  length of the pre-training (default 500)
# FINETUNE_UPDATES  length of the fine-tuning (default 1200)
# EXAMPLES          reference/hypothesis pairs to show (default 8)
: "${QUICKSTART_WORK:=quickstart}" "${QUICKSTART_DIR:=}" "${HOURS:=0.5}"
: "${PRETRAIN_UPDATES:=500}" "${FINETUNE_UPDATES:=1200}" "${EXAMPLES:=8}"

. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
case "$#:${1:-}" in
    0:) ;;
    1:--help)
        print_help "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) usage_error "$*: quickstart.sh takes no arguments but --help; variables set what it does" ;;
esac
require_count PRETRAIN_UPDATES FINETUNE_UPDATES EXAMPLES
scripts=$ROOT/scripts
case "$QUICKSTART_WORK" in /*) work=$QUICKSTART_WORK ;; *) work=$PWD/$QUICKSTART_WORK ;; esac
if ! is_true DRY_RUN; then
    make_folder QUICKSTART_WORK "$QUICKSTART_WORK"
    work=$(CDPATH='' cd -- "$work" && pwd)
fi
corpus=$work/corpus
if [ -n "$QUICKSTART_DIR" ]; then
    if [ ! -d "$QUICKSTART_DIR" ]; then usage_error "QUICKSTART_DIR=$QUICKSTART_DIR: no such folder"; fi
    corpus=$(CDPATH='' cd -- "$QUICKSTART_DIR" && pwd)
fi
lists=$work/filelists

# stage TITLE COMMAND...: run the command, say what it is for and how long it took
stage() {
    local title=$1 start=$SECONDS
    shift
    if is_true DRY_RUN; then
        printf '# %s\n' "$title"
        "$@"
        return
    fi
    printf '\n== %s\n' "$title"
    "$@"
    printf '   took %d min %02d s\n' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60))
}

make_environment() {
    if is_true DRY_RUN; then
        quoted bash "$scripts/setup_env.sh"
        PYTHON=$(find_python)
        export PYTHON
    else
        # shellcheck disable=SC2119 # without --dev
        set_up_environment
    fi
}

make_corpus() {
    local subset
    if [ -z "$QUICKSTART_DIR" ]; then
        # the subshell lets `finish` become the program
        (finish "$PYTHON" "$ROOT/utils/synthesize_corpus.py" "$corpus" --hours "$HOURS" --seed "${SEED:-1}")
        if is_true DRY_RUN; then return; fi
    fi
    for subset in train dev test; do
        if [ ! -d "$corpus/$subset" ]; then
            usage_error "QUICKSTART_DIR=$QUICKSTART_DIR: has no folder $subset; it needs train, dev and test"
        fi
    done
}

make_lists() {
    if is_true DRY_RUN; then
        quoted bash "$scripts/generate_filelists.sh" "$corpus" "$lists"
        return
    fi
    if [ -f "$lists/complete" ]; then
        if [ "$(cat "$lists/complete")" = "$corpus" ]; then
            note "$lists is there already"
            return
        fi
        usage_error "$work: holds the results of $(cat "$lists/complete"); delete it, or set QUICKSTART_WORK to another folder"
    fi
    bash "$scripts/generate_filelists.sh" "$corpus" "$lists"
    printf '%s\n' "$corpus" >"$lists/complete"
}

pretrain() {
    OUTPUT_DIR=$work/pretrain MAX_UPDATE=$PRETRAIN_UPDATES bash "$scripts/pretrain_tiny.sh"
}

finetune() {
    RESUME_FROM='' OUTPUT_DIR=$work/finetune MAX_UPDATE=$FINETUNE_UPDATES \
        PRETRAINED_MODEL=$work/pretrain/wav2vec2_update$PRETRAIN_UPDATES.pt bash "$scripts/finetune_tiny.sh"
}

# predictions are `id<TAB>text` in any order, references the lines of test.wrd in the order of test.tsv
show_examples() {
    awk -F '\t' -v limit="$EXAMPLES" '
        function key(path) { sub(/.*\//, "", path); sub(/\.[A-Za-z0-9]*$/, "", path); return path }
        FNR == 1 { file++ }
        file == 1 { if (FNR > 1) names[FNR - 1] = key($1) }
        file == 2 { reference[names[FNR]] = $0 }
        file == 3 && key($1) in reference && shown++ < limit {
            printf "   reference   %s\n   hypothesis  %s\n\n", reference[key($1)], $2
        }' "$lists/test.tsv" "$lists/test.wrd" "$work/test.predictions"
}

infer() {
    export FINETUNED_MODEL=$work/finetune/wav2vec2_best.pt OUTPUT_DIR=$work/inference VALID_SUBSET=test
    export PREDICTION_FILE=$work/test.predictions
    if is_true DRY_RUN; then
        bash "$scripts/inference.sh"
        return
    fi
    bash "$scripts/inference.sh" | tee "$work/inference.log"
    show_examples
}

stage "1/6 Environment" make_environment
export FILELISTS_DIR=$lists TRAIN_SUBSET=train VALID_SUBSET=dev
stage "2/6 Corpus: $corpus" make_corpus
stage "3/6 File lists and labels: $lists" make_lists
stage "4/6 Pre-training on audio alone: $PRETRAIN_UPDATES updates" pretrain
stage "5/6 Fine-tuning on transcripts with CTC: $FINETUNE_UPDATES updates" finetune
stage "6/6 Inference on the test subset, speakers that were not in training" infer
if is_true DRY_RUN; then exit 0; fi

wer=$(grep '^WER: ' "$work/inference.log" | tail -n 1)
printf '\nThe whole took %d min %02d s. Results: %s\n%s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$work" "$wer"
