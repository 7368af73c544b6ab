# Settings of one cluster. Copy it, fill it in, and use it in two ways:
#
#   source my-site.sh; sbatch slurm/train_sllm.sh    sbatch reads the SBATCH_ variables, which set its flags
#   SITE=$PWD/my-site.sh (exported below)            the jobs source it again on the nodes: modules, network
#
# shellcheck shell=bash
SITE="$(realpath "${BASH_SOURCE[0]}")"
export SITE

# sbatch's variables for --partition, --account, --qos.
export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=long

# Software: modules, if the environment needs them, and the folder of the virtual environment.
# module load cuda/12.8
export VENV=/shared/sllm/.venv

# A container instead. Apptainer: the words before the program. Pyxis: options of srun.
# export CONTAINER="apptainer exec --nv --bind /data /images/sllm.sif"
# export CONTAINER="--container-image=/images/sllm.sqsh --container-mounts=/data,$PWD --container-workdir=$PWD"

# The interface between the nodes (`ip -brief address` shows them), when NCCL or gloo choose a wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A fast disk of each node for the shards; Slurm or the site often makes one per job.
# export STAGE="${TMPDIR:-/tmp}/sllm-shards"
