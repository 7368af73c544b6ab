#!/bin/bash
# From text to an evaluated SLLM: submits all jobs at once and returns. Run it on the login node, not by sbatch.
#
#   shards and their verification (array) -> SentenceVAE -> export, evaluation -> SLLM -> export, evaluation
#
# Each job waits for the success of the one before it; if one fails, the jobs after it are cancelled. Submit again to
# resume the chain: finished shards and runs exit at once.
#
# Set:   WORK             folder for everything that is made: shards/, runs/, models/; all nodes see it
#        INPUT            text to train on, as in prepare_data.sh; VALID_INPUT: text to evaluate on
#        TOKENIZER        folder of the tokenizer (SEGMENTER, TEXT_LANGUAGE: as in prepare_data.sh)
#        VAE_CONFIG       recipes (defaults: svae-768-h1 and sllm-125m-h1)
#        SLLM_CONFIG
#        DATA_FLAGS       words for sbatch (--array, --cpus-per-task, --nodes, --gpus-per-node, --time, ...), of each kind
#        VAE_FLAGS        of job; SBATCH_FLAGS: for all of them, such as --exclude=node17
#        SLLM_FLAGS
#        EVALUATE_FLAGS
#        DATA_ARGUMENTS   further words for `data-prep shard` and for the two trainings (--training.max_tokens 1e9, ...)
#        VAE_ARGUMENTS
#        SLLM_ARGUMENTS
#        DRY_RUN          1: submit nothing, ask Slurm whether and when each job could start (--test-only)
#        and what slurm/common.sh lists (SITE, CONTAINER, STAGE, DOCTOR, ...)
#
# Example, from the project's folder:
#   WORK=/data/sllm INPUT=/data/text/train VALID_INPUT=/data/text/valid TOKENIZER=/data/opt-tokenizer \
#     VAE_FLAGS="--nodes=2 --ntasks-per-node=8 --gpus-per-node=8" \
#     SLLM_FLAGS="--nodes=7-8 --ntasks-per-node=8 --gpus-per-node=8" slurm/run_all.sh
set -euo pipefail
: "${WORK:?set WORK, INPUT, VALID_INPUT and TOKENIZER; see the top of slurm/run_all.sh}"
: "${INPUT:?}" "${VALID_INPUT:?}" "${TOKENIZER:?}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
set +u # modules and many profiles use variables that may not be set
# shellcheck source=/dev/null # the user's own file
if [ -n "${SITE:-}" ]; then source "$SITE"; fi
set -u
mkdir -p "${LOGS:-logs}" "$WORK"

# submit "JOBS TO WAIT FOR" "FLAGS" SCRIPT ARGUMENT...: prints the job's number.
submit() {
  local flags after="${1// /:}"
  read -ra flags <<<"${SBATCH_FLAGS:-} $2"
  if [ -n "${DRY_RUN:-}" ]; then
    sbatch --test-only "${flags[@]}" "${@:3}" >&2
    return
  fi
  # Without kill-on-invalid-dep a job would wait in the queue for ever after a failed dependency.
  if [ -n "$after" ]; then flags+=(--dependency="${AFTER:-afterok}:$after" --kill-on-invalid-dep=yes); fi
  sbatch --parsable "${flags[@]}" "${@:3}"
}

# prepare TEXT FOLDER "FLAGS": two rounds of the array, then one task for what killed tasks have left. Only that one has
# to succeed. Prints its number.
prepare() {
  local job=""
  for last in "" "" --array=0; do
    job=$(AFTER=afterany RELAUNCHES=0 INPUT="$1" OUTPUT="$2" \
      submit "$job" "${DATA_FLAGS:-} $3 $last" slurm/prepare_data.sh "${data_words[@]}")
    if [ -n "${DRY_RUN:-}" ]; then return; fi
  done
  echo "$job"
}

train_set="$WORK/shards/train" valid_set="$WORK/shards/valid"
read -ra data_words <<<"${DATA_ARGUMENTS:-}"
read -ra vae_words <<<"${VAE_ARGUMENTS:-}"
read -ra sllm_words <<<"${SLLM_ARGUMENTS:-}"

data=$(prepare "$INPUT" "$train_set" "")
valid=$(prepare "$VALID_INPUT" "$valid_set" --array=0)

export SHARDS="$train_set" VALIDATION="$valid_set" DATA="$valid_set"
vae=$(CONFIG="${VAE_CONFIG:-}" OUTPUT_DIR="$WORK/runs/vae" \
  submit "${data:+$data $valid}" "${VAE_FLAGS:-}" slurm/train_vae.sh "${vae_words[@]}")
vae_model=$(RUN="$WORK/runs/vae" MODEL="$WORK/models/vae" submit "$vae" "${EVALUATE_FLAGS:-}" slurm/evaluate.sh)
sllm=$(CONFIG="${SLLM_CONFIG:-}" OUTPUT_DIR="$WORK/runs/sllm" submit "$vae_model" "${SLLM_FLAGS:-}" slurm/train_sllm.sh \
  --model.vae.path "$WORK/models/vae" "${sllm_words[@]}")
sllm_model=$(RUN="$WORK/runs/sllm" MODEL="$WORK/models/sllm" submit "$sllm" "${EVALUATE_FLAGS:-}" slurm/evaluate.sh)

echo "shards $data $valid, SentenceVAE $vae, its export $vae_model, SLLM $sllm, its export $sllm_model"
