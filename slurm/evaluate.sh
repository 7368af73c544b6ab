#!/bin/bash
# A finished run -> a model folder, and its figures on a shard set: `sllm export`, then `sllm evaluate`. One node, one task.
#
# Set:   RUN        run directory of a training
#        MODEL      folder for the model (an older export there is replaced)
#        DATA       shard folder to evaluate on (default: export only)
#        and what slurm/common.sh lists (SITE, CONTAINER, ...)
# Further arguments go to `sllm evaluate`. The figures are printed and kept in RUN/results/evaluation.json.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   RUN=/data/runs/sllm-125m-h1 MODEL=/data/models/sllm-125m-h1 DATA=/data/shards/test \
#     sbatch --gpus-per-node=1 slurm/evaluate.sh
#SBATCH --job-name=sllm-evaluate
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
# A restart begins from scratch: exports and results appear whole or not at all.
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
set -euo pipefail
: "${RUN:?set RUN and MODEL; see the top of slurm/evaluate.sh}" "${MODEL:?}"
cd "$SLURM_SUBMIT_DIR"
source slurm/common.sh # relative to the project, because Slurm runs a copy of this file elsewhere
begin

run "${container[@]}" sllm export "$RUN" --output "$MODEL"
if [ -n "${DATA:-}" ]; then
  mkdir -p "$RUN/results"
  run "${container[@]}" sllm evaluate --model "$MODEL" --data "$DATA" --json "$@" >"$RUN/results/.evaluation"
  mv "$RUN/results/.evaluation" "$RUN/results/evaluation.json"
  cat "$RUN/results/evaluation.json"
fi
