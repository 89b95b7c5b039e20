"""Many fine-tunes on one frozen model, trained side by side."""
