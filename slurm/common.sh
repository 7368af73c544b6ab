# What train_vae.sh and train_sllm.sh have in common; not submitted itself. They set CONFIG and source it with
# their arguments: one srun of pipeline/train.py, one task per GPU; a run that was stopped and saved is requeued.
# shellcheck shell=bash
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

# Rank, world size and local rank are read from SLURM_* in Python; the meeting point is the first node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"

status=0
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python pipeline/train.py --config "$CONFIG" \
  --deepspeed_config "${DS_CONFIG:-ds_configs/zero2.json}" "$@" || status=$?

# 75: told to stop, and saved. The requeued job runs this script again, and training goes on from there.
if [ "$status" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
