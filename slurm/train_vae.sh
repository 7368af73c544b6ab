#!/bin/bash
# Train a SentenceVAE: one srun of pipeline/train.py, one task per GPU.
#
# Set:   CONFIG      recipe (default: pipeline/recipes/svae-768-h1.yaml)
#        DS_CONFIG   DeepSpeed configuration (default: ds_configs/zero2.json)
#        VENV        folder of the Python environment (default: .venv of the folder you submit from)
# Further arguments override recipe keys. One task per GPU: pass --nodes, --ntasks-per-node and --gpus-per-node
# that fit your cluster. 90 s before its time is up the job is told (USR1), saves and requeues itself.
#
# Example, from the project's folder (`mkdir -p logs` first: Slurm does not make the log folder):
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_vae.sh \
#     --data.shards /data/shards/en --output_dir /data/runs/svae-768-h1
#SBATCH --job-name=svae
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
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

# Rank, world size and local rank are read from SLURM_* in Python; the meeting point is the first node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"

status=0
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python pipeline/train.py --config "${CONFIG:-pipeline/recipes/svae-768-h1.yaml}" \
  --deepspeed_config "${DS_CONFIG:-ds_configs/zero2.json}" "$@" || status=$?

# 75: told to stop, and saved. The requeued job runs this script again, and training goes on from there.
if [ "$status" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
