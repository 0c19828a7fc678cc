"""A run directory as columns and views: bounded memory, whatever the size or the state of its logs."""
