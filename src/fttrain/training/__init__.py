"""The training loop and what surrounds it: the session of a stage, optimizers, metrics, counters."""
