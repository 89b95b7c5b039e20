"""The mechanism: target modules, rank changes, signals, memory, plans and adapter files."""
