"""What leaves the package: a SavedModel that writes text, and a step over caches for other runtimes."""
