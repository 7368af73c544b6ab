#!/bin/bash
# Train a SentenceVAE: preflight, then one srun of pipeline/train.py, one task per GPU.
#
# Set:   SHARDS      shard folders, separated by spaces
#        VALIDATION  shard folder for the evaluations of the run (optional)
#        OUTPUT_DIR  run directory, on a disk that all nodes see
#        CONFIG      recipe (default: pipeline/recipes/svae-768-h1.yaml)
#        DS_CONFIG   DeepSpeed configuration, or several (default: ds_configs/zero2.json)
#        and what slurm/common.sh lists (SITE, CONTAINER, STAGE, MAX_RESTARTS, DOCTOR, ...)
# Further arguments override recipe keys. Pass --nodes, --ntasks-per-node and --gpus-per-node that fit your cluster;
# with a range (--nodes=6-8) the job restarts on fewer nodes when one has died. For one task per node omit
# --ntasks-per-node: with 1, Slurm takes the lower end of a range.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   SHARDS=/data/shards/en OUTPUT_DIR=/data/runs/svae-768-h1 \
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_vae.sh
# Add --test-only to see when it could start, --exclude=node17 to avoid a node.
#SBATCH --job-name=svae
# By name and job ID; a restarted job appends to the same file.
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
# Restart after preemption and after a node failure.
#SBATCH --requeue
# Save two minutes before the time limit and on preemption; a checkpoint must take less than that.
#SBATCH --signal=USR1@120
# No other jobs on the node: memory, network and cores are all in use.
#SBATCH --exclusive
#SBATCH --nodes=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/common.sh # relative to the project, because Slurm runs a copy of this file elsewhere
CONFIG="${CONFIG:-pipeline/recipes/svae-768-h1.yaml}"
begin
stage
preflight
train "$@"
