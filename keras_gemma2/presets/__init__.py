"""Named presets and the folders they resolve to."""
