"""Other ways to fine-tune within the bytes of plain LoRA, each once, at the rate that its user has without a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft.optimizers import create_loraplus_optimizer
from rankpilot.cost.cost import ParameterCost
from rankpilot.errors import ConfigError
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.lora.targets import find_target_modules
from rankpilot.plan.rate import RULE

from .methods import study
from .methods.adalora import AdaLoraDriver
from .methods.plans import Part, at_rank, everything, mlp, plain_lora, top
from .methods.rows import Work, plan_text
from .methods.starts import EvaDriver
from .methods.tasks import MethodTask
from .methods.training import ALPHA, Driver, adapted_model

LORAPLUS_RATIO = 16.0
"""The rate of B over that of A, as its authors advise; their geometric mean is plain LoRA's rate."""


def _adamw(driver: Driver, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(driver.parameters(), lr=rate, weight_decay=0.0)


def _loraplus(driver: Driver, rate: float) -> torch.optim.Optimizer:
    """LoRA+ (Hayou, Ghosh and Yu, 2024, arXiv 2402.12354), from PEFT."""
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        driver.model,
        torch.optim.AdamW,
        lr=rate * LORAPLUS_RATIO**-0.5,
        loraplus_lr_ratio=LORAPLUS_RATIO,
        weight_decay=0.0,
    )
    return optimizer


def _prodigy(driver: Driver, rate: float) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio, 2023, arXiv 2306.06101) with its defaults: it finds the rate itself."""
    try:
        from prodigyopt import Prodigy  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("The rival prodigy needs `pip install prodigyopt` (the extra `bench`).") from error
    optimizer: torch.optim.Optimizer = Prodigy(driver.parameters())
    return optimizer


@dataclass(frozen=True)
class Rival:
    """One way to fine-tune.

    Attributes:
        part: the modules that it adapts, at a mean rank of 8.
        driver: makes model and driver from work with the arguments plan, target and seed.
        optimizer: from the driver and the rate that the rule gives the plan.
        start: rank of each module at the start.
    """

    part: Part = everything
    driver: Callable[[Work], Driver] = plain_lora
    optimizer: Callable[[Driver, float], torch.optim.Optimizer] = _adamw
    start: int = REFERENCE_RANK

    def ready(self, task: MethodTask, seed: int, plain_rate: float) -> tuple[Driver, torch.optim.Optimizer]:
        """Model and optimizer of a run.

        Args:
            task: what is trained.
            seed: of the adapters.
            plain_rate: what the rule says for plain LoRA.
        """
        specs = tuple(find_target_modules(adapted_model(task, 0)))
        modules = study.Modules(specs, ParameterCost.of(specs), 0.0)
        chosen = self.part(modules)
        plan = plan_text(at_rank(modules, chosen, self.start))
        ranks, scale = at_rank(modules, chosen, REFERENCE_RANK), np.full(len(specs), ALPHA / REFERENCE_RANK)
        work = Work.of("train", task, plan=plan, target=REFERENCE_RANK, seed=seed)
        driver = self.driver(work)
        return driver, self.optimizer(driver, plain_rate * RULE.factor(ranks, scale, scale))


FROZEN_FROM = 0.7
"""The share of the steps after which the lower half of the layers is frozen."""


class HalfFrozen(Driver):
    """Plain LoRA whose lower half stays as it is from `FROZEN_FROM` on, so that the backward pass ends above it."""

    def __init__(self, work: Work) -> None:
        plain = plain_lora(work)
        super().__init__(plain.model, plain.ranks())
        self._last = round(FROZEN_FROM * work.task.steps)

    def stepped(self, step: int) -> None:
        """Freeze at the step that is the last one for the lower half."""
        targets = find_target_modules(self.model)
        blocks = sorted({target.block for target in targets})
        for target in targets if step == self._last else ():
            if target.block in blocks[: len(blocks) // 2]:
                for parameter in target.parameters.values():
                    parameter.requires_grad_(False)
                    parameter.grad = None


RIVALS = {
    "half frozen": Rival(driver=HalfFrozen),
    "MLPs": Rival(mlp),
    "top 3/4": Rival(top(0.75)),
    "LoRA+": Rival(optimizer=_loraplus),
    "Prodigy": Rival(optimizer=_prodigy),
    "AdaLoRA": Rival(driver=AdaLoraDriver, start=12),
    "EVA": Rival(driver=EvaDriver),
}
"""Rivals by name. AdaLoRA begins with 12 components a module and ends with 8, as its authors have it."""


@contextmanager
def steps_of(driver: Driver, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Tell a driver of each step of an optimizer."""
    steps = 0

    def stepped(*_: object) -> None:
        nonlocal steps
        steps += 1
        driver.stepped(steps)

    hook = optimizer.register_step_post_hook(stepped)
    try:
        yield
    finally:
        hook.remove()
