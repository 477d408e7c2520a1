"""Checkpoints of a training stage: copied in memory, written in the background, good once their manifest verifies."""
