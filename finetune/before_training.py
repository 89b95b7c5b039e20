"""Measurements before the first step of a run: the cost of plans of ranks, in bytes and in seconds."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from ..common.arrays import IntArray
from ..common.errors import BudgetError, UnsupportedError
from ..cost.batch_shape import Batch, reshaped, shape_of
from ..cost.budget import AUTO_SHARE, Budget, Limit, TimeBudget, beyond_device, free_bytes
from ..cost.cost import ByteCost, plan_cost
from ..cost.model import MemoryModel, fewest_checkpointed
from ..cost.record.calibration import PlanCosts, measure_memory, plan_costs
from ..cost.record.measured_time import TimedPlan, measure_step_time, measured_share, timed_plans
from ..cost.recording import BatchShape
from ..cost.savers.checkpointed_layers import LayerCheckpointing
from ..cost.savers.exact import ExactSavers, graphs_per_plan, takes_any_shape
from ..cost.step_time import PARTS, StepTime
from ..decide.applier import PlanApplier
from ..decide.choice import percent
from ..decide.observation import Observation
from ..decide.plan.plan import FewestLayers, TimeLimit, check_budget
from ..decide.plan.problem import AllocationProblem
from ..decide.policy import Decision
from ..lora.adapters import PeftAdapters
from ..lora.optimizer_state import drop_foreign_state, reset_state
from ..lora.peft_config import ranks_as_passed
from ..lora.resize import is_trained
from ..lora.spec import on_ladder
from ..lora.targets import TargetModule, unwrap
from .options import PilotOptions
from .step.exact_parts import exactness_of
from .step.parts import StepParts
from .step.plan_keeper import PlanKeeper
from .step.run import FIRST_ROWS, FirstRows, TrainingRun

UNSEEN: FirstRows = (0.0, [(1, 1)])
"""Loss and shapes of the first rows, for a run without training data yet."""

LEAST_LENGTH = 16
"""Minimum number of tokens in a row of timed steps: below, overhead would dominate the time."""

Ask = Callable[[Observation], Decision]
"""Asks the run's policy for a decision."""


@dataclass(frozen=True, eq=False)
class StepTimer:
    """Times steps of a run about to begin, to predict the time of any plan.

    Timed steps also stay within the limit of bytes. If a step with the largest batch would not, fewer or shorter rows
    are timed, and the time is scaled by the number of tokens. A step here is an optimizer step, with all batches it
    accumulates.

    Attributes:
        run: the run.
        targets: the target modules of its model.
        reference: the ranks that a share of time refers to, int64 (modules,).
        memory: the byte model, if the budget counts bytes; of a step with all layers checkpointed if `checkpointing` is
            given.
        limit: the limit of bytes, if `memory` is given.
        checkpointing: chooses the checkpointed layers. Every method checkpoints all layers, and leaves them so.
    """

    run: TrainingRun
    targets: Sequence[TargetModule]
    reference: IntArray
    memory: MemoryModel | None
    limit: float
    checkpointing: LayerCheckpointing | None

    def time_limit(self, budget: TimeBudget) -> TimeLimit:
        """Measure the time of steps, and create the user's limit of time.

        Raises:
            DataError, UnsupportedError: see `TrainingRun.largest_batch` and `measure_step_time`.
        """
        fewest = (
            partial(fewest_checkpointed, self.memory, limit=self.limit) if self.checkpointing and self.memory else None
        )
        time = self.run.measured(self._step_time)
        return self._limit(budget, time, fewest)

    def limit_of_resumed_run(self, before: TimeLimit | None, budget: TimeBudget | None) -> TimeLimit | None:
        """Return the limit of time of a resumed run with a new one from the user.

        Args:
            before: the run's earlier limit, whose measurement is reused; None to measure now.
            budget: the new limit; None for none.
        """
        if budget is None:
            return None
        return self._limit(budget, before.time, before.layers) if before else self.time_limit(budget)

    def agree_with_steps(self, applier: PlanApplier[PeftAdapters], ask: Ask) -> None:
        """Correct the limit of time until its prediction agrees with timed steps of the first plan.

        See `TimeLimit.agreed`.

        Args:
            applier: an applier with a limit of time, before its first decision; it gets the corrected one.
            ask: the policy.
        """
        given = applier.time
        assert given is not None, "time is limited"
        plain = self.reference

        def plan(limit: TimeLimit) -> IntArray:
            applier.time = limit
            problem = applier.problem()
            limit.check(problem)
            return applier.propose(ask(applier.observe(0))).ranks

        def measured(ranks: IntArray) -> float:
            planned = ranks, given.layers(ranks) if given.layers else ()

            def share() -> float:
                batch, _ = self._timed_batch()
                return measured_share(self.run.step, self.targets, batch, planned, (plain, ()), self._take)

            return self.run.measured(share)

        applier.time = given.agreed(plan, measured, given.time.seconds(plain, () if self._take else None))
        if self.checkpointing:
            self.checkpointing.take(self.checkpointing.layers)

    @property
    def _take(self) -> Callable[..., None] | None:
        return self.checkpointing.take if self.checkpointing else None

    def _limit(self, budget: TimeBudget, time: StepTime, layers: FewestLayers | None) -> TimeLimit:
        # Including the layers checkpointed in the user's step.
        beside = time.seconds(self.reference) if budget == TimeBudget.unlimited() else None
        return TimeLimit(time, budget.resolve(time, self.reference), layers, beside)

    def _step_time(self) -> StepTime:
        """Measure the time of a step with the run's largest batch, for any plan."""
        batch, share = self._timed_batch()
        time = measure_step_time(self.run.step, self.targets, batch, self._take)
        return time.scaled(np.full(len(PARTS), self.run.accumulation / share))

    def _timed_batch(self) -> tuple[Batch, float]:
        """Return the batch for timed steps, and its tokens as a share of those of the run's largest batch."""
        batch, each = self.run.largest_batch(), self.run.step.rows_per_example
        whole = shape = shape_of(batch)
        if self.memory:
            plans = timed_plans(self.targets, self.checkpointing.layers if self.checkpointing else ())
            shape = _largest_that_fits(self.memory, plans, self.limit, each)
        timed = batch if shape == whole else reshaped(batch, shape, each)
        return timed, shape.rows * shape.length / (whole.rows * whole.length)


def _largest_that_fits(
    memory: MemoryModel, plans: Sequence[TimedPlan], limit: float, rows_per_example: int
) -> BatchShape:
    """Return the largest batch shape for which all plans stay within the limit of bytes, or else the smallest tried."""
    rows, length = memory.shape.rows, memory.shape.length
    shapes = [BatchShape(few, length) for few in range(rows, 0, -rows_per_example)]
    while length // 2 >= LEAST_LENGTH:
        length //= 2
        shapes.append(BatchShape(rows_per_example, length))

    def fits(index: int) -> bool:
        steps = ((memory.with_checkpointed(layers) if memory.segments else memory, ranks) for ranks, layers in plans)
        return all(step.peak(ranks, shapes[index]) <= limit for step, ranks in steps)

    try:
        return shapes[min(bisect_left(range(len(shapes)), True, key=fits), len(shapes) - 1)]
    except UnsupportedError:  # only the measured shape is known
        return memory.shape


TIMES_OF_WHOLE_BATCHES = (
    "Step times are for the largest batch run whole; steps in parts are faster, but time limits do not rely on that."
)
"""Report line for a run in parts whose plans have times."""


def faster_plan(keeper: PlanKeeper, applier: PlanApplier[Any], ask: Ask, decision: Decision) -> str:
    """Describe the faster plan that the policy would choose without gradient checkpointing.

    The line is empty if the first plan checkpoints no layer, or if the policy predicts no losses. The costs of plans
    are restored.

    Args:
        keeper: has set the costs for this decision.
        applier: changes the ranks of the run.
        ask: the policy.
        decision: the first decision, before it is applied.
    """
    expected, found = _expected(decision), decision.choice
    if not keeper.layers_of(applier.propose(decision).ranks):
        return ""
    if found and found.goal.kind == "bytes":
        return "gradient_checkpointing=False takes less time, but more memory."
    if expected is None:
        return ""
    keeper.price_for_decision(checkpointing=False)
    try:
        check_budget(applier.problem(), list(applier.names))
        other = ask(applier.observe(0))
        ranks = applier.propose(other).ranks
    except BudgetError:
        return "Without gradient checkpointing, no plan fits this budget."
    finally:
        keeper.price_for_decision()
    loss = _expected(other)
    if loss is None:
        return ""
    return (
        f"gradient_checkpointing=False would be faster: {np.count_nonzero(ranks)} adapters of mean rank "
        f"{ranks.mean():.1f}, with an expected loss difference of {percent(loss - expected)} from this "
        "plan" + (", too small to be certain." if loss < expected else ".")
    )


def _expected(decision: Decision) -> float | None:
    """Return the expected log loss versus plain LoRA; None for decisions of a rule, and under a goal of cost."""
    found = decision.choice
    return None if found is None or found.goal.saves else float(found.expected[found.taken])


MUCH_LOST = 1.01
"""Factor on the loss above which the effect of the first plan is reported as a warning."""

logger = logging.getLogger(__name__)


def try_parts(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    parts: StepParts,
    options: PilotOptions,
    budget: Budget,
    seed: int,
    plans: int,
) -> None:
    """Test whether the steps of a run may run in parts, if the user wants that.

    Args:
        run: the run.
        targets: the target modules of its model.
        parts: gets the result of the test.
        options: the options of the pilot.
        budget: the user's budget.
        seed: the seed of the test.
        plans: number of plans in the run.
    """
    if options.parts == "off" or not run.in_parts or budget.kind == "parameters":
        return
    if run.whole:
        parts.turn_off(run.whole)
    elif run.replicas.all_passes_alike:
        parts.turn_off("DistributedDataParallel's static_graph requires all passes to be alike")
    elif reason := _reason_of_compiled(run, plans):
        parts.turn_off(reason)
    elif unknown := run.unknown():
        parts.turn_off(f"{unknown}, so rows may affect each other")
    else:
        parts.decide(exactness_of(run, targets, seed), run.step.rows_per_example)


def _reason_of_compiled(run: TrainingRun, plans: int) -> str:
    """Return why steps of a compiled model run whole; empty if few graphs serve all parts, or nothing is compiled.

    A plan with its layers takes two graphs: torch specializes on one row (2.13). Two more precede dynamic shapes, and
    evaluations double the total.
    """
    most = graphs_per_plan(run.wrapped) * (2 * plans + 2) * (2 if run.evaluations else 1)
    if not most:
        return ""
    if run.replicas.processes.count > 1:
        return "the number of graphs needed for parts of a compiled model is unknown with several processes"
    if not takes_any_shape(run.wrapped):
        return "each shape would be compiled separately"
    limit: int = torch._dynamo.config.recompile_limit
    beyond = f"parts of the compiled model may need {most} graphs, and torch._dynamo.config.recompile_limit is {limit}"
    return beyond if most > limit else ""


def run_costs(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    budget: Budget,
    *,
    signals: bool,
    least: Callable[[ByteCost], float] | None = None,
    savers: ExactSavers | None = None,
    reference: IntArray,
    kept: IntArray | None = None,
    whole: bool = False,
    in_parts: bool = False,
) -> PlanCosts:
    """Measure the cost of plans with a run's largest batch, and resolve its budget to a limit.

    Args:
        run: the run.
        targets: the target modules of its model.
        budget: the user's budget.
        signals: True if the costs of plans include signal buffers.
        least: the cost of the cheapest possible plan, if layers may be checkpointed (see `plan_costs`).
        savers: the active exact savers.
        reference: the ranks that a share refers to, int64 (modules,).
        kept: the ranks of trained adapters, int64 (modules,) (see `Budget.resolve`).
        whole: True if all layers are checkpointed (see `checkpointed_cost`).
        in_parts: True if steps run in parts.
    """
    budget = budget_for_all_processes(run, budget)
    costs = partial(plan_costs, budget, signals=signals, least=least, savers=savers, whole=whole)
    costs = partial(costs, reference=reference, kept=kept, in_parts=run.step_in_parts if in_parts else None)
    found = run.measured(lambda: costs(run.step, targets, run.largest_batch()))
    if savers and found.saved:
        savers.take(found.savers)  # in each process, as found by the first
    return found


def room_in_main_memory(run: TrainingRun, applier: PlanApplier[Any], budget: Budget) -> float:
    """Return the bytes of main memory for copies of the adapters.

    On a CPU they count against a budget for everything on the device.

    Args:
        run: the run.
        applier: holds the plan and its limit.
        budget: the user's budget.
    """
    free = AUTO_SHARE * psutil.virtual_memory().available / run.replicas.processes.on_this_machine
    if run.device.type == "cpu" and budget.kind in ("total", "auto"):
        free = min(free, applier.limit - plan_cost(applier.cost_now(), applier.ranks))
    return run.replicas.processes.least(free)[0]


def budget_for_all_processes(run: TrainingRun, budget: Budget) -> Budget:
    """Return a budget that every process can keep: under "auto" the process with the least free memory counts."""
    if budget.kind != "auto":
        return budget
    replicas, free = run.replicas, float(free_bytes(run.device))
    (least,) = replicas.processes.least(free / replicas.on_this_device)
    return replace(budget, value=budget.value * replicas.processes.on_first(lambda: least / free))


def run_memory(
    run: TrainingRun, targets: Sequence[TargetModule], batch: Batch | None = None, *, signals: bool = False
) -> MemoryModel:
    """Measure the byte model of a run's step.

    Args:
        run: the run.
        targets: the target modules of its model.
        batch: the batch to measure with, on the device; defaults to the run's largest one.
        signals: True if the costs of plans include signal buffers.
    """
    return run.measured(
        lambda: measure_memory(run.step, targets, run.largest_batch() if batch is None else batch, signals=signals)
    )


def clear_adapter_state(run: TrainingRun, targets: Sequence[TargetModule], *, keeps: bool) -> None:
    """Clear the optimizer's state of the adapters.

    Args:
        run: the run.
        targets: the target modules of its model.
        keeps: True if the adapters are already trained and kept. Only incompatible state is then cleared.
    """
    parameters = [parameter for target in targets for parameter in target.parameters.values()]
    if keeps:
        drop_foreign_state(run.optimizer, parameters)
    else:  # the optimizer may still have state: `auto_find_batch_size` restarts training
        reset_state(run.optimizer, parameters)


LOOKING = "Trying the training step on a few rows ..."
RECORDING = "Recording small training steps to price plans ..."
TIMING = "Timing training steps ..."
"""Report lines before slow operations."""

ROLLOUTS = "It applies to training steps; rollouts between them are not counted."


def budget_text(run: TrainingRun, budget: Budget, limit: Limit) -> str:
    """Return a run's first report line: its budget.

    Args:
        run: the run.
        budget: the user's budget.
        limit: the limit that the budget was resolved to.
    """
    lines = budget.told(limit), beyond_device(budget, run.device), ROLLOUTS if run.generates else ""
    return " ".join(filter(None, lines))


def warn_of_other_adapters(run: TrainingRun, targets: Sequence[TargetModule]) -> None:
    """Warn of other trained adapters of the model, not counted by a budget of parameters."""
    adapter = targets[0].adapter
    others = [name for name in unwrap(run.model).peft_config if name != adapter]
    trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad and ".lora_" in name]
    for other in others if run.replicas.processes.first else ():
        size = sum(parameter.numel() for name, parameter in trained if f".{other}" in name.partition(".lora_")[2])
        if size:
            logger.warning(
                "Adapter %r is trained too: %d parameters with fixed ranks, not counted by the budget. To train "
                "only %r, call `model.set_adapter(%r)` before creating the optimizer; a budget in bytes counts "
                "both.",
                other,
                size,
                adapter,
                adapter,
            )


KEPT = (
    "The adapters are already trained, so the first plan lowers ranks only where bounds require it. "
    "fresh=True starts with new ones."
)


@contextmanager
def keep_what_was_learned(
    run: TrainingRun, applier: PlanApplier[PeftAdapters], note: Callable[[str], None]
) -> Iterator[None]:
    """Keep the trained adapters' weights in the first decision, inside this context, if the budget allows.

    If all trained adapters fit at their ranks, none may shrink. If they do not fit, some must; the loss on a few rows
    before and after the decision is then reported.

    Args:
        run: the run.
        applier: applies the decision.
        note: called with the line to report.
    """
    if not any(map(is_trained, applier.targets)):
        yield
        return
    low, before = applier.low, applier.ranks.copy()
    applier.low = before if low is None else np.maximum(low, before)
    if applier.high is not None:
        applier.low = np.minimum(applier.low, applier.high)
    try:
        if _some_plan_fits(applier):
            note(KEPT)
            yield
            return
    finally:
        applier.low = low
    losses = [run.read_first_rows(applier.seed)[0]]
    yield
    losses.append(run.read_first_rows(applier.seed)[0])
    told = (
        f"The adapters are already trained, and their ranks ({before.sum()} in total) do not fit the "
        f"budget: the loss on {FIRST_ROWS} rows was {losses[0]:.4g} before the plan and is "
        f"{losses[1]:.4g} after it. A larger budget keeps what they have learned."
    )
    if losses[1] <= MUCH_LOST * losses[0]:
        note(told)
    elif run.replicas.processes.first:
        logger.warning(told)


def ranks_to_compare(
    run: TrainingRun, targets: Sequence[TargetModule], *, stays: bool, keeps: bool
) -> tuple[IntArray, IntArray | None]:
    """Return the ranks that a share of a budget refers to, and those it must keep if they cost more; see `run_costs`.

    Under a policy they are rounded up onto the ladder, at whose ranks no adapter has to shrink.

    Args:
        run: the run.
        targets: the target modules of its model.
        stays: True if the run keeps the ranks of its LoraConfig, on the ladder or not.
        keeps: True if the adapters are already trained and kept.
    """
    passed = ranks_as_passed(run.model, targets)
    if stays:
        return passed, None
    now = np.array([target.rank for target in targets], dtype=np.int64)
    return on_ladder(passed, targets), on_ladder(now, targets) if keeps else None


def _some_plan_fits(applier: PlanApplier[PeftAdapters]) -> bool:
    """True if any plan fits the budget and the limit of time, within the applier's bounds."""
    problem = applier.problem()
    try:
        check_budget(problem, list(applier.names))
        if applier.time:
            applier.time.check(problem)
    except BudgetError:
        return False
    return True


def check_possible(
    targets: Sequence[TargetModule],
    costs: PlanCosts,
    timed: TimeLimit | None,
    low: IntArray,
    high: IntArray,
    share: float | None,
) -> None:
    """Raise `BudgetError` if no plan within the bounds fits the budget and the limit of time."""
    limit = costs.limit.value
    cost = timed.added_to(costs.cost, limit) if timed else costs.cost
    problem = AllocationProblem.of(targets, cost, limit, low=low, high=high)
    check_budget(problem, [target.name for target in targets], share)
    if timed:
        timed.check(problem)
