"""Several runs: grids, Table 1, and their results."""
