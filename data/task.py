"""What a model is fine-tuned for."""

from __future__ import annotations

from typing import Literal

Task = Literal["classification", "causal-lm"]
