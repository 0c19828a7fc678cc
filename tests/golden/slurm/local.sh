trap : TERM && \
trap '' HUP && \
exec </dev/null >>/RUN/jobs/local.log 2>&1 && \
cd /RUN && \
unset CUDA_VISIBLE_DEVICES && \
export PYTHONPATH=/RUN/code/DIGEST"${PYTHONPATH:+:$PYTHONPATH}" && \
export PYTHONDONTWRITEBYTECODE=1 && \
PYTHON -u -m submitit.core._submit /RUN/jobs

# the ranks, in the job
PYTHON -m rookery train /RUN/run.yaml
