"""What is known of a SLURM cluster: the vocabulary of its profile, and where profiles are found."""
