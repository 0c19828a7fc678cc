#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --cpus-per-task=72
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gres=gpu:4
#SBATCH --job-name=huginn-1b
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --partition=booster
#SBATCH --signal=USR2@600
#SBATCH --time=720

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
# NCCL's bootstrap goes over InfiniBand (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_SOCKET_IFNAME="ib0"
# the four InfiniBand adapters that serve the GPUs (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_IB_HCA="mlx5_0,mlx5_1,mlx5_2,mlx5_3"
# a busy InfiniBand fabric is slow to answer; the default gives up too early (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_IB_TIMEOUT="18"
# as NCCL_IB_TIMEOUT (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_IB_RETRY_CNT="20"
# GPU Direct RDMA up to the PCIe switch that GPU and adapter share (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_NET_GDR_LEVEL="2"
# GPU Direct RDMA for sending too (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_NET_GDR_READ="1"
# the protocol that this profile's source runs with (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export NCCL_PROTO="Simple"
# less fragmentation of device memory when depths vary from step to step (OpenEuroLLM oellm-autoexp, config/slurm/jupiter.yaml, 2026-08)
export PYTORCH_ALLOC_CONF="expandable_segments:True"
# compute nodes have no internet; libraries would wait for it (Hugging Face Hub documentation (environment variables), 2026)
export HF_HUB_OFFLINE="1"
# as HF_HUB_OFFLINE (OpenEuroLLM oellm-autoexp, config/container/jupiter.yaml, 2026-08)
export WANDB_MODE="offline"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="72"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=16 --ntasks-per-node=4 --cpus-per-task=72 --threads-per-core=1 --gpu-bind=none --mpi=none --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
