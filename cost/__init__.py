"""What a training step costs, in bytes and in seconds: predicted for any plan of ranks, or measured."""
