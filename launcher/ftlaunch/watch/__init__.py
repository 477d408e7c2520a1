"""What there is to see of runs: finding them, how they stand, what they said and how far they have come."""
