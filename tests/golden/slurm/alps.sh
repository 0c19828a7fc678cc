#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --constraint='thp_never&nvidia_vboost_enabled'
#SBATCH --cpus-per-task=72
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gpus-per-node=4
#SBATCH --job-name=huginn-1b
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --partition=normal
#SBATCH --signal=USR2@600
#SBATCH --time=720

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
# GPU Direct RDMA where GPU and NIC are in the same NUMA node (CSCS NCCL guide (environment variables), 2026-08)
export NCCL_NET_GDR_LEVEL="PHB"
# rings may go out by another NIC than they came in by, which is faster on large systems (CSCS NCCL guide (environment variables), 2026-08)
export NCCL_CROSS_NIC="1"
# the protocol LL128, on by default since NCCL 2.27, is slower on Slingshot (CSCS NCCL guide (environment variables), 2026-08)
export NCCL_PROTO="^LL128"
# the default completion queues overflow in large jobs (CSCS NCCL guide (environment variables), 2026-08)
export FI_CXI_DEFAULT_CQ_SIZE="131072"
# fast over a wide range of applications here; Apertus ran 1,024 nodes with it (CSCS NCCL guide (environment variables), 2026-08)
export FI_CXI_DEFAULT_TX_SIZE="16384"
# libfabric makes no allocation calls that may deadlock (CSCS NCCL guide (environment variables), 2026-08)
export FI_CXI_DISABLE_HOST_REGISTER="1"
# matching does not depend on the NIC's limited resources (CSCS NCCL guide (environment variables), 2026-08)
export FI_CXI_RX_MATCH_MODE="software"
# notices memory that moved without hooks into the allocator, which can deadlock (CSCS NCCL guide (environment variables), 2026-08)
export FI_MR_CACHE_MONITOR="userfaultfd"
# GPU-aware MPI beside NCCL can deadlock, and some of Alps's clusters turn it on (CSCS NCCL guide (GPU-aware MPI with NCCL), 2026-08)
export MPICH_GPU_SUPPORT_ENABLED="0"
# kernels compiled at run time are not written to the distributed file system, which is slow (CSCS PyTorch guide, 2026-08)
export CUDA_CACHE_DISABLE="1"
# NCCL ends if the plugin is not there, instead of falling back to slow TCP (CSCS NCCL guide (environment variables), 2026-08)
export NCCL_NET="AWS Libfabric"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="72"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=16 --ntasks-per-node=4 --cpus-per-task=72 --mpi=pmix --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
