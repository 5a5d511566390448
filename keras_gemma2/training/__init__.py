"""Training: the loss in chunks."""
