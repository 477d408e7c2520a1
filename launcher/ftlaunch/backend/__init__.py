"""Where the stages of a written run are started: here or by a scheduler. Backends never import each other."""
