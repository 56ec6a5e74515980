"""Time of blocks over processes, measured and predicted."""
