"""One training step, recorded: every tensor with its bytes, when it is born and freed, and what needs it.

A tensor that autograd saves is needed for the gradient of certain inputs of one operation. It will be saved under a
plan exactly if one of those inputs depends on an adapted module. So a recording of one step in which *every* module is
adapted tells what any other plan would save. `memory/recorder.py` makes recordings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..common.arrays import BoolArray, IntArray
from .autograd_flow import Modules

NEVER = np.iinfo(np.int64).max
"""The time at which a tensor is freed that outlives the step."""

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """A part of the forward pass that gradient checkpointing runs again in the backward pass.

    Attributes:
        start: the time at which it begins.
        end: the time at which it is over.
        inputs: serial numbers of the tensors that it was given.
        outputs: of those that it returned.
        sequences: autograd's counter at its start and end.
        reentrant: whether the second run has a graph of its own, which holds the outputs until it is done.
    """

    start: int
    end: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sequences: tuple[int, int]
    reentrant: bool


@dataclass(frozen=True, eq=False)
class Recording:
    """A training step in which every module is adapted. Storages go by serial number, time counts operators.

    Attributes:
        sizes: bytes of each storage, int64 (storages,).
        births: when it was created, int64 (storages,).
        deaths: when it was freed, NEVER if not within the step, int64 (storages,).
        alone: when it would be freed if nothing were held for backward, int64 (storages,).
        places: index into `names` of the module in whose forward pass it belongs, int64 (storages,).
        owners: target module in whose forward pass it belongs, -1 for none, int64 (storages,).
        parts: checkpointed segment in whose forward or backward pass it was created, -1 for none, int64 (storages,).
        needed: by serial number, the modules for which a storage exists: of the forward pass, those for which it is
            held longer than it would live alone (the others are left out); of the backward pass, those without which
            its operation would not run.
        inside: the same for what an operation in a checkpointed segment saves of that segment's own storages.
        on_context: what Python functions keep on their contexts, out of sight of autograd's hooks: by serial number,
            the time at which the module was left that called the one in which the function ran.
        unpacks: storages of the backward pass whose operation had saved something, bool (storages,).
        gradients: by serial number, the target module of whose factor it is the gradient; -1 for other parameters.
        names: module names.
        forward_end: the time at which the loss is known.
        segments: what checkpointing would run again, in forward order.
    """

    sizes: IntArray
    births: IntArray
    deaths: IntArray
    alone: IntArray
    places: IntArray
    owners: IntArray
    parts: IntArray
    needed: dict[int, Modules]
    inside: dict[int, Modules]
    on_context: dict[int, int]
    unpacks: BoolArray
    gradients: dict[int, int]
    names: tuple[str, ...]
    forward_end: int
    segments: tuple[Segment, ...]

    def saved_under(self, ranks: IntArray) -> BoolArray:
        """Which storages autograd holds at the end of the forward pass under a plan, (modules,) -> bool (storages,).

        What is saved inside checkpointed segments is left out.
        """
        adapted = sum(1 << int(module) for module in np.flatnonzero(ranks)) | 1 << len(ranks)
        held = np.zeros(len(self.sizes), dtype=np.bool_)
        held[[serial for serial, modules in self.needed.items() if modules & adapted]] = True
        result: BoolArray = held & (self.births <= self.forward_end) & (self.deaths > self.forward_end)
        return result
