"""The link between decisions and tensors, written once for proxy episodes and real fine-tunes.

`probe` runs a few small training steps before a run, measures the first signals on them, and undoes them.
`PlanApplier` goes the same way at each decision: signals -> observation -> (a policy decides) -> a plan within the
budget -> ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..common.arrays import FloatArray, IntArray
from ..common.checks import counted, finite
from ..common.text import part_of
from ..cost.budget import reference_cost
from ..cost.cost import ByteCost, TimedCost, UntimedCost, check_cost, cost_from_state, cost_state, unit_cost
from ..errors import BudgetError, NonFiniteError
from ..lora.adapters import Adapters, SignalMeter, signal_buffer_bytes
from ..lora.targets import TargetModule
from ..plan.plan import Plan, TimeLimit, check_budget
from ..plan.problem import AllocationProblem
from .observation import ModuleShapes, Moves, Observation, RunState, observe
from .policy import Decision, decided_plan, decision_from_plan
from .rate_control import RunRecord
from .settings import DecisionSchedule

FIRST_LOSSES = 5
"""The first loss is the mean of this number of losses, from the probe's start; the last loss that of the last ones."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What the probe measured.

    Attributes:
        signals: (modules, len(SIGNALS)).
        first_loss: mean training loss of its first steps.
        fall: share of the first loss by which the last one is lower; 0 where it is unknown.
        predicted: share of the tokens whose prediction the loss counts, above 0: 1 where all are, as in language models
            as a rule, and little where a whole text is classified.
    """

    signals: FloatArray
    first_loss: float
    fall: float = 0.0
    predicted: float = 1.0

    @classmethod
    def of(cls, signals: FloatArray, losses: Sequence[float]) -> ProbeResult:
        """The result of a probe with these training losses, one a step."""
        first, last = (float(np.mean(part)) for part in (losses[:FIRST_LOSSES], losses[-FIRST_LOSSES:]))
        return cls(signals, first, 1 - last / first if first > 0 else 0.0)


def probe(
    targets: Sequence[TargetModule],
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[], torch.Tensor]],
    *,
    max_grad_norm: float = 1.0,
) -> ProbeResult:
    """Train the adapters for a few small steps, and measure the signals.

    Args:
        targets: the target modules. Their adapters train; the caller resets or restores them afterwards.
        optimizer: of the adapters' parameters, without state; of no use afterwards.
        losses: for each step a function that runs the forward pass on a micro-batch and returns the loss.
        max_grad_norm: gradients are clipped to this norm.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    meter = SignalMeter(targets)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history = []
    for closure in losses:
        loss = closure()
        history.append(float(loss.detach()))
        if not np.isfinite(history[-1]):
            raise NonFiniteError(
                f"The loss of probe step {len(history)} is {history[-1]}. Check the data and lower the learning rate."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        meter.accumulate()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return ProbeResult.of(meter.read(), history)


logger = logging.getLogger(__name__)


AdaptersT = TypeVar("AdaptersT", bound=Adapters)


class PlanApplier(Generic[AdaptersT]):
    """Observes one run's adapters and applies decisions to them.

    Args:
        adapters: whose ranks are decided.
        cost: what plans cost, signal buffers included. It may be replaced; the reference of the observation stays.
        limit: the hard budget, in the unit of `cost`.
        schedule: when decisions fall.
        total_steps: optimizer steps of the run.
        probe_result: from `probe`.
        rows: of an optimizer step, in all its batches.
        low: the least rank of each module, int64 (modules,); 0 by default.
        high: the largest, int64 (modules,); any by default.
        seed: decides fresh rows on growth.
        time: the limit of the time of a step; None for none.
        reads: whether who decides reads signals. Else none are measured, and no plan pays for their buffers.

    Attributes:
        notes: why a module was left out of the latest plan, by name.

    Raises:
        BudgetError: no plan fits the limit.
    """

    high: IntArray | None
    low: IntArray | None
    first_loss: float
    predicted: float
    probe_fall: float

    def __init__(
        self,
        adapters: AdaptersT,
        cost: UntimedCost,
        limit: float,
        schedule: DecisionSchedule,
        total_steps: int,
        probe_result: ProbeResult,
        *,
        rows: int,
        low: IntArray | None = None,
        high: IntArray | None = None,
        seed: int = 0,
        time: TimeLimit | None = None,
        reads: bool = True,
    ) -> None:
        self.adapters = adapters
        self.targets: list[TargetModule] = list(adapters.targets)
        self.cost = cost
        self.limit = limit
        self.time = time
        self.schedule = schedule
        self.total_steps = total_steps
        self.decision_steps: tuple[int, ...] = schedule.steps(total_steps)
        self.low, self.high = low, high
        self.seed = seed
        self._reads = reads
        adapters.meter.values = probe_result.signals.copy()
        self.first_loss, self.probe_fall = probe_result.first_loss, probe_result.fall
        self.predicted = probe_result.predicted
        self.rows = rows
        self.interval_losses: list[float] = []
        self.decision: int = 0
        self.names: tuple[str, ...] = tuple(target.name for target in self.targets)
        self.notes: dict[str, str] = {}
        self._warned: set[str] = set()
        self._shapes = ModuleShapes.of(self.targets)
        self._moves = Moves(len(self.targets))
        self._limit_before: float | None = None
        problem = self.problem()
        self._reference_cost = reference_cost(cost, problem.max_ranks)
        check_budget(problem, list(self.names))

    @property
    def ranks(self) -> IntArray:
        """Current ranks, (modules,)."""
        return self.adapters.ranks

    @property
    def finished(self) -> bool:
        """Whether every decision has been taken."""
        return self.decision >= len(self.decision_steps)

    @property
    def measures(self) -> bool:
        """Whether signals are measured until the next decision."""
        return self._reads and not self.finished

    @property
    def will_measure(self) -> bool:
        """Whether signals are measured after the next decision; the last one may spend what their buffers took."""
        return self._reads and self.decision < len(self.decision_steps) - 1

    @property
    def until(self) -> int:
        """The optimizer step before which the next decision falls, or the end of the run."""
        return self.total_steps if self.finished else self.decision_steps[self.decision]

    def due(self, step: int) -> bool:
        """Whether the next decision falls before optimizer step `step` (counted from 0)."""
        return not self.finished and step >= self.decision_steps[self.decision]

    def problem(self) -> AllocationProblem:
        """The plans that are possible at the next decision."""
        return self._problem(buffers=self.will_measure)

    def problem_now(self) -> AllocationProblem:
        """The plans that are possible until the next decision."""
        return self._problem(buffers=self.measures)

    def cost_now(self, cost: UntimedCost | None = None) -> UntimedCost:
        """What plans cost until the next decision, without time.

        Args:
            cost: what plans cost, signal buffers included, if not what they cost in this run.
        """
        cost = cost or self.cost
        return cost if self.measures else self._without_buffers(cost)

    def fits(self, ranks: IntArray | None = None) -> bool:
        """Whether a plan is within the limits until the next decision; `ranks` are the current ones by default."""
        ranks = self.ranks if ranks is None else ranks
        return self.problem_now().fits(ranks) and (self.time is None or self.time.fits(ranks))

    def _problem(self, *, buffers: bool) -> AllocationProblem:
        cost = self.cost if buffers else self._without_buffers(self.cost)
        return AllocationProblem.of(
            self.targets,
            self.time.added_to(cost, self.limit) if self.time else cost,
            self.limit,
            max_step=self.schedule.reach(self.decision),
            low=self.low,
            high=self.high,
            ranks=self.ranks,
        )

    def _without_buffers(self, cost: UntimedCost) -> UntimedCost:
        if not isinstance(cost, ByteCost):
            return cost
        return replace(cost, per_rank=cost.per_rank - signal_buffer_bytes(self.targets))

    def observe(
        self, step: int, interval_loss: float | None = None, steps: RunRecord | None = None, schedule: float = 1.0
    ) -> Observation:
        """Close the interval that ends before `step` and describe the next decision.

        Args:
            step: optimizer steps done.
            interval_loss: mean training loss since the last decision, if known.
            steps: what the steps since then have shown; None where nothing reads them.
            schedule: the schedule's learning rate now, as a share of its peak.
        """
        if self.decision > 0:
            self.adapters.meter.read()
        if interval_loss is not None and np.isfinite(interval_loss):
            self.interval_losses.append(interval_loss)
        seen = steps.observe(schedule) if steps and steps.losses else None
        if interval_loss is not None and 0 < interval_loss < np.inf:
            self._moves.interval(float(np.log(interval_loss)), steps.loss_error if steps else 0.0)
        return self._observation(self.problem(), step, seen)

    def observation_now(self, step: int) -> Observation:
        """The observation as things stand, without closing the interval."""
        return self._observation(self.problem_now(), step)

    def _observation(self, problem: AllocationProblem, step: int, steps: FloatArray | None = None) -> Observation:
        state = RunState(
            progress=step / self.total_steps,
            decisions_left=max(0, len(self.decision_steps) - self.decision - 1),
            reference_cost=self._reference_cost,
            first_loss=self.first_loss,
            losses=tuple(self.interval_losses),
            total_steps=self.total_steps,
            rows=self.rows,
            probe_fall=self.probe_fall,
            predicted=self.predicted,
            limit_before=self._limit_before,
            steps=steps,
        )
        return observe(
            problem,
            self.names,
            self.adapters.meter.values,
            self.adapters.meter.age,
            self._shapes,
            state,
            self._moves,
        )

    def apply(self, decision: Decision, step: int, optimizer: torch.optim.Optimizer | None = None) -> Plan:
        """Project a decision onto the budget and give the adapters their new ranks.

        Args:
            decision: what is wanted.
            step: optimizer steps done; decides fresh rows together with the seed.
            optimizer: its state follows, unless the adapters keep their own.

        Returns:
            The plan as applied.
        """
        plan = self.propose(decision, optimizer)
        self._set(plan.ranks, step, optimizer)
        self.decision += 1
        self._limit_before = self.limit
        return plan

    def _set(self, ranks: IntArray, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Give the adapters ranks, int64 (modules,), and note how they moved."""
        if self.decision:
            ladder = self.problem().ladder
            self._moves.moved(ladder.rung(ranks) - ladder.rung(self.ranks))
        self.adapters.set_ranks(ranks, optimizer, seed=self.seed, step=step)

    def propose(
        self,
        decision: Decision,
        optimizer: torch.optim.Optimizer | None = None,
        problem: AllocationProblem | None = None,
    ) -> Plan:
        """The plan that `apply` would make of a decision, without making it.

        Args:
            decision: what is wanted.
            optimizer: its state is looked at as well; modules that hold NaN or infinity keep their ranks.
            problem: the plans that are possible; by default those of the next decision.
        """
        problem = replace(problem or self.problem(), pinned=self._pin_broken(optimizer))
        if self.time:
            problem = self.time.choose(problem, lambda other: decided_plan(other, decision).ranks)
        return decided_plan(problem, decision)

    def stay(self) -> Plan:
        """Take the ranks as they are for the next decision, also those that are on no ladder.

        Raises:
            BudgetError: they are above the limit.
        """
        ranks = self.ranks
        cost = unit_cost(self.problem().cost, ranks)
        if cost > 1.001 * self.limit:  # margins are rounded up, and a share of "100%" is to hold
            raise BudgetError(
                f"The ranks of the LoraConfig do not fit the budget, and they stay: they take "
                f"{part_of(cost, self.limit, self.cost.unit)}. Lower r, raise the budget, or plan the ranks first with "
                "`rankpilot.allocate`."
            )
        self.decision += 1
        return Plan(ranks, ranks, cost)

    def set_plan(
        self, ranks: IntArray, step: int, optimizer: torch.optim.Optimizer | None = None, *, decides: bool = True
    ) -> None:
        """Take exactly these ranks: none is lowered or raised, even if a part of the budget is left.

        Args:
            ranks: on the ladder, int64 (modules,). Modules that `propose` pinned keep their ranks of the proposal.
            step: the optimizer steps before this change.
            optimizer: its state follows.
            decides: whether they are the next decision; else they come beside the schedule, which stays as it is.

        Raises:
            BudgetError: they are above the limit.
        """
        problem = self.problem() if decides else self.problem_now()
        if unit_cost(problem.cost, ranks) > self.limit:
            cost = part_of(unit_cost(problem.cost, ranks), self.limit, self.cost.unit)
            raise BudgetError(f"This plan does not fit the budget: it takes {cost}. Lower some ranks.")
        if self.time and not (self.time.fits(ranks) and problem.fits(ranks)):
            raise BudgetError(f"This plan does not fit the time: {self.time.text(ranks)}. Lower some ranks.")
        self._set(ranks, step, optimizer)
        self.decision += decides

    def correct(self, wanted: IntArray, step: int, optimizer: torch.optim.Optimizer | None = None) -> Plan:
        """Bring the ranks back under a limit that has become tighter; not counted as a decision. See `apply`."""
        plan = self.propose(decision_from_plan(wanted), optimizer, self.problem_now())
        self._set(plan.ranks, step, optimizer)
        return plan

    def _pin_broken(self, optimizer: torch.optim.Optimizer | None) -> NDArray[np.bool_]:
        """Note which modules hold NaN or infinity, warn of each once, and say which they are, (modules,)."""
        broken = self.adapters.non_finite(optimizer)
        fresh = sorted(set(broken) - self._warned)
        if fresh:
            self._warned.update(fresh)
            logger.warning(
                "The adapter or optimizer state of %s holds NaN or infinity: %s no more changes of rank. Lower the "
                "learning rate or clip gradients.",
                ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more modules" if len(fresh) > 3 else ""),
                "it gets" if len(fresh) == 1 else "they get",
            )
        self.notes = dict.fromkeys(broken, "left alone: NaN or infinity in its factors, gradients or optimizer state")
        return np.isin(self.names, broken)

    def state_dict(self) -> dict[str, Any]:
        """All that `from_state_dict` needs beside the adapters and their signals, as arrays and JSON values."""
        return {
            "cost": cost_state(self.cost),
            "reference_cost": self._reference_cost,
            "limit": self.limit,
            "time": self.time.state() if self.time else None,
            "total_steps": self.total_steps,
            "rows": self.rows,
            "first_loss": self.first_loss,
            "probe_fall": self.probe_fall,
            "predicted": self.predicted,
            "interval_losses": list(self.interval_losses),
            "decision": self.decision,
            "seed": self.seed,
            "moves": self._moves.state.tolist(),
            "latest": list(self._moves.latest),
            "limit_before": self._limit_before,
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        adapters: AdaptersT,
        schedule: DecisionSchedule,
        *,
        low: IntArray | None = None,
        high: IntArray | None = None,
        reads: bool = True,
    ) -> PlanApplier[AdaptersT]:
        """Continue from `state_dict`.

        Args:
            state: what `state_dict` returned.
            adapters: with the ranks and signals of that time.
            schedule: see the class, as `low` and `high`.
            low: the least rank of each module.
            high: the largest rank of each module.
            reads: see the class.

        Raises:
            LookupError, TypeError, ValueError: it is no such state, or of another model.
        """
        cost = cost_from_state(state["cost"])
        check_cost(cost, len(adapters.targets))
        if isinstance(cost, TimedCost):
            raise TypeError("time is beside the cost")
        seen = (state["first_loss"], state["probe_fall"], state["predicted"])
        applier = cls(
            adapters,
            cost,
            finite(state["limit"]),
            schedule,
            counted(state["total_steps"], 1),
            ProbeResult(adapters.meter.values, *map(finite, seen)),
            rows=counted(state["rows"], 1),
            low=low,
            high=high,
            seed=counted(state["seed"]),
            time=TimeLimit.from_state(state["time"]) if state["time"] else None,
            reads=reads,
        )
        applier._reference_cost = finite(state["reference_cost"])
        applier.interval_losses = [finite(loss) for loss in state["interval_losses"]]
        applier.decision = counted(state["decision"])
        moves = np.array([[finite(value) for value in row] for row in state["moves"]]).reshape(len(adapters.targets), 4)
        before, (loss, error) = state["limit_before"], state["latest"]
        applier._moves.state, applier._moves.latest = moves, (finite(loss), finite(error))
        applier._limit_before = None if before is None else finite(before)
        return applier
