"""Measurements before the first step of a run: the cost of plans of ranks in bytes, and their seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from ..common.arrays import IntArray
from ..common.errors import BudgetError, RankPilotError
from ..cost.batch_shape import Batch, shape_of
from ..cost.budget import AUTO_SHARE, Budget, Limit, beyond_device, free_bytes
from ..cost.cost import ByteCost, plan_cost
from ..cost.model import MemoryModel
from ..cost.record.calibration import CUT_FAILS, PlanCosts, measure_memory, plan_costs, small_batch
from ..cost.record.work import count_work, measured_rates
from ..cost.savers.exact import ExactSavers, graphs_per_plan, takes_any_shape
from ..cost.step_time import StepTime
from ..decide.applier import PlanApplier
from ..decide.plan.plan import check_budget
from ..lora.adapters import PeftAdapters
from ..lora.optimizer_state import drop_foreign_state, reset_state
from ..lora.peft_config import ranks_as_passed
from ..lora.resize import is_trained
from ..lora.spec import on_ladder
from ..lora.targets import TargetModule, unwrap
from .options import PilotOptions
from .step.exact_parts import exactness_of
from .step.parts import StepParts
from .step.run import FIRST_ROWS, FirstRows, TrainingRun

UNSEEN: FirstRows = (0.0, [(1, 1)])
"""Loss and shapes of the first rows, for a run without training data yet."""


def step_time(run: TrainingRun, targets: Sequence[TargetModule]) -> StepTime:
    """Return the seconds of a training step under any plan, by its counted work and the measured rates of its device.

    The small batch of recorded steps is counted, since a fully adapted step of all rows may exceed the budget; a step
    takes as many times its seconds as it has tokens. See `python -m benchmarks step-time`.

    Args:
        run: the run.
        targets: the target modules of its model.

    Raises:
        DataError: see `TrainingRun.largest_batch`.
    """
    batch, model = run.largest_batch(), run.step.model
    few, whole = small_batch(model, batch, run.step.rows_per_example), shape_of(batch)

    def counted() -> StepTime:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        rates, shape = measured_rates(run.device, dtype), shape_of(few)
        try:
            work = count_work(model, targets, run.step.loss, few)
        except (RankPilotError, torch.OutOfMemoryError):
            raise
        except CUT_FAILS:  # the loss only accepts whole batches
            work, shape = count_work(model, targets, run.step.loss, batch), whole
        return work.time(rates).times(whole.rows * whole.length / (shape.rows * shape.length))

    return run.measured(counted).times(run.accumulation)


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
    """True if any plan fits the budget, within the applier's bounds."""
    try:
        check_budget(applier.problem(), list(applier.names))
    except BudgetError:
        return False
    return True
