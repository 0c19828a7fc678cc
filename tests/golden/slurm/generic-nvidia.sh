#!/bin/bash

# Parameters
#SBATCH --chdir=/RUN
#SBATCH --comment=/RUN
#SBATCH --cpus-per-task=8
#SBATCH --exclude=BAD1,BAD2
#SBATCH --gpus-per-node=4
#SBATCH --job-name=huginn-1b
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
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
# threads of a rank: the cores it has (cores_per_rank)
export OMP_NUM_THREADS="8"
# the code as it was when the run was submitted, which no rank writes to
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
srun --nodes=4 --nodelist=NODES --ntasks=16 --ntasks-per-node=4 --cpus-per-task=8 --export=ALL --kill-on-bad-exit=1 --open-mode=append --output=/RUN/jobs/JOB/LAUNCH/node-%n.log PYTHON -m rookery train /RUN/run.yaml
