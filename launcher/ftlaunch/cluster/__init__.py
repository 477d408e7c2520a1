"""What is known of a SLURM cluster: its profile, and its queue."""
