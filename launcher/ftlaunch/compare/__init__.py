"""Variants of recipes, run one after another under one budget and set side by side."""
