"""The answers of `rankpilot memory`: whether a step fits, what takes its bytes, and which settings would do."""
