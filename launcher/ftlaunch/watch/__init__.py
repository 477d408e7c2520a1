"""What there is to see of runs: finding them, how they stand and what they said."""
