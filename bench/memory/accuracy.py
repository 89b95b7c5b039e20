"""Predicted against measured bytes of random plans."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...common.arrays import IntArray
from ...memory.batch_shape import BatchShape
from ...memory.cost import plan_cost
from ...memory.recording import Batch
from ..harness import interleave
from ..learner import Learner
from .settings import Setting

CALIBRATED = BatchShape(8, 32)
SHAPES = (CALIBRATED, BatchShape(3, 32), BatchShape(12, 44))
"""Batches of the plans; all but the first are predicted from a calibration on another one."""
RANKS = (1, 2, 4, 8, 16)
DENSITIES = (1.0, 0.6, 0.3, 0.1)


@dataclass(frozen=True)
class Errors:
    """Predicted over measured bytes, minus 1, of several plans: above 0 where the prediction is too high.

    Attributes:
        median: of the absolute value.
        high: 95th percentile of the absolute value.
        over: the worst prediction above what was measured; below 0 if there is none.
        under: the worst one below it; above 0 if there is none.
    """

    median: float
    high: float
    over: float
    under: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Errors | None:
        """Errors of (predicted, measured) pairs; None if there are none."""
        table = np.array(list(pairs), dtype=np.float64)
        if not len(table):
            return None
        errors = table[:, 0] / table[:, 1] - 1
        size = np.abs(errors)
        return cls(float(np.median(size)), float(np.quantile(size, 0.95)), float(errors.max()), float(errors.min()))


def random_plan(generator: np.random.Generator, blocks: IntArray, turn: int) -> IntArray:
    """Random ranks on some modules, rank 0 on the others: everywhere, on top layers only, or on a single module.

    Args:
        generator: of all draws.
        blocks: layer of each module, (modules,).
        turn: number of the plan; the kinds take turns.
    """
    ranks = generator.choice(RANKS, size=len(blocks)) * (generator.random(len(blocks)) < DENSITIES[turn % 4])
    if turn % 3 == 2:
        ranks[blocks < generator.integers(1, blocks.max() + 1)] = 0
    if not ranks.any():
        ranks[generator.integers(len(blocks))] = generator.choice(RANKS)
    return np.asarray(ranks, dtype=np.int64)


def compare_plans(
    setting: Setting, shapes: Sequence[BatchShape], plans: int, device: torch.device, seed: int
) -> dict[str, Any]:
    """Predict and measure random plans in one setting.

    Args:
        setting: how the model trains.
        shapes: of batches; the model is calibrated on `CALIBRATED` alone.
        plans: at each shape.
        device: where.
        seed: of everything.

    Returns:
        "calibration_steps" (seconds of calibration over the median of three plain steps) and "plans". Each of these has
        "calibrated" (whether the batch has the shape of calibration), "saved" (predicted and measured bytes that
        autograd holds for the backward pass; None with checkpointing) and "peak" (the same at the peak of the step).
    """
    learner = setting.learner(device, seed)
    generator = np.random.default_rng([seed, *map(ord, repr(setting))])
    blocks = np.array([target.block for target in learner.targets], dtype=np.int64)
    batch = setting.batch(CALIBRATED, device, seed)
    # The first step warms up.
    step_s = np.median(interleave({"step": lambda turn: learner.step(batch)}, 4, device)["step"][1:])
    start = time.perf_counter()
    memory = learner.calibrate(batch)
    calibration_s = time.perf_counter() - start
    compared = []
    for shape in shapes:
        batch, cost = setting.batch(shape, device, seed), memory.cost(shape)
        for turn in range(plans):
            ranks = learner.set_ranks(random_plan(generator, blocks, turn))
            learner.step(batch)  # the optimiser's state is there from now on
            peak = plan_cost(cost, ranks), float(learner.measured_step(batch))
            saved = None
            if setting.checkpointing == "none":
                saved = memory.saved(ranks, shape), float(saved_bytes(learner, batch))
            compared.append({"calibrated": shape == CALIBRATED, "saved": saved, "peak": peak})
    return {"calibration_steps": calibration_s / float(step_s), "plans": compared}


class _Token:
    """Stands for a tensor that autograd saved; dies with the graph."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(learner: Learner, batch: Batch) -> int:
    """Bytes of distinct storages that autograd holds at the end of a forward pass: weights and batch apart."""
    model = learner.model
    known = (*model.parameters(), *model.buffers(), *batch.values())
    excluded = {tensor.untyped_storage().data_ptr() for tensor in known}
    tokens: list[weakref.ref[_Token]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Token:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in excluded:
            return tensor
        token = _Token(tensor)
        tokens.append(weakref.ref(token))
        return token

    def unpack(saved: torch.Tensor | _Token) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Token) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), learner.precision():
        loss = model(**batch).loss
    alive = [token.tensor.untyped_storage() for reference in tokens if (token := reference())]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())
    del loss
    return total
