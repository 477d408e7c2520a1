"""Models as they are trained: loaded, scored token by token, and turned into reward models."""
