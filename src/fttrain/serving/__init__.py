"""Models served on a port: a page to try them on, and the completions of OpenAI's interface."""
