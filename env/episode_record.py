"""One episode as an environment sees it: its reward, `info` and text, whatever trains the adapters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..allocation.controller import RankController
from ..allocation.observation import Observation
from ..allocation.problem import AllocationProblem
from ..common.module_names import kinds_in_layers
from ..common.units import format_bytes
from ..memory.cost import plan_cost
from .reward import Comparison, churn_cost
from .tasks.finetune import Reference


class EpisodeRecord:
    """The story of one episode.

    Args:
        task: id of what is fine-tuned.
        reference: what fixed allocations achieve.
        controller: link to the adapters.
        observation: the first one.

    Attributes:
        observation: the latest one, with the plans that it allows.
        churn: cost of the rungs that were moved after the first decision, so far.
    """

    reference: Reference
    task: str
    observation: Observation

    def __init__(
        self, task: str, reference: Reference, controller: RankController[Any], observation: Observation
    ) -> None:
        self.task, self.reference, self.observation = task, reference, observation
        self.churn: float = 0.0
        self._controller = controller
        self._problem: AllocationProblem = observation.problem  # kept: others may train the same adapters later
        self._step = 0
        self._loss: float | None = None
        self._decided = False
        self._held_out: float | None = None
        self._comparison: Comparison | None = None

    @property
    def loss(self) -> float | None:
        """Mean training loss of the latest interval; None before the first one, and where it was not finite."""
        return self._loss

    def advance(self, step: int, loss: float | None, observation: Observation) -> None:
        """The controller has applied a decision, and training has gone on to a step.

        Args:
            step: optimiser steps done.
            loss: mean training loss since the decision; None if it was not finite.
            observation: the next one; at the end the last one again.
        """
        self._problem = self._controller.problem()
        if self._decided:
            self.churn += churn_cost(self.observation.problem.rungs, self._problem.rungs)
        self._decided, self._step, self._loss, self.observation = True, step, loss, observation

    def end(self, held_out_loss: float | None, comparison: Comparison) -> float:
        """The episode is over; returns its reward.

        Args:
            held_out_loss: in nats; None if the run failed.
            comparison: with what.
        """
        self._held_out, self._comparison = held_out_loss, comparison
        return self._improvement - self.churn

    @property
    def _failed(self) -> bool:
        return self._decided and self._loss is None

    @property
    def _improvement(self) -> float:
        return self._comparison.improvement(self._held_out) if self._comparison else 0.0

    def info(self) -> dict[str, Any]:
        """The same keys at each step; see the environment's manual."""
        problem = self._problem
        return {
            "task": self.task,
            "step": self._step,
            "loss": self._loss,
            "held_out_loss": self._held_out,
            "uniform_loss": self.reference.uniform,
            "other_loss": self._comparison.loss if self._comparison else None,
            "cost": plan_cost(problem.cost, problem.ranks) if self._decided else math.nan,
            "limit": problem.limit,
            "ranks": tuple(problem.ranks.tolist()),
            "non_finite": self._failed,
            "improvement": self._improvement,
            "churn": self.churn,
        }

    def describe(self) -> str:
        """The episode as text: its task, where it stands, then the ranks of each layer from the top down."""
        layers, ranks = np.asarray(self._problem.blocks).tolist(), self._problem.ranks.tolist()
        labels = kinds_in_layers(self._controller.names, layers)
        known = dict(zip(zip(layers, labels, strict=True), ranks, strict=True))
        kinds = list(dict.fromkeys(labels))
        number, width = (max(len(str(value)) for value in values) for values in (layers, ranks))
        lines = [self.task, self._status()]
        for layer in sorted(set(layers), reverse=True):
            cells = [
                f"{kind} {known[layer, kind]:>{width}}" if (layer, kind) in known else " " * (len(kind) + 1 + width)
                for kind in kinds
            ]
            lines.append("  ".join([f"layer {layer:>{number}} ", *cells]).rstrip())
        return "\n".join(lines)

    def _status(self) -> str:
        """Where the episode stands, in one line."""
        problem, unit = self._problem, self._controller.cost.unit
        parts = [f"step {self._step} of {self._controller.total_steps}"]
        limit = format_bytes(problem.limit) if unit == "bytes" else f"{problem.limit:,.0f} {unit}"
        if self._decided:
            parts.append(f"loss {math.nan if self._loss is None else self._loss:.3f}")
            parts.append(f"{100 * plan_cost(problem.cost, problem.ranks) / problem.limit:.1f} % of {limit}")
        else:
            parts.append(f"no plan yet for {limit}")
        if self._held_out is not None:
            parts.append(f"held-out loss {self._held_out:.3f} (uniform {self.reference.uniform:.3f})")
        return ", ".join(parts)
