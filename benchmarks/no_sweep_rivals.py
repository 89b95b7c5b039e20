"""Other ways to fine-tune within the bytes of plain LoRA, each once, at the rate that its user has without a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from rankpilot.common.errors import ConfigError
from rankpilot.lora.spec import REFERENCE_RANK
from rankpilot.lora.targets import find_target_modules

from .text_runs import ALPHA, AROUND, KIND, Part, adapted_model, everything, mlp, new_base, new_loader, ranks_at, top
from .texts import TextTask, load_data

LORAPLUS_RATIO = 16.0
"""The rate of B over that of A, as its authors advise; their geometric mean is plain LoRA's rate."""

EVA_BATCHES = 8
"""Batches whose activations EVA looks at, at most."""

EVA_RHO = 2.0
"""A module has at most so many times the mean rank under EVA."""

ALLOCATIONS = 20
"""Allocations of AdaLoRA between the phases before and after."""

FROZEN_FROM = 0.7
"""The share of the steps after which the lower half of the layers is frozen."""


def _adamw(model: PeftModel, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=rate, weight_decay=0.0)


def _loraplus(model: PeftModel, rate: float) -> torch.optim.Optimizer:
    """LoRA+ (Hayou, Ghosh and Yu, 2024, arXiv 2402.12354), from PEFT."""
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=rate * LORAPLUS_RATIO**-0.5,
        loraplus_lr_ratio=LORAPLUS_RATIO,
        weight_decay=0.0,
    )
    return optimizer


def _prodigy(model: PeftModel, rate: float) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio, 2023, arXiv 2306.06101) with its defaults: it finds the rate itself."""
    try:
        from prodigyopt import Prodigy  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("The rival prodigy needs `pip install prodigyopt` (the extra `bench`).") from error
    optimizer: torch.optim.Optimizer = Prodigy(_trained(model))
    return optimizer


def _trained(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


Ranks = dict[str, int]
"""The rank of each adapted module, by name."""


def _plain(task: TextTask, ranks: Ranks, seed: int) -> PeftModel:
    return adapted_model(task, seed, ranks)


def _adalora(task: TextTask, ranks: Ranks, seed: int) -> PeftModel:
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512), from PEFT: from `ranks` down to a mean of `REFERENCE_RANK`."""
    config = AdaLoraConfig(
        init_r=max(ranks.values()),
        target_r=REFERENCE_RANK,
        lora_alpha=ALPHA,
        target_modules=list(ranks),
        task_type=KIND.peft_type,
        total_step=task.steps,
        tinit=max(1, task.steps // 10),
        tfinal=max(1, task.steps // 4),
        deltaT=max(1, task.steps // (2 * ALLOCATIONS)),
    )
    base = new_base(task.model, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, config).train()


def _eva(task: TextTask, ranks: Ranks, seed: int) -> PeftModel:
    """EVA (Paischer et al., 2024, arXiv 2410.07170), from PEFT: ranks and A from singular vectors of activations."""
    eva = EvaConfig(rho=EVA_RHO, use_label_mask=False)
    model = adapted_model(task, seed, ranks, init_lora_weights="eva", eva_config=eva)
    loader = new_loader(task, load_data(task), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialize_lora_eva_weights(
            model, [dict(batch) for batch in islice(loader, EVA_BATCHES)], show_progress_bar=False
        )
    for target in find_target_modules(model):
        for parameter in target.parameters.values():
            parameter.requires_grad_(True)
    return model.train()


def _nothing(model: PeftModel, task: TextTask, step: int) -> None:
    """Ranks stay."""


def _allocate(model: PeftModel, task: TextTask, step: int) -> None:
    """Importance of every weight, and an allocation where one is due."""
    tuner: Any = model.base_model
    tuner.update_and_allocate(step)


def _freeze(model: PeftModel, task: TextTask, step: int) -> None:
    """Freeze the lower half of the layers from `FROZEN_FROM` on, so that the backward pass ends above it."""
    if step != round(FROZEN_FROM * task.steps):
        return
    targets = find_target_modules(model)
    blocks = sorted({target.block for target in targets})
    for target in targets:
        if target.block in blocks[: len(blocks) // 2]:
            for parameter in target.parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None


@dataclass(frozen=True)
class Rival:
    """One way to fine-tune.

    Attributes:
        part: the modules that it adapts, at a mean rank of 8.
        model: makes the model from the task, the ranks of the start and the seed.
        optimizer: made of the model and the rate that the rule gives the plan.
        stepped: is called after each step of the optimizer, while gradients are there.
        start: rank of each module at the start.
    """

    part: Part = everything
    model: Callable[[TextTask, Ranks, int], PeftModel] = _plain
    optimizer: Callable[[PeftModel, float], torch.optim.Optimizer] = _adamw
    stepped: Callable[[PeftModel, TextTask, int], None] = _nothing
    start: int = REFERENCE_RANK

    def ready(self, task: TextTask, seed: int, plain_rate: float) -> tuple[PeftModel, torch.optim.Optimizer]:
        """Model and optimizer of a run.

        Args:
            task: what is trained.
            seed: of the adapters.
            plain_rate: what the rule says for plain LoRA.
        """
        modules = find_target_modules(adapted_model(task, 0))
        chosen = self.part(modules)
        most = np.array([module.max_rank for module in modules])
        ranks = np.where(chosen, np.minimum(REFERENCE_RANK, most), 0).astype(np.int64)
        scale = np.full(len(modules), ALPHA / REFERENCE_RANK)
        model = self.model(task, ranks_at(modules, chosen, self.start), seed)
        return model, self.optimizer(model, plain_rate * AROUND.factor(ranks, scale, scale))


RIVALS = {
    "half frozen": Rival(stepped=_freeze),
    "MLPs": Rival(mlp),
    "top 3/4": Rival(top(0.75)),
    "LoRA+": Rival(optimizer=_loraplus),
    "Prodigy": Rival(optimizer=_prodigy),
    "AdaLoRA": Rival(model=_adalora, stepped=_allocate, start=12),
    "EVA": Rival(model=_eva),
}
"""Rivals by name. AdaLoRA begins with 12 components a module and ends with 8, as its authors have it."""


@contextmanager
def each_step(optimizer: torch.optim.Optimizer, tell: Callable[[int], None]) -> Iterator[None]:
    """Call something with the number of each step of an optimizer, from 1 on."""
    steps = 0

    def stepped(*_: object) -> None:
        nonlocal steps
        steps += 1
        tell(steps)

    hook = optimizer.register_step_post_hook(stepped)
    try:
        yield
    finally:
        hook.remove()
