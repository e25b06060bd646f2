#!/usr/bin/env bash
# File lists, labels and dictionary of a corpus: `generate_filelists.sh [SOURCE_DATA_DIR] [TARGET_FILELISTS_DIR]`.
# SPDX-License-Identifier: Apache-2.0
#
# Every subset folder gets a .tsv list, and .ltr and .wrd labels where it has transcripts. The three LibriSpeech training
# sets are joined to train-full-960; Libri-light's fine-tuning sets give train-1h and train-10h. dict.ltr.txt is counted
# on train-full-960, else on all subsets whose name begins with "train".
#
# The source is DATASET_DIR where it is not given, the target FILELISTS_DIR. Without any argument and without
# FILELISTS_DIR the lists go beside the audio, into DATASET_DIR, where recipes look; a source that is given as an
# argument is not written into unless it is named as the target too. EXTENSIONS names the endings of the audio files,
# separated by spaces. SKIP_BAD=1 leaves out audio that cannot be read. DRY_RUN=1 prints
# the commands.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

if [ "${1:-}" = --help ]; then
    print_help "${BASH_SOURCE[0]}"
    exit 0
fi
case "$#:${1:-}:${2:-}" in
    [3-9]:* | [1-9][0-9]*:* | *:-*)
        usage_error "$*: generate_filelists.sh takes [SOURCE_DATA_DIR] [TARGET_FILELISTS_DIR] and no options but --help"
        ;;
esac
if [ -n "${2:-}" ]; then FILELISTS_DIR=$2; fi
if [ -n "${1:-}" ]; then
    DATASET_DIR=$1
    if [ -z "${FILELISTS_DIR:-}" ]; then
        usage_error "$1: nothing is written below a source unless asked; name the folder for the lists as the second\
 argument or in FILELISTS_DIR (the source itself will do)"
    fi
fi
: "${DATASET_DIR:=/datasets/LibriSpeech}"
: "${FILELISTS_DIR:=$DATASET_DIR}" "${EXTENSIONS:=flac wav mp3 ogg opus}" "${SKIP_BAD:=false}"

full_960="train-clean-100 train-clean-360 train-other-500"
finetuning=librispeech_finetuning
python=$(find_python)
skip_bad=()
if is_true SKIP_BAD; then skip_bad=(--skip_bad); fi

# tool NAME ARGUMENTS...: run a program of utils/; the subshell lets `finish` become it
tool() {
    local program=$ROOT/utils/$1
    shift
    (finish "$python" "$program" "$@")
}

# has_file FOLDER ENDING...: whether a file with one of these name endings lies below it
has_file() {
    local folder=$1 ending
    shift
    for ending in "$@"; do
        if [ -n "$(find -L "$folder/" -type f -iname "*.$ending" 2>/dev/null | head -n 1)" ]; then return 0; fi
    done
    return 1
}

folders=()
if [ -d "$DATASET_DIR" ]; then
    for folder in "$DATASET_DIR"/*/; do
        # shellcheck disable=SC2086 # EXTENSIONS is a list
        if [ "$(basename -- "$folder")" != $finetuning ] && has_file "${folder%/}" $EXTENSIONS; then
            folders+=("${folder%/}")
        fi
    done
elif is_true DRY_RUN; then
    for subset in $full_960 dev-clean dev-other test-clean test-other; do folders+=("$DATASET_DIR/$subset"); done
fi
if [ "${#folders[@]}" = 0 ]; then
    usage_error "DATASET_DIR=$DATASET_DIR: no folder with audio in it; run scripts/download_data.sh, or see EXTENSIONS"
fi
if ! is_true DRY_RUN; then
    make_folder FILELISTS_DIR "$FILELISTS_DIR"
    note "Writing lists into $FILELISTS_DIR"
fi

labelled=' '
train_labels=()
for folder in ${folders[@]+"${folders[@]}"}; do
    subset=$(basename -- "$folder")
    list=$FILELISTS_DIR/$subset
    # shellcheck disable=SC2086 # EXTENSIONS is a list
    tool generate_filelist.py "$folder" "$list.tsv" ${skip_bad[@]+"${skip_bad[@]}"} --extensions $EXTENSIONS
    if [ -d "$folder" ] && ! has_file "$folder" trans.txt; then
        note "$subset: no transcripts (*.trans.txt), so no labels; it serves for pre-training"
        continue
    fi
    tool libri_labels.py "$list.tsv" --output_dir "$FILELISTS_DIR" --output_name "$subset"
    labelled="$labelled$subset "
    case $subset in train*) train_labels+=("$list.ltr") ;; esac
done

parts=()
for subset in $full_960; do
    case $labelled in *" $subset "*) parts+=("$FILELISTS_DIR/$subset.tsv") ;; esac
done
if [ "${#parts[@]}" = 3 ]; then
    tool combine_filelists.py ${parts[@]+"${parts[@]}"} --output "$FILELISTS_DIR/train-full-960.tsv"
    train_labels=("$FILELISTS_DIR/train-full-960.ltr")
fi
if [ -d "$DATASET_DIR/$finetuning" ]; then
    tool generate_1h_10h_datasets.py "$DATASET_DIR/$finetuning" "$FILELISTS_DIR"
fi
if [ "${#train_labels[@]}" -gt 0 ]; then
    tool generate_dictionary.py ${train_labels[@]+"${train_labels[@]}"} "$FILELISTS_DIR/dict.ltr.txt"
else
    note "No labelled subset whose name begins with train: no dictionary (utils/generate_dictionary.py makes one)"
fi
