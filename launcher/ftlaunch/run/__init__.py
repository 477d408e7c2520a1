"""A run on disk, shared by launcher and trainer: its paths, its files, and the code and data that it came from."""

from pathlib import Path

HOME = Path("runs")
"""Where runs are, if not told otherwise: counted from the working directory."""
