"""Adapters folded into their base, and the proof that the result is the same model."""
