"""A finished model at work: it answers prompts, and says how likely it finds given answers."""
