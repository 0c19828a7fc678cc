#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT_g
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --constraint=gpu
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gpus-per-node=4
#SBATCH --job-name=huginn-1b
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --qos=regular
#SBATCH --signal=USR2@600
#SBATCH --time=2880

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
module load pytorch nccl || { echo 'rookery: a module cannot be loaded' >&2; exit 1; }
# GPU-aware MPI beside NCCL can deadlock; MPI carries control messages only (CSCS NCCL guide (GPU-aware MPI with NCCL), 2026-08)
export MPICH_GPU_SUPPORT_ENABLED="0"
# needed for RDMA between GPUs of different nodes (HPE shs-ccl-docs, NCCL tuning guide, 2026-04)
export NCCL_NET_GDR_LEVEL="PHB"
# rings may go out by another NIC than they came in by, which is faster on large systems (HPE shs-ccl-docs, NCCL tuning guide, 2026-04)
export NCCL_CROSS_NIC="1"
# NCCL's bootstrap goes over the Slingshot interfaces, hsn0 to hsn3 (HPE shs-ccl-docs, NCCL tuning guide, 2026-04)
export NCCL_SOCKET_IFNAME="hsn"
# libfabric makes no allocation calls that may deadlock (HPE shs-ccl-docs, NCCL tuning guide, 2026-04)
export FI_CXI_DISABLE_HOST_REGISTER="1"
# notices memory that moved without hooks into the allocator, which can deadlock (HPE shs-ccl-docs, NCCL tuning guide, 2026-04)
export FI_MR_CACHE_MONITOR="userfaultfd"
# the default completion queues overflow in large jobs (HPE shs-ccl-docs, NCCL tuning guide, 2026-04)
export FI_CXI_DEFAULT_CQ_SIZE="131072"
# libfabric copies device memory below this size itself (swiss-ai/pretrain-code (Apertus, 1,024 nodes), 2025-09)
export FI_CXI_SAFE_DEVMEM_COPY_THRESHOLD="16777216"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="32"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=16 --ntasks-per-node=4 --gpu-bind=none --cpu-bind=mask_cpu:0xffff000000000000ffff000000000000,0x0000ffff000000000000ffff00000000,0x00000000ffff000000000000ffff0000,0x000000000000ffff000000000000ffff --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
