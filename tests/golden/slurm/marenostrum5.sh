#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --cpus-per-task=20
#SBATCH --exclude=BAD1,BAD2
#SBATCH --exclusive
#SBATCH --gres=gpu:4
#SBATCH --job-name=huginn-1b
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --partition=acc
#SBATCH --qos=acc_ehpc
#SBATCH --signal=USR2@600
#SBATCH --time=4320

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
module load singularity || { echo 'rookery: a module cannot be loaded' >&2; exit 1; }
# NCCL's bootstrap goes over InfiniBand (OpenEuroLLM oellm-autoexp, config/slurm/marenostrum.yaml, 2026-08)
export NCCL_SOCKET_IFNAME="ib0,ib1,ib2,ib3"
# the four InfiniBand adapters that serve the GPUs (OpenEuroLLM oellm-autoexp, config/slurm/marenostrum.yaml, 2026-08)
export NCCL_IB_HCA="mlx5_0,mlx5_1,mlx5_4,mlx5_5"
# the profile's source runs without NVLink's in-switch reductions (OpenEuroLLM oellm-autoexp, config/slurm/marenostrum.yaml, 2026-08)
export NCCL_NVLS_ENABLE="0"
# compute nodes have no internet; libraries would wait for it (Hugging Face Hub documentation (environment variables), 2026)
export HF_HUB_OFFLINE="1"
# as HF_HUB_OFFLINE (OpenEuroLLM oellm-autoexp, config/slurm/marenostrum.yaml, 2026-08)
export WANDB_MODE="offline"
# NCCL ends if InfiniBand is not there, instead of falling back to slow sockets (OpenEuroLLM oellm-autoexp, config/slurm/marenostrum.yaml, 2026-08)
export NCCL_NET="IB"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="20"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=16 --ntasks-per-node=4 --cpus-per-task=20 --cpu-bind=none --gpu-bind=none --mpi=none --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
