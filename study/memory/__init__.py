"""Where the bytes of a training step go."""
