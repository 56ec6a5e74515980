"""Processes of a run: how they are started, meet, speak and fail."""
