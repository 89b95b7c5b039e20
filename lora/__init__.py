"""Where a rank changes: target modules, resizing of LoRA pairs, the optimizer's state, signals and adapter files."""
