"""What a run writes about itself and how people see it: the run log and the report.

This room imports neither torch nor any other room, so that a login node reads a run in well under a second.
"""
