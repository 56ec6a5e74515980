"""Processes of a run: how they start, meet, log and fail."""
