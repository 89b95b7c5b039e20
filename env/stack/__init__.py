"""Many fine-tunes trained together on one frozen model."""
