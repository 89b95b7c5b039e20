"""Where a rank changes: target modules, resizing of LoRA pairs, the optimiser's state, signals and adapter files."""
