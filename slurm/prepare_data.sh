#!/bin/bash
# Corpus -> sentence shards: `data-prep shard` by the tasks of an array job, then `data-prep verify` by the first.
#
# The tasks share the work through the output folder: whoever is free takes the next piece, the last to finish
# writes the manifest. Any number of tasks gives the same bytes; tasks may start late, be requeued or die, and a
# job submitted again goes on where it was. OUTPUT must lie on a disk that all nodes see.
#
# Set:   INPUT          files, folders or URLs of text (docs/inputs.md), separated by spaces
#        OUTPUT         folder for the shard set
#        TOKENIZER      folder of the tokenizer
#        SEGMENTER      clause (default) or sentence
#        TEXT_LANGUAGE  en, zh, other or auto (default)
#        VENV           folder of the Python environment (default: .venv of the folder you submit from)
# Further arguments go to `data-prep shard`.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   INPUT=/data/WanJuan1.0/nlp/EN OUTPUT=/data/shards/en TOKENIZER=/data/opt-tokenizer \
#     sbatch --array=0-15 --cpus-per-task=64 slurm/prepare_data.sh
#SBATCH --job-name=sllm-data
#SBATCH --output=logs/%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
set -euo pipefail
: "${INPUT:?set INPUT, OUTPUT and TOKENIZER; see the top of slurm/prepare_data.sh}" "${OUTPUT:?}" "${TOKENIZER:?}"
cd "$SLURM_SUBMIT_DIR"
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

read -ra inputs <<<"$INPUT"
# Every task leaves only when all of the work is done; --workers is Slurm's own number of CPUs.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  data-prep shard --backend slurm --input "${inputs[@]}" --output "$OUTPUT" --tokenizer "$TOKENIZER" \
  --segmenter "${SEGMENTER:-clause}" --lang "${TEXT_LANGUAGE:-auto}" "$@"
if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ]; then
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" data-prep verify "$OUTPUT"
fi
