"""Noise on activations and embeddings in training, and activation functions that are replaced for good."""
