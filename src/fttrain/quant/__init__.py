"""Numbers in few bits: uniform grids, their calibration, ternary weights, and how they are stored."""
