"""What an attempt that ended badly leaves behind: who failed first, and what it said last."""
