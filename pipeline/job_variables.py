"""What a job tells its ranks through the environment; imports nothing, since the job's own process needs no torch."""

REFUSAL = "ROOKERY_REFUSAL"
"""The file in which the job wants to read how ranks ended that began no attempt: why they refused their input, or that
there was nothing left to do."""

STAGED_KERNELS = "ROOKERY_STAGED_KERNELS"
"""A directory of the node that holds copies of archives of compiled kernels."""
