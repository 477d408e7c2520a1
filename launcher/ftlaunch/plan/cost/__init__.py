"""What a run will cost: memory, disk and time of each stage, by arithmetic on config.json alone."""
