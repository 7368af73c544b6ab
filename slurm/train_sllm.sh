#!/bin/bash
# Train an SLLM (needs a trained SentenceVAE and a backbone): one srun of pipeline/train.py, one task per GPU.
#
# Set:   CONFIG      recipe (default: pipeline/recipes/sllm-125m-h1.yaml)
#        DS_CONFIG   DeepSpeed configuration (default: ds_configs/zero2.json)
#        VENV        folder of the Python environment (default: .venv of the folder you submit from)
# Further arguments override recipe keys. One task per GPU: pass --nodes, --ntasks-per-node and --gpus-per-node
# that fit your cluster. 90 s before its time is up the job is told (USR1), saves and requeues itself.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_sllm.sh \
#     --data.shards /data/shards/en --output_dir /data/runs/sllm-125m-h1 \
#     --model.vae.path /data/models/svae-768-h1 --model.backbone.path /data/models/opt-125m
#SBATCH --job-name=sllm
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@90
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
CONFIG="${CONFIG:-pipeline/recipes/sllm-125m-h1.yaml}"
source slurm/common.sh # by its place in the project: Slurm runs a copy of this file from a folder of its own
