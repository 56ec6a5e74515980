"""Several runs: grids, Table 1, and what they say together."""
