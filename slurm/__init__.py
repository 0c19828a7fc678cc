"""Getting ranks started: on this machine now; on a cluster's queue, its site profiles and job chains later."""
