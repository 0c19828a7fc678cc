"""Checkpoints that prove themselves: written in the background, in tiers, and read by any number of ranks."""
