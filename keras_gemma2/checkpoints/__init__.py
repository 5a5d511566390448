"""Reading and writing the formats that Gemma 2 checkpoints come in."""
