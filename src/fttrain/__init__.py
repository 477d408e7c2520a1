"""The trainer: started with a step folder, it trains or merges, and leaves checkpoints, metrics and an artifact."""
