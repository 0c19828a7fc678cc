#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --constraint=nvme
#SBATCH --cpus-per-task=7
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gpus-per-node=8
#SBATCH --job-name=huginn-1b
#SBATCH --network=disable_rdzv_get
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --partition=batch
#SBATCH --signal=USR2@600
#SBATCH --time=120

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
module load PrgEnv-gnu/8.7.0 cpe/26.03 miniforge3/23.11.0-0 rocm/7.1.1 rccl-net-plugin craype-accel-amd-gfx90a || { echo 'rookery: a module cannot be loaded' >&2; exit 1; }
export LD_LIBRARY_PATH=$CRAY_LD_LIBRARY_PATH:$LD_LIBRARY_PATH
# rings may go out by another NIC than they came in by, which is faster on large systems (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export NCCL_CROSS_NIC="1"
# needed for RDMA between GPUs of different nodes (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export NCCL_NET_GDR_LEVEL="PHB"
# RCCL's bootstrap goes over the Slingshot interfaces (OLCF PyTorch guide (master address and sockets), 2026-07)
export NCCL_SOCKET_IFNAME="hsn0,hsn1,hsn2,hsn3"
# lets a device's peers address its memory (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export HSA_FORCE_FINE_GRAIN_PCIE="1"
# the safe cache monitor of this kernel; memhooks can deadlock with the plugin (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_MR_CACHE_MONITOR="kdreg2"
# libfabric makes no allocation calls into ROCm, in which RCCL may deadlock (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_DISABLE_HOST_REGISTER="1"
# the default completion queues overflow in large jobs (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_DEFAULT_CQ_SIZE="131072"
# large jobs rely on unexpected rendezvous messages (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_DEFAULT_TX_SIZE="2048"
# rendezvous protocol that serves RCCL better at scale; MPI may get slower, and carries little here (OLCF PyTorch guide (alternative rendezvous protocol), 2026-07)
export FI_CXI_RDZV_PROTO="alt_read"
# no data is sent before its receiver is ready (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_RDZV_EAGER_SIZE="0"
# all messages take the rendezvous path (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_RDZV_THRESHOLD="0"
# belongs to alt_read, without the get optimization (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_RDZV_GET_MIN="0"
# matching moves to software when the NIC's resources are exhausted, instead of failing (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07; HPE shs-ccl-docs, 2026-04)
export FI_CXI_RX_MATCH_MODE="hybrid"
# GPU-aware MPI beside the collective library can deadlock; MPI carries control messages only (CSCS NCCL guide (GPU-aware MPI with NCCL), 2026-08)
export MPICH_GPU_SUPPORT_ENABLED="0"
# RCCL ends if the plugin is not there, instead of falling back to slow sockets (OLCF PyTorch guide (manual RCCL plugin configuration), 2026-07)
export NCCL_NET="OFI"
# MIOpen's database on a shared file system gives disk I/O errors (OLCF PyTorch guide (example batch script), 2026-07)
export MIOPEN_USER_DB_PATH="/tmp/$USER-miopen-$SLURM_JOB_ID"
# as MIOPEN_USER_DB_PATH (OLCF PyTorch guide (example batch script), 2026-07)
export MIOPEN_CUSTOM_CACHE_DIR="/tmp/$USER-miopen-$SLURM_JOB_ID"
# compiled kernels lie there in a folder of each rank; ranks race for caches that they share (pytorch/pytorch issue 134384; OLCF Frontier user guide (NVMe usage), 2026-07)
export TMPDIR="/mnt/bb/$USER"
# locks of extensions in the home directory make ranks of other jobs wait (OLCF PyTorch guide (environment location), 2026-07)
export TORCH_EXTENSIONS_DIR="/mnt/bb/$USER/torch-extensions"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="7"
# the compute nodes reach the network through the site's proxy alone
export http_proxy="http://proxy.ccs.ornl.gov:3128/"
export https_proxy="http://proxy.ccs.ornl.gov:3128/"
export no_proxy=localhost,127.0.0.1
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=32 --ntasks-per-node=8 --cpus-per-task=7 --gpus-per-node=8 --gpus-per-task=1 --gpu-bind=closest --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
