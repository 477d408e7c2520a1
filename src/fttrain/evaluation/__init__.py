"""How good a model is: perplexity on text, and scores of its answers to prompts that were held out."""
