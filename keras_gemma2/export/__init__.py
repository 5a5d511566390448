"""What leaves the package: a SavedModel that writes text."""
