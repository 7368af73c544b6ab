# Shared by the templates: settings, launching, preflight, requeueing. Sourced, never submitted.
# shellcheck shell=bash
#
# Settings of all templates, from the environment or the site file (slurm/site.example.sh):
#   SITE          file to source first: modules, virtual environment, network interface of this cluster
#   VENV          folder of the Python environment (default: .venv of the folder you submit from)
#   CONTAINER     words before every program: "apptainer exec --nv IMAGE", or Pyxis' "--container-image=IMAGE ..."
#   SRUN_FLAGS    further words for every srun
#   STAGE         node-local folder that shards are copied to before training (default: no copy)
#   MAX_RESTARTS  starts after the first one before a job gives up (default 100)
#   DOCTOR        "no" skips the preflight; else further words for `sllm doctor`
#   LOGS          folder of the logs of each node (default: logs)

set +u # modules and many profiles use variables that may not be set
# shellcheck source=/dev/null # the user's own file
if [ -n "${SITE:-}" ]; then source "$SITE"; fi
set -u
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
export PYTHONUNBUFFERED=1 # so that a killed process does not lose its last lines
logs="${LOGS:-logs}"
restarts="${SLURM_RESTART_COUNT:-0}"

# Rendezvous on the first node. The port depends on the job ID, so that two jobs on one node do not collide. Python
# maps SLURM_PROCID and the like to ranks (pipeline/parallel/ranks.py).
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
# One OpenMP thread per core of a task: torch's default is every core of the node.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

# NCCL: print errors; end the process when a collective fails or hangs, so that the job restarts instead of wasting
# its time; keep the last collectives of each rank, to debug a hang.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

srun_words=(
  --kill-on-bad-exit=1                  # one dead rank ends the step; the others would wait for ever
  --cpus-per-task="$SLURM_CPUS_PER_TASK" # since Slurm 22.05 a step does not inherit it, and would get one core
  --cpu-bind=cores                      # a task stays on its cores, near its memory
  # No --gpu-bind: a task uses the GPU of its local ID, and NCCL needs to see the other GPUs of the node.
  --distribution=block                  # consecutive ranks per node: rings and ZeRO's groups stay inside
)
read -ra more_srun_words <<<"${SRUN_FLAGS:-}"
# Pyxis' words are options of srun, Apptainer's the program that srun starts: both come right before ours.
read -ra container <<<"${CONTAINER:-}"

# One task per GPU, as the job asked for.
run() { srun "${srun_words[@]}" "${more_srun_words[@]}" "$@"; }

begin() {
  echo "$SLURM_JOB_NAME $SLURM_JOB_ID: start $((restarts + 1)) (SLURM_RESTART_COUNT=$restarts) on $SLURM_JOB_NODELIST, $(date)"
  # A job that can never succeed must not be requeued for ever.
  if ((restarts > ${MAX_RESTARTS:-100})); then
    echo "$SLURM_JOB_NAME $SLURM_JOB_ID: given up after $restarts restarts (MAX_RESTARTS)"
    exit 1
  fi
  mkdir -p "$logs"
}

# A step before training failed with this status. 75: stopped by a signal; 138: killed by USR1 before it had a handler.
failed() {
  if [[ $1 == 75 || $1 == 138 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$1"
}

# Copies the shards to each node's disk (checked by the manifest's sha256): one read per node of the shared file system.
stage() {
  read -ra shards <<<"${SHARDS:-}"
  if [ -z "${STAGE:-}" ] || [ ${#shards[@]} = 0 ]; then return; fi
  local staged
  staged=$(run --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${container[@]}" \
    data-prep stage "${shards[@]}" --to "$STAGE") || failed $?
  mapfile -t shards <<<"$staged"
}

# Checks every task of the job and names a bad node: seconds, where a bad node would cost minutes.
preflight() {
  if [ "${DOCTOR:-}" = no ]; then return; fi
  local words=() more
  if [ ${#shards[@]} -gt 0 ]; then words+=(--shards "${shards[@]}"); fi
  if [ -n "${OUTPUT_DIR:-}" ]; then words+=(--output_dir "$OUTPUT_DIR"); fi
  read -ra more <<<"${DOCTOR:-}"
  run "${container[@]}" sllm doctor "${words[@]}" "${more[@]}" || failed $?
}

# Trains to the end or to a signal. pipeline/train.py resumes from the latest good checkpoint, also with another number
# of ranks, and exits with 0 when the run is complete.
train() {
  local words=() status=0 strategy
  read -ra strategy <<<"${DS_CONFIG:-ds_configs/zero2.json}"
  if [ ${#shards[@]} -gt 0 ]; then words+=(--data.shards "${shards[@]}"); fi
  if [ -n "${VALIDATION:-}" ]; then words+=(--data.validation "$VALIDATION"); fi
  if [ -n "${OUTPUT_DIR:-}" ]; then words+=(--output_dir "$OUTPUT_DIR"); fi
  # Ignore TERM until train.py handles it. With a wrong recipe the first rank exits with 2 and srun terminates the others:
  # a rank killed while it starts would look like a broken machine, and the job would be requeued for ever.
  # shellcheck disable=SC2016 # "$@" is for the inner shell
  local deaf=(sh -c 'trap "" TERM; exec "$@"' sh)
  # One log per node, appended to by every start: hundreds of ranks would overwrite each other in a common one.
  run --output="$logs/%x-%j.%N.log" --open-mode=append "${container[@]}" \
    "${deaf[@]}" python pipeline/train.py --config "$CONFIG" --deepspeed_config "${strategy[@]}" \
    "${words[@]}" "$@" || status=$?
  echo "$SLURM_JOB_NAME $SLURM_JOB_ID: training ended with status $status; see $logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.*.log"
  # 75: stopped by a signal, and saved. 76: ranks hung. Above 128: a rank was killed (memory, a broken machine). Restart in each case.
  if [[ $status == 7[56] || $status -gt 128 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$status"
}
