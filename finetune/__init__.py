"""A real fine-tune, from before the first step to the saved adapter."""
