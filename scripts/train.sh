#!/usr/bin/env bash
# Launcher of train.py: `train.sh pretrain|finetune [FLAG...]` turns variables into flags and starts the processes.
# SPDX-License-Identifier: Apache-2.0
#
# A variable that is not set gives no flag, and train.py's default holds. The presets beside this file set the values
# of the published recipes and source it. Flags after the mode are passed on, and win.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
    pretrain | finetune) mode=$1 && shift ;;
    *) usage_error "${1:-nothing}: the first argument of train.sh is pretrain or finetune" ;;
esac

# What all recipes share. FILELISTS_DIR is for lists that may not lie beside the audio.
: "${DATASET_DIR:=/datasets/LibriSpeech}" "${FILELISTS_DIR:=$DATASET_DIR}"
: "${TRAIN_SUBSET:=train-full-960}" "${VALID_SUBSET:=dev-other}"
: "${SEED:=1}" "${FP16:=false}" "${BF16:=false}" "${RESUME:=true}"

note_near_names DATASET_DIR NUM_GPUS NUM_NODES MIN_NODES MAX_RESTARTS MASTER_ADDR WORLD_BATCHES UPDATE_FREQUENCY NUM_EPOCHS NUM_WARMUP_EPOCHS \
    WARMUP_PERCENT HOLD_PERCENT
python=$(find_python)
set_processes "$python" all
solve_update_freq

# Warm-up and hold follow MAX_UPDATE in the recipe's proportions, unless they are given in updates.
require_percent WARMUP_PERCENT HOLD_PERCENT
if [ -n "${MAX_UPDATE:-}${WARMUP_PERCENT:-}${HOLD_PERCENT:-}" ]; then require_count MAX_UPDATE; fi
if [ -z "${WARMUP_UPDATES:-}${HOLD_UPDATES:-}" ] && [ $((${WARMUP_PERCENT:-0} + ${HOLD_PERCENT:-0})) -gt 100 ]; then
    usage_error "WARMUP_PERCENT=$WARMUP_PERCENT: with HOLD_PERCENT=$HOLD_PERCENT it is more than 100; lower one of them"
fi
if [ -n "${WARMUP_PERCENT:-}" ]; then : "${WARMUP_UPDATES:=$((MAX_UPDATE * WARMUP_PERCENT / 100))}"; fi
if [ -n "${HOLD_PERCENT:-}" ]; then : "${HOLD_UPDATES:=$((MAX_UPDATE * HOLD_PERCENT / 100))}"; fi

# Benchmarks keep the results of every layout and precision apart.
layout=${NUM_GPUS}x${MAX_TOKENS:-}x${NUM_CONCAT_BATCHES}x${UPDATE_FREQ}_$(precision)
OUTPUT_DIR=${OUTPUT_DIR:-}
OUTPUT_DIR=${OUTPUT_DIR//@LAYOUT@/$layout}

# Run
add output_dir OUTPUT_DIR
add device DEVICE
add seed SEED
add_switch resume RESUME
add resume_from RESUME_FROM
add_switch_off save SAVE
# train.py refuses what has no effect
if [ -z "${SAVE:-}" ] || is_true SAVE; then
    add save_frequency SAVE_FREQUENCY
    add save_interval_updates SAVE_INTERVAL_UPDATES
    add save_interval_minutes SAVE_INTERVAL_MINUTES
    add_list keep_milestones KEEP_MILESTONES
fi
add preempt_exit_code PREEMPT_EXIT_CODE
add heartbeat_timeout HEARTBEAT_TIMEOUT
add hang_timeout HANG_TIMEOUT
add validate_frequency VALIDATE_FREQUENCY
add validate_interval_updates VALIDATE_INTERVAL_UPDATES
add log_frequency LOG_FREQUENCY
add health HEALTH
add on_nan ON_NAN
if [ -n "${NUM_EPOCHS:-}" ]; then
    # NUM_EPOCHS are those that are measured, --num_epochs are all
    require_count NUM_EPOCHS
    case "${NUM_WARMUP_EPOCHS:=0}" in
        0?* | *[!0-9]*) usage_error "NUM_WARMUP_EPOCHS=$NUM_WARMUP_EPOCHS: must be an integer of 0 or more" ;;
    esac
    OPTIONS+=(--num_epochs "$((NUM_EPOCHS + NUM_WARMUP_EPOCHS))" --num_warmup_epochs "$NUM_WARMUP_EPOCHS")
fi

# Speed and memory
add_switch compile COMPILE
add_switch cuda_graphs CUDA_GRAPHS
add_switch checkpoint_activations CHECKPOINT_ACTIVATIONS
add parallel PARALLEL
add bucket_cap_mb BUCKET_CAP_MB
add_switch auto_batch AUTO_BATCH
add_switch_off probe_memory PROBE_MEMORY

# Data
add data FILELISTS_DIR
# shards say themselves what is trained on, and rows of buckets what a sub-batch holds; also as flags behind
case "${TARRED_FILEPATHS:+--tarred} $*" in *--tarred*) ;; *) add train_subset TRAIN_SUBSET ;; esac
add valid_subset VALID_SUBSET
add manifest_format MANIFEST_FORMAT
add dataset_weights DATASET_WEIGHTS
add dataset_temperature DATASET_TEMPERATURE
add tarred_filepaths TARRED_FILEPATHS
add_switch is_tarred IS_TARRED
add_switch streaming STREAMING
add epoch_size EPOCH_SIZE
add shuffle_n SHUFFLE_N
add on_bad_file ON_BAD_FILE
add max_bad_share MAX_BAD_SHARE
add min_duration MIN_DURATION
add max_duration MAX_DURATION
add_switch trim_silence TRIM_SILENCE
add num_batch_buckets NUM_BATCH_BUCKETS
add bucketing_strategy BUCKETING_STRATEGY
add_list bucketing_batch_size BUCKETING_BATCH_SIZE
add shard_manifests SHARD_MANIFESTS
add num_workers NUM_WORKERS
case "${BUCKETING_BATCH_SIZE:+--bucketing_batch_size} $*" in *--bucketing_batch_size*) ;; *) add max_tokens MAX_TOKENS ;; esac
add max_tokens_valid MAX_TOKENS_VALID
add required_batch_size_multiple REQUIRED_BATCH_SIZE_MULTIPLE
add num_concat_batches NUM_CONCAT_BATCHES
add update_freq UPDATE_FREQ
add max_sample_size MAX_SAMPLE_SIZE
add min_sample_size MIN_SAMPLE_SIZE

# Optimizer
add max_update MAX_UPDATE
add lr LEARNING_RATE
add lr_policy LR_POLICY
add warmup_updates WARMUP_UPDATES
add hold_updates HOLD_UPDATES
add initial_lr_scale INITIAL_LR_SCALE
add final_lr_scale FINAL_LR_SCALE
add_list adam_betas ADAM_BETAS
add adam_eps ADAM_EPS
add weight_decay WEIGHT_DECAY
add clip_norm CLIP_NORM
add ema EMA

# Precision
add_switch fp16 FP16
add_switch bf16 BF16
add_switch amp AMP
add_list fp32_ops FP32_OPS
add_switch_off allow_tf32 TF32

# Regularisation and masks
add dropout DROPOUT
add attention_dropout ATTENTION_DROPOUT
add activation_dropout ACTIVATION_DROPOUT
add encoder_layerdrop ENCODER_LAYERDROP
add dropout_input DROPOUT_INPUT
add feature_grad_mult FEATURE_GRAD_MULT
add mask_prob MASK_PROB
add mask_length MASK_LENGTH
add mask_channel_prob MASK_CHANNEL_PROB
# a recipe without masks over channels has no use for their length
case "${MASK_CHANNEL_PROB:-0}" in
    *[!0.]*)
        add mask_channel_length MASK_CHANNEL_LENGTH
        ;;
esac

if [ "$mode" = pretrain ]; then
    add init_from INIT_FROM
    # a model that is there already says its own architecture
    if [ -z "${INIT_FROM:-}${RESUME_FROM:-}" ]; then
        add extractor_mode EXTRACTOR_MODE
        add conv_feature_layers CONV_FEATURE_LAYERS
        add_switch conv_bias CONV_BIAS
        add_switch normalize NORMALIZE
        add_switch layer_norm_first LAYER_NORM_FIRST
        add hourglass_transformer HOURGLASS_CONFIG
        # the Hourglass counts its own layers, and resampling needs one
        if [ -n "${HOURGLASS_CONFIG:-}" ]; then
            add hourglass_resample HOURGLASS_RESAMPLE
        else
            add encoder_layers ENCODER_LAYERS
        fi
        add encoder_embed_dim ENCODER_EMBED_DIM
        add encoder_ffn_embed_dim ENCODER_FFN_EMBED_DIM
        add encoder_attention_heads ENCODER_ATTENTION_HEADS
        add conv_pos CONV_POS
        add conv_pos_groups CONV_POS_GROUPS
        add final_dim FINAL_DIM
        add sample_rate SAMPLE_RATE
        add latent_vars LATENT_VARS
        add latent_groups LATENT_GROUPS
        add latent_dim LATENT_DIM
    fi
    add dropout_features DROPOUT_FEATURES
    add num_negatives NUM_NEGATIVES
    add cross_sample_negatives CROSS_SAMPLE_NEGATIVES
    add codebook_negatives CODEBOOK_NEGATIVES
    add logit_temp LOGIT_TEMP
    add_list latent_temp LATENT_TEMP
    add_list loss_weights LOSS_WEIGHTS
    add_switch enable_padding ENABLE_PADDING
    add join_short JOIN_SHORT
    add random_segment_sec RANDOM_SEGMENT_SEC
else
    # a run that goes on has its model already
    if [ -z "${RESUME_FROM:-}" ]; then add w2v_path PRETRAINED_MODEL; fi
    add freeze_finetune_updates FREEZE_FINETUNE_UPDATES
    add final_dropout FINAL_DROPOUT
    add blank_weight BLANK_WEIGHT
    if [ -n "${BLANK_WEIGHT:-}" ]; then add blank_mode BLANK_MODE; fi
fi

run_program "$python" train.py "$mode" ${OPTIONS[@]+"${OPTIONS[@]}"} "$@"
