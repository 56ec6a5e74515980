"""What schedules take: simulated, and from the records of a run."""
