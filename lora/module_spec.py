"""The description of a module that can be adapted, without the model: all that plans need to know of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleSpec:
    """A linear layer or token embedding that can have a LoRA pair, delta W = scaling * B A.

    Attributes:
        name: full name inside the base model, as in `LoraConfig.rank_pattern`.
        block: index of the model layer that holds the module, 0 nearest to the input.
        d_in: input width (of an embedding: its vocabulary); A has shape (rank, d_in).
        d_out: output width; B has shape (d_out, rank).
    """

    name: str
    block: int
    d_in: int
    d_out: int

    @property
    def max_rank(self) -> int:
        """The largest rank that can add anything: min(d_in, d_out)."""
        return min(self.d_in, self.d_out)
