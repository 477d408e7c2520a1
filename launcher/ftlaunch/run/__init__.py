"""A run on disk, shared by launcher and trainer: its paths, its files, and the code and data that it came from."""
