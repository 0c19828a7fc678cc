"""Other tools' views of a run, fed from the run log."""
