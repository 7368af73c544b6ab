#!/bin/bash
# Corpus -> sentence shards: `data-prep shard` by the tasks of an array job, then `data-prep verify`.
#
# Each task makes its own share of the units, and the last to finish merges and verifies. Any number of tasks gives
# the same bytes. Tasks may start late, be requeued or die: the first task submits the array again, to start when all
# tasks have ended, and that makes what is missing. --deduplicate needs two rounds (hashes, then shards). The task
# that finishes the set cancels the next round. OUTPUT must be on a disk that all nodes see.
#
# Set:   INPUT          files, folders or URLs of text (docs/inputs.md), separated by spaces
#        OUTPUT         folder for the shard set
#        TOKENIZER      folder of the tokenizer
#        SEGMENTER      clause (default) or sentence
#        TEXT_LANGUAGE  en, zh, other or auto (default)
#        RELAUNCHES     rounds after the first one (default 3)
#        SBATCH_FLAGS   words for sbatch in these rounds (they keep array, CPUs, partition, account and time limit)
#        and what slurm/common.sh lists (SITE, CONTAINER, ...)
# Further arguments go to `data-prep shard`.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   INPUT=/data/WanJuan1.0/nlp/EN OUTPUT=/data/shards/en TOKENIZER=/data/opt-tokenizer \
#     sbatch --array=0-15 --cpus-per-task=64 slurm/prepare_data.sh
#SBATCH --job-name=sllm-data
#SBATCH --output=logs/%x-%A-%a.log
#SBATCH --open-mode=append
# A task that is preempted or whose node fails restarts and does the rest of its share.
#SBATCH --requeue
# A range: task N of M makes every Mth unit.
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
set -euo pipefail
: "${INPUT:?set INPUT, OUTPUT and TOKENIZER; see the top of slurm/prepare_data.sh}" "${OUTPUT:?}" "${TOKENIZER:?}"
cd "$SLURM_SUBMIT_DIR"
source slurm/common.sh # relative to the project, because Slurm runs a copy of this file elsewhere
begin

read -ra inputs <<<"$INPUT"
first=$((SLURM_ARRAY_TASK_ID == SLURM_ARRAY_TASK_MIN))
next="$logs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID.next" # the ID of the next round
if ((first && restarts == 0 && ${RELAUNCHES:=3} > 0)); then
  read -ra flags <<<"${SBATCH_FLAGS:-}"
  if [ -n "${SLURM_JOB_ACCOUNT:-}" ]; then flags=(--account="$SLURM_JOB_ACCOUNT" "${flags[@]}"); fi
  RELAUNCHES=$((RELAUNCHES - 1)) sbatch --parsable --dependency="afterany:$SLURM_ARRAY_JOB_ID" \
    --array="$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX:$SLURM_ARRAY_TASK_STEP" \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --partition="$SLURM_JOB_PARTITION" \
    --time="$(squeue --noheader --job="$SLURM_JOB_ID" --format=%l)" \
    "${flags[@]}" slurm/prepare_data.sh "$@" >"$next" || echo "no next round: submit this job again if a task is killed"
fi

# --workers is Slurm's number of CPUs.
status=0
said=$(run "${container[@]}" data-prep shard --backend slurm --input "${inputs[@]}" --output "$OUTPUT" \
  --tokenizer "$TOKENIZER" --segmenter "${SEGMENTER:-clause}" --lang "${TEXT_LANGUAGE:-auto}" "$@") || status=$?
echo "$said"
if ((status == 75)); then exit 0; fi # this share is done, others are not
if ((status == 3)); then # the set is made: a chain of jobs continues (--strict refuses damaged input)
  echo "some of the input is damaged or lost, see above"
  status=0
fi
# 0: the set is complete. 2: wrong input or settings, which another round would meet again.
if ((status == 0 || status == 2)) && [ -s "$next" ]; then scancel "$(cat "$next")"; fi
if ((status == 0)) && { ((first)) || [[ $said != *"already there"* ]]; }; then
  run "${container[@]}" data-prep verify "$OUTPUT" || status=$?
fi
exit "$status"
