"""How long schedules take: in simulation, and according to the records of a run."""
