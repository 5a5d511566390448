"""Writing text: prefill, one decode step, and the loop around them."""
