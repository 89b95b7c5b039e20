"""Rank changes: target modules, resizing of LoRA pairs, optimizer state, signals and adapter files."""
