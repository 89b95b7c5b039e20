"""Models, texts and data sets by name."""
