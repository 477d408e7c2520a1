"""What may be loaded, run and shown: whose files, which models, and no secrets."""
