"""One episode as an environment sees it: its reward, `info` and text, whatever trains the adapters.

The reward of an episode: how much better it ended than what it is compared with, less the cost of its moves.

    reward = clip((other loss - loss) / headroom, -3, 3) - churn

* *other loss*: the held-out loss of the run that it is compared with: uniform rank, or a rule's run on the same task,
  seed and batches;
* *headroom*: what a better allocation could gain over that run, nearly;
* *churn*: a small cost of rungs moved after the first decision.

All of it comes at the end of the episode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..agents.controller import RankController
from ..agents.observation import Observation
from ..agents.policy import Policy
from ..agents.rules import RULES, find_rule
from ..common.arrays import IntArray
from ..common.text import format_bytes, kinds_in_layers
from ..cost.cost import plan_cost
from ..errors import ConfigError, UnknownNameError, shown
from ..plan.problem import AllocationProblem
from .proxy_task import Reference

REWARD_BOUND = 3.0
"""Improvements lie between minus and plus this; a loss that is not finite gets the lower end."""

CHURN = 0.002
"""Cost of moving every module by one rung."""

UNIFORM = "uniform"
"""What episodes are compared with, unless a rule is named: the uniform run of their task."""


def rule_to_compare_with(against: str) -> Policy | None:
    """The rule whose runs episodes are compared with; None for the uniform run.

    Raises:
        ConfigError: it is no name.
        UnknownNameError: there is no such rule.
    """
    if not isinstance(against, str):
        raise ConfigError(f"against is {UNIFORM!r} or the name of a rule; got {shown(against)}.")
    if against == UNIFORM:
        return None
    try:
        return find_rule(against)
    except UnknownNameError:
        raise UnknownNameError.of("comparison", against, [*dict.fromkeys([UNIFORM, *RULES])]) from None


@dataclass(frozen=True)
class Comparison:
    """What a run is compared with.

    Attributes:
        loss: held-out loss of the other run, in nats; NaN or infinite if it failed.
        headroom: what a better allocation could gain over it, nearly, in nats, > 0.
    """

    loss: float
    headroom: float

    @classmethod
    def with_uniform(cls, reference: Reference) -> Comparison:
        """With the uniform run of a task."""
        return cls(reference.uniform, reference.headroom)

    @classmethod
    def with_run(cls, loss: float, initial: float, reference: Reference, others: Sequence[float]) -> Comparison:
        """With another run of the same task, seed and batches.

        Args:
            loss: that run's held-out loss. Where it is not finite, the median of the others stands in, or the initial
                loss if there are none.
            initial: held-out loss before training.
            reference: of this task or of one like it; tells how the headroom compares with what uniform gains.
            others: finite losses of the runs that are compared.
        """
        level = loss if math.isfinite(loss) else float(np.median(others)) if len(others) else initial
        gain = max(initial - level, 0.01 * initial, 1e-6)
        return cls(level, gain * reference.headroom / reference.gain)

    def improvement(self, loss: float | None, bound: float = REWARD_BOUND) -> float:
        """How much lower a loss is, as a share of the headroom, from -bound to bound.

        A run that failed (None, NaN or infinite) gets the lower end, and one that is compared with a failed run the
        upper one; where both failed it is 0.
        """
        failed, other_failed = loss is None or not math.isfinite(loss), not math.isfinite(self.loss)
        if failed or other_failed:
            return bound * (other_failed - failed)
        assert loss is not None
        return min(max((self.loss - loss) / self.headroom, -bound), bound)


def churn_cost(before: IntArray, after: IntArray) -> float:
    """Cost of going from some rungs to others, (modules,) each."""
    return CHURN * float(np.abs(after - before).mean())


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
