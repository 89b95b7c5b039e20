"""The cost of a training step in bytes and seconds: predicted for any plan of ranks, or measured."""
