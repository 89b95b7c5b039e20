"""Rank changes of LoRA adapters: target modules, resizing, optimiser state, signals and adapter files."""
