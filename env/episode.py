"""One fine-tune from probe to held-out loss on a real PEFT model, with ranks decided on the way, and its record.

The reward of an episode is how much better it ended than what it is compared with, less the cost of its moves. It comes
at the end of the episode.

    reward = clip((other loss - loss) / headroom, -3, 3) - churn

* *other loss*: the held-out loss of the run that it is compared with: uniform rank, or a rule's run on the same task,
  seed and batches;
* *headroom*: what a better allocation could gain over that run, nearly;
* *churn*: a small cost of rungs moved after the first decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import nn

from ..common.arrays import IntArray
from ..common.text import format_bytes, kinds_in_layers
from ..cost.cost import plan_cost
from ..decide.applier import AdaptersT, PlanApplier, ProbeResult, probe
from ..decide.log import DecisionLog, DecisionRecord
from ..decide.observation import Observation
from ..decide.policy import Decision, Policy
from ..decide.rules import RULES, find_rule
from ..decide.settings import DecisionSchedule
from ..errors import ConfigError, NonFiniteError, RunFolderError, UnknownNameError, shown
from ..lora.adapters import SIGNALS, PeftAdapters
from ..lora.peft_config import reference_scaling
from ..lora.resize import reset_adapters, resize, set_ranks, write_in_place
from ..plan.plan import Plan, uniform_ranks
from ..plan.problem import AllocationProblem
from .proxy_task import FineTune, Reference


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """Writes down the decisions of one episode.

    Attributes:
        write: takes each decision, such as `DecisionLog.append`.
        policy: decides.
        run: name of the run.
    """

    write: Callable[[DecisionRecord], object]
    policy: Policy
    run: str

    def append(
        self,
        applier: PlanApplier[Any],
        observation: Observation,
        decision: Decision,
        plan: Plan,
        *,
        step: int,
        loss: float | None,
    ) -> None:
        """Write down a decision that has just been applied; see `DecisionRecord.of`."""
        self.write(
            DecisionRecord.of(
                applier,
                observation,
                decision,
                plan,
                policy=self.policy,
                number=applier.decision - 1,
                step=step,
                run=self.run,
                loss=loss,
            )
        )


@dataclass(frozen=True)
class _Agent:
    """Whoever acts in an environment."""

    name: str = "agent"

    def decide(self, observation: Observation) -> Decision:
        raise NotImplementedError("the actions of an environment come from outside")


AGENT: Policy = _Agent()
"""The policy that logs of an environment name."""


def next_log(folder: Path, policy: Policy, run: str) -> EpisodeLog:
    """The log of an episode that begins: `episode-NNNNN`, numbered after those in a folder.

    Args:
        folder: of the logs; made if it is not there.
        policy: decides.
        run: name of the run.

    Raises:
        RunFolderError: no folder can be made there.
    """
    numbers = [path.name.removeprefix("episode-") for path in folder.glob("episode-*")]
    number = 1 + max((int(each) for each in numbers if each.isdecimal()), default=-1)
    while True:  # another environment may write there too
        place = folder / f"episode-{number:05d}"
        try:
            place.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():
                raise _unusable(folder, error) from error
            number += 1
        except OSError as error:
            raise _unusable(folder, error) from error
        else:
            return EpisodeLog(DecisionLog(place).append, policy, run)


def _unusable(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"No log of an episode can be made in {folder} ({error.strerror or error}). Pass as logs a folder that can be "
        "written to, or the name of one that does not exist yet."
    )


Result = TypeVar("Result")

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm, the Trainer's default."""

_holders: WeakKeyDictionary[nn.Module, ref[Episode]] = WeakKeyDictionary()
"""The episode whose factors each base model holds."""


def found_once(task: FineTune, key: Hashable, find: Callable[[], Result]) -> Result:
    """What is known of a task under a key; found out the first time."""
    known = task.known
    if key not in known:
        known[key] = find()
    result: Result = known[key]
    return result


def new_applier(
    task: FineTune, adapters: AdaptersT, schedule: DecisionSchedule, result: ProbeResult
) -> PlanApplier[AdaptersT]:
    """The link between decisions and the adapters of one episode."""
    cost = task.cost()
    max_ranks = np.array([target.max_rank for target in adapters.targets], dtype=np.int64)
    limit = task.limit.resolve(cost, max_ranks, adapters.targets[0].weight_a.device)
    result = replace(result, predicted=task.predicted)
    return PlanApplier(adapters, cost, limit.value, schedule, task.steps, result, rows=task.batch_size, seed=task.seed)


def rate_at(peak: float, step: int, steps: int) -> float:
    """The learning rate of one of so many steps: a linear decay."""
    return peak * (1 - step / steps)


def probe_task(task: FineTune, schedule: DecisionSchedule) -> ProbeResult:
    """The probe of a task; every episode of the task starts from the same one."""
    return found_once(task, ("probe", schedule), lambda: _probe(task, schedule))


def _probe(task: FineTune, schedule: DecisionSchedule) -> ProbeResult:
    model, targets = task.adapted()
    reset_adapters(targets, 1, task.seed)
    rows = min(schedule.probe_batch, task.batch_size)
    steps = (step % task.steps for step in range(schedule.probe_steps))
    losses = (partial(task.train_loss, model, step, rows) for step in steps)
    try:
        with reference_scaling(targets):
            return probe(targets, _optimizer(task), losses, max_grad_norm=MAX_GRAD_NORM)
    except NonFiniteError:  # the episode will find out, and end
        return unknown_signals(len(targets))


def unknown_signals(modules: int) -> ProbeResult:
    """The result of a probe that met a loss that is not finite."""
    return ProbeResult(np.full((modules, len(SIGNALS)), np.nan), 1.0)


def _optimizer(task: FineTune) -> torch.optim.AdamW:
    """A fresh AdamW over the adapters of a task, with the Trainer's defaults."""
    parameters = [weight for target in task.adapted()[1] for weight in (target.weight_a, target.weight_b)]
    return torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0, fused=True)


class Episode:
    """One run of a task.

    Args:
        task: what is fine-tuned.
        schedule: when ranks are decided.

    All episodes of a model share it and take turns: one that goes on keeps aside what another has left there, and puts
    its own factors back.
    """

    def __init__(self, task: FineTune, schedule: DecisionSchedule) -> None:
        self.task = task
        self.model, self.targets = task.adapted()
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._take_model()
        result = probe_task(task, schedule)
        reset_adapters(self.targets, 1, task.seed)
        self.applier: PlanApplier[PeftAdapters] = new_applier(
            task, PeftAdapters(self.model, self.targets), schedule, result
        )
        self.optimizer = _optimizer(task)
        self.step: int = 0
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _take_model(self) -> None:
        """Put this episode's factors into the model, if another episode has taken it since."""
        base = self.model.get_base_model()
        last = _holders.get(base)
        holder = last and last()
        if holder is self:
            return
        if holder:
            holder._kept = [(t.weight_a.detach().clone(), t.weight_b.detach().clone()) for t in holder.targets]
        _holders[base] = ref(self)
        for target, (weight_a, weight_b) in zip(self.targets, self._kept, strict=bool(self._kept)):
            resize(target, len(weight_a))
            write_in_place(target.weight_a, weight_a)
            write_in_place(target.weight_b, weight_b)

    def observe(self, interval_loss: float | None = None) -> Observation:
        """The next decision's input."""
        self._take_model()
        return self.applier.observe(self.step, interval_loss)

    def apply(self, decision: Decision) -> Plan:
        """Take a decision."""
        self._take_model()
        return self.applier.apply(decision, self.step, self.optimizer)

    @property
    def until(self) -> int:
        """The step before which the next decision falls, or the end."""
        return self.applier.until

    def advance(self) -> float:
        """Train until the next decision or the end; returns the mean training loss.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        return self._train(self.until, signals=not self.applier.finished)

    def _train(self, until: int, *, signals: bool) -> float:
        self._take_model()
        losses = []
        for step in range(self.step, until):
            loss = self.task.train_loss(self.model, step)
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise NonFiniteError(f"The loss of step {step} of task {self.task.id} is {losses[-1]}.")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
            if signals:
                self.applier.adapters.meter.accumulate()
            for group in self.optimizer.param_groups:
                group["lr"] = rate_at(self.task.learning_rate, step, self.task.steps)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step = until
        return float(np.mean(losses))

    def run_fixed(self, ranks: IntArray) -> float:
        """Train the whole task at fixed ranks, off the ladder if need be; returns the held-out loss."""
        self._take_model()
        plan = dict(zip(self.applier.names, ranks.tolist(), strict=True))
        set_ranks(self.targets, plan, seed=self.task.seed)
        self._train(self.task.steps, signals=False)
        return self.held_out_loss()

    def held_out_loss(self) -> float:
        """Loss on the held-out set, now."""
        self._take_model()
        return self.task.held_out_loss(self.model)


def reference_of(task: FineTune, schedule: DecisionSchedule) -> Reference:
    """What fixed allocations of a task achieve; runs the uniform one, once, if the task does not know.

    Raises:
        ConfigError: the held-out loss is not finite before training.
    """
    return task.reference or found_once(task, "reference", lambda: _measured_reference(task, schedule))


def _measured_reference(task: FineTune, schedule: DecisionSchedule) -> Reference:
    episode = Episode(task, schedule)
    initial = _initial_loss(episode)
    try:
        uniform = episode.run_fixed(uniform_ranks(episode.applier.problem()))
    except NonFiniteError:
        uniform = np.nan
    return Reference(initial, uniform if np.isfinite(uniform) else initial)  # a run that failed gained nothing


def _initial_loss(episode: Episode) -> float:
    """The held-out loss before training; ConfigError if it is not finite, since no loss can be compared with it."""
    initial = episode.held_out_loss()
    if not np.isfinite(initial):
        raise ConfigError(
            f"The held-out loss of task {episode.task.id} is {initial} before training, so nothing can be compared "
            "with it. It has to be finite: check that the held-out rows hold labels that count (not all of them -100), "
            "and that the model's weights are finite."
        )
    return initial


def rule_losses(task: FineTune, schedule: DecisionSchedule, rule: str) -> tuple[float, float]:
    """Held-out losses of a rule's run of a task, NaN if it failed, and before training; see `reference_of`."""
    return found_once(task, (rule, schedule), lambda: _rule_losses(task, schedule, rule))


def _rule_losses(task: FineTune, schedule: DecisionSchedule, rule: str) -> tuple[float, float]:
    episode = Episode(task, schedule)
    initial, loss = _initial_loss(episode), None
    try:
        while episode.step < task.steps:
            episode.apply(find_rule(rule).decide(episode.observe(loss)))
            loss = episode.advance()
    except NonFiniteError:
        return np.nan, initial
    return episode.held_out_loss(), initial


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
        applier: link to the adapters.
        observation: the first one.

    Attributes:
        observation: the latest one, with the plans that it allows.
        churn: cost of the rungs that were moved after the first decision, so far.
    """

    reference: Reference
    task: str
    observation: Observation

    def __init__(self, task: str, reference: Reference, applier: PlanApplier[Any], observation: Observation) -> None:
        self.task, self.reference, self.observation = task, reference, observation
        self.churn: float = 0.0
        self._applier = applier
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
        """The applier has applied a decision, and training has gone on to a step.

        Args:
            step: optimizer steps done.
            loss: mean training loss since the decision; None if it was not finite.
            observation: the next one; at the end the last one again.
        """
        self._problem = self._applier.problem()
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
        labels = kinds_in_layers(self._applier.names, layers)
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
        problem, unit = self._problem, self._applier.cost.unit
        parts = [f"step {self._step} of {self._applier.total_steps}"]
        limit = format_bytes(problem.limit) if unit == "bytes" else f"{problem.limit:,.0f} {unit}"
        if self._decided:
            parts.append(f"loss {math.nan if self._loss is None else self._loss:.3f}")
            parts.append(f"{100 * plan_cost(problem.cost, problem.ranks) / problem.limit:.1f} % of {limit}")
        else:
            parts.append(f"no plan yet for {limit}")
        if self._held_out is not None:
            parts.append(f"held-out loss {self._held_out:.3f} (uniform {self.reference.uniform:.3f})")
        return ", ".join(parts)
