"""Metrics as modules of the `evaluate` library, which need no network: `evaluate.load` takes the path of each file."""
