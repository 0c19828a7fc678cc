"""Measurements: each script sets ways of doing one thing side by side in one run and reports ratios."""
