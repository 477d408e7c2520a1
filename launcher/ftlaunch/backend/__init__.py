"""Where the stages of a written run are started: here or by a scheduler. No backend imports another."""
