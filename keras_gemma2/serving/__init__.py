"""Serving many requests at once: continuous batching over one set of caches."""
