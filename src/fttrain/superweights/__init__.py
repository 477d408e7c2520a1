"""Super weights: single weights of a down projection that a model cannot do without (arXiv 2411.07191)."""
