#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --cpus-per-task=8
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gres=gpu:4
#SBATCH --job-name=huginn-1b
#SBATCH --mem=494000
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --partition=boost_usr_prod
#SBATCH --signal=USR2@600
#SBATCH --time=1440

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
# kernels of communication and computation start in the order in which they were given (OpenEuroLLM oellm-autoexp, config/slurm/leonardo.yaml, 2026-08)
export CUDA_DEVICE_MAX_CONNECTIONS="1"
# less fragmentation of device memory when depths vary from step to step (OpenEuroLLM oellm-autoexp, config/slurm/leonardo.yaml, 2026-08)
export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
# a busy InfiniBand fabric is slow to answer; the default gives up too early (OpenEuroLLM oellm-autoexp, config/slurm/leonardo.yaml, 2026-08)
export NCCL_IB_TIMEOUT="120"
# compute nodes have no internet; libraries would wait for it (Hugging Face Hub documentation (environment variables), 2026)
export HF_HUB_OFFLINE="1"
# as HF_HUB_OFFLINE (OpenEuroLLM oellm-autoexp, config/slurm/base.yaml, 2026-08)
export WANDB_MODE="offline"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="8"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=16 --ntasks-per-node=4 --cpus-per-task=8 --threads-per-core=1 --mpi=none --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
