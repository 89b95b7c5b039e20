"""Towers that read pictures for a language model and hold no adapter.

Autograd saves nothing of them, and each of their layers frees all but its output. A few layers therefore have the peak
of all, and checkpointing has no effect on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

LEAST = 2
"""Fewest layers to keep: one, and one that reads the output of another."""


def _frozen_towers(base: PreTrainedModel) -> Iterator[nn.ModuleList]:
    """Yield the lists of checkpointable layers outside the language model that hold no adapter."""
    texts = {id(module) for module in base.get_decoder().modules()}
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in texts and _is_frozen(module):
            yield module


def _is_frozen(layers: nn.ModuleList) -> bool:
    trained = any(parameter.requires_grad for parameter in layers.parameters())
    return not trained and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers) and len(layers) > 0


def no_checkpoints_in_towers(base: PreTrainedModel) -> None:
    """Turn gradient checkpointing off in frozen towers, for recordings to count only layers on which it has effects."""
    for layer in (layer for layers in _frozen_towers(base) for layer in layers):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False


@contextmanager
def towers_cut(base: PreTrainedModel) -> Iterator[None]:
    """Cut frozen towers to their first layers of all kinds inside the context."""
    with ExitStack() as stack:
        for layers in list(_frozen_towers(base)):
            stack.enter_context(_cut(layers, _layers_of_all_kinds(base)))
        yield


def _layers_of_all_kinds(base: PreTrainedModel) -> int:
    """Return the number of first layers that include one with full attention, and all whose outputs are kept."""
    sight = base.config.vision_config
    names = "fullatt_block_indexes", "deepstack_visual_indexes", "intermediate_layers_indices"
    full, *kept = (getattr(sight, name, None) or () for name in names)
    return max(LEAST, 1 + min(full, default=0), *(1 + max(each, default=0) for each in kept))


@contextmanager
def _cut(layers: nn.ModuleList, count: int) -> Iterator[None]:
    rest = list(layers)[count:]
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(rest)
