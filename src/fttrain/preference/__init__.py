"""What the stages that learn from pairs of answers share."""
