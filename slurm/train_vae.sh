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
# with a range (--nodes=6-8) the job restarts on fewer nodes when one has died. For one task a node leave
# --ntasks-per-node out: with 1, Slurm takes the lower end of a range.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   SHARDS=/data/shards/en OUTPUT_DIR=/data/runs/svae-768-h1 \
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_vae.sh
# Add --test-only to see when it could start, --exclude=node17 to keep away from a node.
#SBATCH --job-name=svae
# By name and number; a restarted job goes on in the same file.
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
# Start again after preemption and after the death of a node.
#SBATCH --requeue
# Two minutes before time is up, and when preempted: save. Longer than a checkpoint takes.
#SBATCH --signal=USR1@120
# A neighbour on the node costs more than it saves: memory, network and cores are all in use.
#SBATCH --exclusive
#SBATCH --nodes=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/common.sh # by its place in the project: Slurm runs a copy of this file from a folder of its own
CONFIG="${CONFIG:-pipeline/recipes/svae-768-h1.yaml}"
begin
stage
preflight
train "$@"
