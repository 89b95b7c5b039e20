"""Many adapters on one frozen base, trained side by side."""
