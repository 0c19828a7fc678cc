#!/bin/bash

# Parameters
#SBATCH --account=ACCOUNT
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --exclude=BAD1,BAD2
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=huginn-1b
#SBATCH --mem=480G
#SBATCH --no-kill
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --partition=standard-g
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=2880

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
module use /appl/local/laifs/modules
module load lumi-aif-singularity-bindings || { echo 'rookery: a module cannot be loaded' >&2; exit 1; }
# RCCL's bootstrap goes over the Slingshot interfaces (OpenEuroLLM oellm-autoexp, config/slurm/lumi.yaml, 2026-08)
export NCCL_SOCKET_IFNAME="hsn0,hsn1,hsn2,hsn3"
# needed for RDMA between GPUs of different nodes (OpenEuroLLM oellm-autoexp, config/slurm/lumi.yaml, 2026-08)
export NCCL_NET_GDR_LEVEL="PHB"
# prevents hangs of the AI Factory's containers (LUMI AI guide, pull request 118, 2026-09)
export FI_MR_CACHE_MONITOR="userfaultfd"
# copies between devices by kernels instead of the DMA engines (OpenEuroLLM oellm-autoexp, config/slurm/lumi.yaml, 2026-08)
export HSA_ENABLE_SDMA="0"
# MIOpen's cache breaks on a shared file system (LUMI AI guide, 05-multi-gpu-and-node, 2026-05)
export MIOPEN_CUSTOM_CACHE_DIR="/tmp/$USER-miopen-$SLURM_JOB_ID/cache"
# as MIOPEN_CUSTOM_CACHE_DIR (LUMI AI guide, 05-multi-gpu-and-node, 2026-05)
export MIOPEN_USER_DB="/tmp/$USER-miopen-$SLURM_JOB_ID/config"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="7"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=32 --ntasks-per-node=8 --cpu-bind=mask_cpu:0x00fe000000000000,0xfe00000000000000,0x0000000000fe0000,0x00000000fe000000,0x00000000000000fe,0x000000000000fe00,0x000000fe00000000,0x0000fe0000000000 --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log singularity run /appl/local/laifs/containers/lumi-multitorch-u24r70f21m50t210-20260415_130625/lumi-multitorch-full-u24r70f21m50t210-20260415_130625.sif python -m rookery train /RUN/run.yaml
