"""What there is to see of runs: how they stand and what they said."""
