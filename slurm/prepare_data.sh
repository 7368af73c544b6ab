#!/bin/bash
# Corpus -> sentence shards: `data-prep shard` by the tasks of an array job, then `data-prep verify` by the first.
#
# The tasks share the work through the output folder: a free task takes the next piece, the last to finish writes
# the manifest. Any number of tasks gives the same bytes. Tasks may start late, be requeued or die; submit the job
# again to resume it. OUTPUT must be on a disk that all nodes see.
#
# Set:   INPUT          files, folders or URLs of text (docs/inputs.md), separated by spaces
#        OUTPUT         folder for the shard set
#        TOKENIZER      folder of the tokenizer
#        SEGMENTER      clause (default) or sentence
#        TEXT_LANGUAGE  en, zh, other or auto (default)
#        and what slurm/common.sh lists (SITE, CONTAINER, ...)
# Further arguments go to `data-prep shard`.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   INPUT=/data/WanJuan1.0/nlp/EN OUTPUT=/data/shards/en TOKENIZER=/data/opt-tokenizer \
#     sbatch --array=0-15 --cpus-per-task=64 slurm/prepare_data.sh
#SBATCH --job-name=sllm-data
#SBATCH --output=logs/%x-%A-%a.log
#SBATCH --open-mode=append
# A task that is preempted or whose node fails restarts and takes the next free piece.
#SBATCH --requeue
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
# Every task waits until all work is done; --workers is Slurm's number of CPUs.
run "${container[@]}" data-prep shard --backend slurm --input "${inputs[@]}" --output "$OUTPUT" \
  --tokenizer "$TOKENIZER" --segmenter "${SEGMENTER:-clause}" --lang "${TEXT_LANGUAGE:-auto}" "$@"
if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ]; then
  run "${container[@]}" data-prep verify "$OUTPUT"
fi
