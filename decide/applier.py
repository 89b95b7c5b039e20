"""The link between decisions and tensors, shared by proxy episodes and real fine-tunes.

`probe` runs a few small training steps before a run, measures the first signals on them, and undoes them.
`PlanApplier` repeats one sequence at each decision: signals -> observation -> (a policy decides) -> a plan within the
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
from ..common.errors import BudgetError, NonFiniteError
from ..common.text import part_of
from ..cost.budget import reference_cost
from ..cost.cost import ByteCost, Cost, check_cost, cost_from_state, cost_state, plan_cost
from ..cost.step_time import PlanSeconds
from ..lora.adapters import Adapters, SignalMeter, signal_buffer_bytes
from ..lora.spec import plain_ranks
from ..lora.targets import TargetModule
from .observation import ModuleShapes, Moves, Observation, RunState, observe
from .plan.plan import STAY_ROOM, Plan, check_budget
from .plan.problem import AllocationProblem
from .policy import Decision, decided_plan, decision_from_plan
from .rate_control import RunRecord
from .settings import DecisionClock, DecisionSchedule

MAX_GRAD_NORM = 1.0
"""Gradient clipping norm of probes."""

FIRST_LOSSES = 5
"""Number of losses averaged for the first loss, from the probe's start, and for the last loss, up to its end."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Measurements of the probe.

    Attributes:
        signals: (modules, len(SIGNALS)).
        first_loss: mean training loss of its first steps.
        fall: relative drop from the first loss to the last one; 0 if unknown.
        predicted: share of tokens counted in the loss, above 0: usually 1 for language models, and small for
            classification of whole texts.
    """

    signals: FloatArray
    first_loss: float
    fall: float = 0.0
    predicted: float = 1.0

    @classmethod
    def of(cls, signals: FloatArray, losses: Sequence[float]) -> ProbeResult:
        """Build the result of a probe from its training losses, one per step."""
        first, last = (float(np.mean(part)) for part in (losses[:FIRST_LOSSES], losses[-FIRST_LOSSES:]))
        return cls(signals, first, 1 - last / first if first > 0 else 0.0)


def probe(
    targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer, losses: Iterable[Callable[[], torch.Tensor]]
) -> ProbeResult:
    """Train the adapters for a few small steps, and measure the signals.

    Args:
        targets: the target modules. Their adapters are trained; the caller resets or restores them afterwards.
        optimizer: optimizer of the adapters' parameters, without state; do not reuse it.
        losses: for each step, a function to run the forward pass on a micro-batch and return the loss.

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
            what = f"The loss of probe step {len(history)} is {history[-1]}"
            raise NonFiniteError(f"{what}. Check the data and lower the learning rate.")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        meter.accumulate()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return ProbeResult.of(meter.read(), history)


logger = logging.getLogger(__name__)


AdaptersT = TypeVar("AdaptersT", bound=Adapters)


class PlanApplier(Generic[AdaptersT]):
    """Observes one run's adapters and applies decisions to them.

    Args:
        adapters: the adapters.
        cost: cost of plans, signal buffers included; see `price`.
        limit: the hard budget, in the unit of `cost`.
        schedule: times of the decisions.
        total_steps: optimizer steps of the run.
        probe_result: from `probe`.
        rows: rows per optimizer step, over all its micro-batches.
        low: minimum rank of each module, int64 (modules,); 0 by default.
        high: maximum rank of each module, int64 (modules,); unlimited by default.
        seed: seeds fresh rows on growth.
        time: seconds of a step under any plan; None if the goal is not to save time.
        reference: ranks of the adapter as configured, int64 (modules,), to which shares of a budget refer; those of
            plain LoRA by default.
        keeps: True if these ranks are allowed even off the ladder, because the plan is to keep them.
        reads: True if the policy reads signals. Otherwise none are measured, and no plan pays for their buffers.

    Attributes:
        clock: the decisions taken and due.
        reference: as above.
        notes: reason a module was left out of the latest plan, by name.

    Raises:
        BudgetError: no plan fits the limit.
    """

    def __init__(
        self,
        adapters: AdaptersT,
        cost: Cost,
        limit: float,
        schedule: DecisionSchedule,
        total_steps: int,
        probe_result: ProbeResult,
        *,
        rows: int,
        low: IntArray | None = None,
        high: IntArray | None = None,
        seed: int = 0,
        time: PlanSeconds | None = None,
        reference: IntArray | None = None,
        keeps: bool = False,
        reads: bool = True,
    ) -> None:
        self.adapters = adapters
        self.targets: list[TargetModule] = list(adapters.targets)
        self.price(cost, limit)
        self.time = time
        self.clock = DecisionClock(schedule, total_steps, reads)
        self.low, self.high = low, high
        self.reference: IntArray = plain_ranks(self.targets) if reference is None else reference
        self._configured = self.reference if keeps else None
        self.seed = seed
        adapters.meter.values = probe_result.signals.copy()
        self.first_loss, self.probe_fall = probe_result.first_loss, probe_result.fall
        self.predicted = probe_result.predicted
        self.rows = rows
        self.interval_losses: list[float] = []
        self.names: tuple[str, ...] = tuple(target.name for target in self.targets)
        self.notes: dict[str, str] = {}
        self._warned: set[str] = set()
        self._shapes = ModuleShapes.of(self.targets)
        self._moves = Moves(len(self.targets))
        self._limit_before: float | None = None
        problem = self.problem()
        self._reference_cost = reference_cost(cost, problem.max_ranks)
        check_budget(problem, list(self.names))

    def price(self, cost: Cost, limit: float) -> None:
        """Set the cost of plans and the hard budget; observations keep the first plan's cost as their reference."""
        self.cost, self.limit = cost, limit

    @property
    def ranks(self) -> IntArray:
        """Current ranks, (modules,)."""
        return self.adapters.ranks

    def problem(self, *, now: bool = False) -> AllocationProblem:
        """The plans allowed at the next decision, or until then."""
        buffers = self.clock.measures if now else self.clock.will_measure
        cost = self.cost if buffers else self._without_buffers(self.cost)
        reach = self.clock.schedule.reach(self.clock.taken)
        problem = AllocationProblem.of(
            self.targets, cost, self.limit, max_step=reach, low=self.low, high=self.high, ranks=self.ranks,
            configured=self._configured,
        )  # fmt: skip
        return replace(problem, time=self.time)

    def cost_now(self, cost: Cost | None = None) -> Cost:
        """Cost of plans until the next decision.

        Args:
            cost: cost of plans, signal buffers included; default: their cost in this run.
        """
        cost = cost or self.cost
        return cost if self.clock.measures else self._without_buffers(cost)

    def fits(self, ranks: IntArray | None = None) -> bool:
        """True if a plan is within the limit until the next decision; default: the current ranks."""
        return self.problem(now=True).fits(self.ranks if ranks is None else ranks)

    def _without_buffers(self, cost: Cost) -> Cost:
        if not isinstance(cost, ByteCost):
            return cost
        return replace(cost, per_rank=cost.per_rank - signal_buffer_bytes(self.targets))

    def observe(
        self, step: int, interval_loss: float | None = None, steps: RunRecord | None = None, schedule: float = 1.0
    ) -> Observation:
        """Close the interval before `step` and return the observation for the next decision.

        Args:
            step: optimizer steps done.
            interval_loss: mean training loss since the last decision, if known.
            steps: features of the steps since then; None if the steps are not read.
            schedule: the schedule's current learning rate, as a share of its peak.
        """
        if self.clock.taken:
            self.adapters.meter.read()
        if interval_loss is not None and np.isfinite(interval_loss):
            self.interval_losses.append(interval_loss)
        seen = steps.observe(schedule) if steps and steps.losses else None
        if interval_loss is not None and 0 < interval_loss < np.inf:
            self._moves.interval(float(np.log(interval_loss)), steps.loss_error if steps else 0.0)
        return self._observation(self.problem(), step, seen)

    def observation_now(self, step: int) -> Observation:
        """Return the current observation, without closing the interval."""
        return self._observation(self.problem(now=True), step)

    def _observation(self, problem: AllocationProblem, step: int, steps: FloatArray | None = None) -> Observation:
        state = RunState(
            progress=step / self.clock.total_steps, decisions_left=max(0, self.clock.left - 1),
            reference_cost=self._reference_cost, first_loss=self.first_loss, losses=tuple(self.interval_losses),
            total_steps=self.clock.total_steps, rows=self.rows, probe_fall=self.probe_fall, predicted=self.predicted,
            limit_before=self._limit_before, steps=steps,
        )  # fmt: skip
        meter = self.adapters.meter
        return observe(problem, self.names, meter.values, meter.age, self._shapes, state, self._moves)

    def apply(self, decision: Decision, step: int, optimizer: torch.optim.Optimizer | None = None) -> Plan:
        """Project a decision onto the budget and set the new ranks.

        Args:
            decision: the wanted ranks.
            step: optimizer steps done; seeds fresh rows together with the seed.
            optimizer: its state is updated, unless the adapters keep their own.

        Returns:
            The applied plan.
        """
        plan = self.propose(decision, optimizer)
        self._set(plan.ranks, step, optimizer)
        self.clock.taken += 1
        self._limit_before = self.limit
        return plan

    def _set(self, ranks: IntArray, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Set the adapters' ranks, int64 (modules,), and record their moves."""
        if self.clock.taken:
            ladder = self.problem().ladder
            self._moves.moved(ladder.rung(ranks) - ladder.rung(self.ranks))
        self.adapters.set_ranks(ranks, optimizer, seed=self.seed, step=step)

    def propose(
        self,
        decision: Decision,
        optimizer: torch.optim.Optimizer | None = None,
        problem: AllocationProblem | None = None,
    ) -> Plan:
        """Return the plan `apply` would make of a decision, without applying it.

        Args:
            decision: the wanted ranks.
            optimizer: its state is checked as well; modules with NaN or infinity keep their ranks.
            problem: the allowed plans; default: those of the next decision.
        """
        problem = replace(problem or self.problem(), pinned=self._pin_broken(optimizer))
        return decided_plan(problem, decision)

    def can_stay(self) -> bool:
        """True if the current ranks fit the limit at the next decision."""
        # Margins are rounded up, and a share of "100%" must fit.
        return plan_cost(self.problem().cost, self.ranks) <= STAY_ROOM * self.limit

    def stay(self) -> Plan:
        """Take the current ranks as the next decision, including ranks off the ladder; see `can_stay`."""
        self.clock.taken += 1
        self._limit_before = self.limit
        return Plan(self.ranks, self.ranks, plan_cost(self.problem().cost, self.ranks))

    def set_plan(
        self, ranks: IntArray, step: int, optimizer: torch.optim.Optimizer | None = None, *, decides: bool = True
    ) -> None:
        """Set exactly these ranks: none is lowered or raised, even with budget to spare.

        Args:
            ranks: on the ladder, int64 (modules,). Modules pinned by `propose` keep their proposed ranks.
            step: optimizer steps before this change.
            optimizer: its state is updated.
            decides: count it as the next decision; otherwise the schedule is unchanged.

        Raises:
            BudgetError: they exceed the limit.
        """
        cost = plan_cost(self.problem(now=not decides).cost, ranks)
        if cost > self.limit:
            needs = part_of(cost, self.limit, self.cost.unit)
            raise BudgetError(f"This plan does not fit the budget: it needs {needs}. Lower some ranks.")
        self._set(ranks, step, optimizer)
        self.clock.taken += decides

    def correct(self, wanted: IntArray, step: int, optimizer: torch.optim.Optimizer | None = None) -> Plan:
        """Shrink the ranks to fit a tighter limit; not counted as a decision. See `apply`."""
        plan = self.propose(decision_from_plan(wanted), optimizer, self.problem(now=True))
        self._set(plan.ranks, step, optimizer)
        return plan

    def _pin_broken(self, optimizer: torch.optim.Optimizer | None) -> NDArray[np.bool_]:
        """Pin modules with NaN or infinity, warning once for each, and return their mask, (modules,)."""
        broken = self.adapters.non_finite(optimizer)
        fresh = sorted(set(broken) - self._warned)
        if fresh:
            self._warned.update(fresh)
            logger.warning(
                "The adapter or optimizer state of %s contains NaN or infinity, so ranks no longer change there. Lower "
                "the learning rate or clip gradients.",
                ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more modules" if len(fresh) > 3 else ""),
            )
        self.notes = dict.fromkeys(broken, "left alone: NaN or infinity in its factors, gradients or optimizer state")
        return np.isin(self.names, broken)

    def state_dict(self) -> dict[str, Any]:
        """State for `from_state_dict`, except the adapters and their signals, as arrays and JSON values."""
        return {
            **{
                name: getattr(self, name) for name in ("limit", "rows", "seed", "first_loss", "probe_fall", "predicted")
            },
            "cost": cost_state(self.cost),
            "reference": self.reference.tolist(),
            "reference_cost": self._reference_cost,
            "time": vars(self.time) if self.time else None,
            "total_steps": self.clock.total_steps,
            "interval_losses": list(self.interval_losses),
            "decision": self.clock.taken,
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
        keeps: bool = False,
        reads: bool = True,
    ) -> PlanApplier[AdaptersT]:
        """Restore an applier from `state_dict`.

        Args:
            state: return value of `state_dict`.
            adapters: the adapters, with their ranks and signals at the time of `state_dict`.
            schedule: see the class; same for `low` and `high`.
            low: minimum rank of each module.
            high: maximum rank of each module.
            keeps: see the class; same for `reads`.
            reads: see the class.

        Raises:
            LookupError, TypeError, ValueError: the state is invalid, or belongs to another model.
        """
        cost = cost_from_state(state["cost"])
        check_cost(cost, len(adapters.targets))
        seen = (state["first_loss"], state["probe_fall"], state["predicted"])
        probed = ProbeResult(adapters.meter.values, *map(finite, seen))
        reference = np.array([counted(rank) for rank in state["reference"]], dtype=np.int64)
        if len(reference) != len(adapters.targets):
            raise ValueError(f"{len(reference)} ranks for {len(adapters.targets)} modules")
        applier = cls(
            adapters, cost, finite(state["limit"]), schedule, counted(state["total_steps"], 1), probed,
            rows=counted(state["rows"], 1), low=low, high=high, seed=counted(state["seed"]), reads=reads,
            reference=reference, keeps=keeps,
            time=PlanSeconds.from_state(state["time"], len(adapters.targets)) if state["time"] else None,
        )  # fmt: skip
        applier._reference_cost = finite(state["reference_cost"])
        applier.interval_losses = [finite(loss) for loss in state["interval_losses"]]
        applier.clock.taken = counted(state["decision"])
        moves = np.array([[finite(value) for value in row] for row in state["moves"]]).reshape(len(adapters.targets), 4)
        before, (loss, error) = state["limit_before"], state["latest"]
        applier._moves.state, applier._moves.latest = moves, (finite(loss), finite(error))
        applier._limit_before = None if before is None else finite(before)
        return applier
