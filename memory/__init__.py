"""What a training step costs, from a budget's text to the bytes of a moment."""
