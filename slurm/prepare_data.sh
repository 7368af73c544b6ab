#!/bin/bash
# Corpus -> sentence shards, on one node with many workers: `data-prep shard`, then `data-prep verify`.
#
# Set:   INPUT          files or folders of WanJuan text (.jsonl, .jsonl.gz), separated by spaces
#        OUTPUT         folder for the shard set
#        TOKENIZER      folder of the tokenizer
#        SEGMENTER      clause (default) or sentence
#        TEXT_LANGUAGE  en, zh or auto (default)
#        VENV           folder of the Python environment (default: .venv of the folder you submit from)
# Further arguments go to `data-prep shard`. A killed job, submitted again, goes on where it was.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   INPUT=/data/WanJuan1.0/nlp/EN OUTPUT=/data/shards/en TOKENIZER=/data/opt-tokenizer \
#     sbatch --cpus-per-task=64 slurm/prepare_data.sh
#SBATCH --job-name=sllm-data
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
set -euo pipefail
: "${INPUT:?set INPUT, OUTPUT and TOKENIZER; see the top of slurm/prepare_data.sh}" "${OUTPUT:?}" "${TOKENIZER:?}"
cd "$SLURM_SUBMIT_DIR"
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

read -ra inputs <<<"$INPUT"
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  data-prep shard --input "${inputs[@]}" --output "$OUTPUT" --tokenizer "$TOKENIZER" \
  --segmenter "${SEGMENTER:-clause}" --lang "${TEXT_LANGUAGE:-auto}" --workers "$SLURM_CPUS_PER_TASK" "$@"
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" data-prep verify "$OUTPUT"
