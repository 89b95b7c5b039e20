"""One proxy fine-tune from probe to held-out loss, with ranks decided on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from ..errors import NonFiniteError
from ..lora.budget import Budget
from ..lora.calibration import calibrate
from ..lora.cost import ByteCost, FloatArray
from ..lora.ladder import IntArray
from ..lora.plan import Plan, PlanProblem, uniform_ranks
from ..lora.ranks import reset_adapters, set_ranks
from .controller import ProbeResult, RankController, budget_limit, probe
from .observation import Observation
from .schedule import DecisionSchedule
from .tasks import ProxyTask, TaskData, adapted_base, load_task


@dataclass(frozen=True)
class Baseline:
    """What the uniform run of a task achieves.

    Attributes:
        initial_loss: held-out loss before training.
        uniform_loss: held-out loss of the uniform run (`uniform_ranks`) with the same seed, batches and budget.
    """

    initial_loss: float
    uniform_loss: float

    def improvement(self, loss: float) -> float:
        """How much lower a loss is than the uniform run's, as a share of what the uniform run gained."""
        gained = max(self.initial_loss - self.uniform_loss, 0.01 * self.initial_loss, 1e-6)
        return (self.uniform_loss - loss) / gained


@lru_cache(maxsize=16)
def proxy_cost(base: str, batch_size: int, length: int) -> ByteCost:
    """Byte model of a proxy base at one batch shape."""
    model, targets = adapted_base(base)
    tokens = torch.zeros(batch_size, length, dtype=torch.int64)
    return calibrate(model, targets, {"input_ids": tokens, "labels": tokens}).cost()


@lru_cache(maxsize=64)
def proxy_probe(task: ProxyTask, schedule: DecisionSchedule) -> ProbeResult:
    """The probe of a task; every episode of the task starts from the same one."""
    model, targets = adapted_base(task.base)
    data = load_task(task)
    optimizer = proxy_optimizer(task)
    rows = min(schedule.probe_batch, task.batch_size)
    steps = (step % task.steps for step in range(schedule.probe_steps))
    losses = (partial(data.train_loss, model, step, rows) for step in steps)
    return probe(targets, optimizer, losses, seed=task.seed)


def proxy_optimizer(task: ProxyTask) -> torch.optim.AdamW:
    """A fresh AdamW over the adapters of a task's base, with the Trainer's defaults."""
    _, targets = adapted_base(task.base)
    parameters = [weight for target in targets for weight in (target.weight_a, target.weight_b)]
    return torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0, fused=True)


class Episode:
    """One run of a task.

    Args:
        task: what is fine-tuned.
        schedule: when ranks are decided.

    The proxy base is shared by all episodes of a process, so only one episode can be under way at a time.
    """

    def __init__(self, task: ProxyTask, schedule: DecisionSchedule) -> None:
        self.task = task
        self.data: TaskData = load_task(task)
        self.model, self.targets = adapted_base(task.base)
        cost = proxy_cost(task.base, task.batch_size, task.length)
        result = proxy_probe(task, schedule)
        reset_adapters(self.targets, 1, task.seed)
        max_ranks = np.array([target.max_rank for target in self.targets], dtype=np.int64)
        limit = budget_limit(Budget("share", task.budget), cost, max_ranks)
        self.controller = RankController(
            self.model, self.targets, cost, limit, schedule, task.steps, result, seed=task.seed
        )
        self.optimizer = proxy_optimizer(task)
        self.step = 0
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def observe(self, interval_loss: float | None = None) -> Observation:
        """The next decision's input."""
        return self.controller.observe(self.step, interval_loss)

    def apply(self, deltas: IntArray, scores: FloatArray) -> Plan:
        """Take a decision."""
        return self.controller.apply(deltas, scores, self.step, self.optimizer)

    def advance(self) -> float:
        """Train until the next decision or the end; returns the mean training loss.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        controller = self.controller
        until = self.task.steps if controller.finished else controller.decision_steps[controller.decision]
        return self._train(until, signals=not controller.finished)

    def _train(self, until: int, *, signals: bool) -> float:
        losses = []
        for step in range(self.step, until):
            loss = self.data.train_loss(self.model, step)
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise NonFiniteError(f"The loss of step {step} of task {self.task.id} is {losses[-1]}.")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            if signals:
                self.controller.meter.accumulate()
            for group in self.optimizer.param_groups:
                group["lr"] = self.task.learning_rate * (1 - step / self.task.steps)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step = until
        return float(np.mean(losses))

    def run_fixed(self, ranks: IntArray) -> float:
        """Train the whole task at fixed ranks, off the ladder if need be; returns the held-out loss."""
        names = self.controller.names
        plan = dict(zip(names, ranks.tolist(), strict=True))
        set_ranks(self.targets, plan, seed=self.task.seed)
        self._train(self.task.steps, signals=False)
        return self.held_out_loss()

    def held_out_loss(self) -> float:
        """Loss on the held-out set, now."""
        return self.data.held_out_loss(self.model)


@lru_cache(maxsize=512)
def baseline(task: ProxyTask, schedule: DecisionSchedule) -> Baseline:
    """Run a task's uniform baseline; remembered, since many episodes are compared with it."""
    episode = Episode(task, schedule)
    problem: PlanProblem = episode.controller.problem()
    initial = episode.held_out_loss()
    return Baseline(initial, episode.run_fixed(uniform_ranks(problem)))
