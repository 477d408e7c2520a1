"""From a recipe to a plan: which tables count for a stage, what it starts from, the files it is started with."""
