"""The vocabulary of a recipe: every table and key that a user may write, with its default and its meaning."""
