"""From rows on disk to micro-batches."""
