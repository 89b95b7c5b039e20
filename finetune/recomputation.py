"""Which layers of a run's model run again in the backward pass: as few as its plan needs. The loss runs in tiles."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.arrays import IntArray
from ..cost.cost import ByteCost
from ..cost.model import MemoryModel, fewest_recomputed, recomputed_cost
from ..cost.recording import BatchShape
from ..cost.tiled_loss import use_tiled_loss
from ..cost.training_step import check_checkpointing, switch_checkpointing
from ..errors import UnsupportedError
from ..lora.targets import unwrap
from .left_as_found import ModelSettings


class Recomputation:
    """Lets single layers of a transformers model run again in the backward pass. Losses stay the same.

    The loss of a causal language model is computed in tiles, which saves more bytes than several layers do and takes
    hardly any time (`cost/tiled_loss.py`).

    Args:
        model: the PEFT model. All its layers run again from now on, so that the step can be measured, and its loss has
            tiles; until `put_back`.

    Attributes:
        layers: the names of the layers that run again.
        memory: the byte model of the step in which all do; None until it is known.

    Raises:
        UnsupportedError: the model has no layers that can run again one by one.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        check_checkpointing(base)
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
        if not self._layers:
            raise UnsupportedError(
                f"{type(base).__name__} checkpoints all its layers together or none, so a plan cannot choose them one "
                "by one. Leave `recompute` out, or switch gradient checkpointing on for the whole model."
            )
        self._before: ModelSettings | None = ModelSettings(model)
        use_tiled_loss(model)
        switch_checkpointing(base, True)
        base.config.use_cache = False  # a layer that runs again would fill the cache twice
        self.layers: tuple[str, ...] = tuple(self._layers)
        self.memory: MemoryModel | None = None

    def put_back(self) -> None:
        """Let the layers run again that did so before, and set the model's cache as it was; the first call does so."""
        if self._before:
            self._before.put_back()
        self._before = None

    def all(self) -> None:
        """Let all layers run again."""
        self.take(self._layers)

    def take(self, layers: Collection[str]) -> None:
        """Let these layers run again, and no other."""
        self.layers = tuple(name for name in self._layers if name in layers)
        for name, layer in self._layers.items():
            layer.gradient_checkpointing = name in layers

    def fewest(self, ranks: IntArray, limit: float, shape: BatchShape | None = None) -> tuple[str, ...]:
        """The fewest layers that must run again so that a plan fits, or all that hold something.

        Args:
            ranks: the plan, int64 (modules,).
            limit: bytes that the step may take.
            shape: of the batch; by default the one that the memory was measured with.
        """
        assert self.memory is not None, "the step has not been measured"
        return fewest_recomputed(self.memory, ranks, limit, shape)

    def cost(self, max_ranks: IntArray, limit: float, shape: BatchShape, *, recomputing: bool) -> ByteCost:
        """What plans cost, where layers may run again or may not; see `recomputed_cost`.

        Args:
            max_ranks: the highest rank of each module, int64 (modules,).
            limit: bytes that the step may take.
            shape: of the batch.
            recomputing: whether layers may run again.
        """
        assert self.memory is not None, "the step has not been measured"
        if recomputing:
            return recomputed_cost(self.memory, max_ranks, limit, shape)
        return self.memory.recomputing(()).cost(shape)

    def memory_now(self) -> MemoryModel:
        """The byte model of the step in which the layers run again that do now."""
        assert self.memory is not None, "the step has not been measured"
        return self.memory.recomputing(self.layers)

    def __str__(self) -> str:
        return f"{len(self.layers)} of {len(self._layers)} layers run again"


def could_recompute(model: nn.Module) -> bool:
    """Whether a model has layers that can run again one by one and do not yet."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return any(not layer.gradient_checkpointing for layer in layers)


@contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[Recomputation | None]:
    """What chooses the layers of a run that begins, None unless it is wanted; put back if an error ends the run."""
    recomputation = Recomputation(model) if wanted else None
    try:
        yield recomputation
    except BaseException:
        if recomputation:
            recomputation.put_back()
        raise
