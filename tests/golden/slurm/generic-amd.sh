#!/bin/bash

# Parameters
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --cpus-per-task=7
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gpus-per-node=8
#SBATCH --job-name=huginn-1b
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/RUN/jobs/%j_0_log.out
#SBATCH --signal=USR2@300
#SBATCH --time=120

# setup
# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets
ulimit -c 0
ulimit -n "$(ulimit -Hn)"
# the shell outlives SIGTERM: the link decides what follows from it
trap : TERM
# lets a device's peers address its memory (HPE shs-ccl-docs, RCCL tuning guide, 2026-04)
export HSA_FORCE_FINE_GRAIN_PCIE="1"
# MIOpen's database on a shared file system gives disk I/O errors (OLCF PyTorch guide (example batch script), 2026-07)
export MIOPEN_USER_DB_PATH="/tmp/$USER-miopen-$SLURM_JOB_ID"
# as MIOPEN_USER_DB_PATH (OLCF PyTorch guide (example batch script), 2026-07)
export MIOPEN_CUSTOM_CACHE_DIR="/tmp/$USER-miopen-$SLURM_JOB_ID"
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="7"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=32 --ntasks-per-node=8 --cpus-per-task=7 --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
