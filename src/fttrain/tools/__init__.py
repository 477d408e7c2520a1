"""Entry points of the command line's tools that need torch: one module for each verb."""
