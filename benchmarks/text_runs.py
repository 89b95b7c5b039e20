"""What fine-tunes of benchmarks share: models with adapters, batches, the course of the rate, the held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rankpilot.common.arrays import BoolArray
from rankpilot.data.models import load_model, load_tokenizer
from rankpilot.data.task import KINDS
from rankpilot.decide.observation import ModuleShapes
from rankpilot.decide.plan.rate import RateRule
from rankpilot.env.bases import load_base_model
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.peft_config import fresh_adapters
from rankpilot.lora.spec import REFERENCE_RANK, ModuleSpec
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .texts import PACKAGED, TaskData, TextTask, load_data, reads_bytes

WARMUP = 0.1
"""Share of the steps in which the learning rate rises along a line; from then on it falls along one, to 0."""

CLIP = 1.0
"""The largest norm of a step's gradient."""

ALPHA = 16
"""`lora_alpha` of every module, as PEFT has it by default when ranks differ: the scaling is alpha / rank."""

AROUND = RateRule(1.2274e-3, of_width=-0.48, of_steps=-0.1, of_tokens=0.2, of_loss=0.48, of_rank=-0.8)
"""The rule around which rates are drawn and swept: an earlier one, so that rows stay as they are when the rule changes.
"""

KIND = KINDS["causal-lm"]

_CUT = {"smollm2-15": 15, "smollm2-8": 8}
"""How many of its lower layers are kept, where not all are."""


def new_base(model: str, seed: int) -> PreTrainedModel:
    """A model without adapters, in fp32 and training mode.

    Args:
        model: see `TextTask`.
        seed: of whatever is drawn while it is loaded.
    """
    if reads_bytes(model):
        return load_base_model(model).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = load_model(PACKAGED, "causal-lm", (), load_tokenizer(PACKAGED))
    if model in _CUT:
        body: Any = found.base_model
        body.layers = body.layers[: _CUT[model]]
        found.config.num_hidden_layers = _CUT[model]
    return found.float().train()


def adapted_model(task: TextTask, seed: int, ranks: dict[str, int] | None = None, **options: Any) -> PeftModel:
    """The task's model with fresh LoRA adapters, in training mode.

    Args:
        task: decides the model.
        seed: of the adapters.
        ranks: of the adapted modules, by name; None for the reference rank on all linear ones.
        options: further ones of LoraConfig.
    """
    base = new_base(task.model, seed)
    plan: dict[str, Any] = {"target_modules": "all-linear", "r": REFERENCE_RANK, "lora_alpha": ALPHA}
    if ranks is not None:
        first = next(iter(ranks.values()))
        plan |= {"target_modules": ",".join(ranks), "r": first}
        plan["rank_pattern"] = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != first}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fresh_adapters(base, task.model, KIND.peft_type, new_head=False, **plan | options).train()


def new_loader(task: TextTask, data: TaskData, seed: int) -> DataLoader[Any]:
    """The batches of a run, the same for each method: whole passes over the rows, each in an order of its own."""
    generator = np.random.default_rng([seed, 7])
    wanted, rows = task.steps * task.rows, len(data.train)
    passes = [generator.permutation(rows) for _ in range(math.ceil(wanted / rows))]
    order = np.concatenate(passes)[:wanted].tolist()
    return DataLoader(data.train, task.rows, sampler=order, collate_fn=data.collate)


def factor_at(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)


def training_run(task: TextTask, model: PeftModel, rate: float, seed: int) -> TrainingRun:
    """A run that is about to begin, as a plain loop gives it to rankpilot."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    loader = new_loader(task, load_data(task), seed)
    return TrainingRun.of_loader(model, optimizer, loader, total_steps=task.steps)


@torch.no_grad()
def held_out_loss(model: PeftModel, data: TaskData, task: TextTask) -> float:
    """Mean loss of a token of the held-out rows, without regularisers of a method; the random state stays as it is."""
    base: Any = model.get_base_model()
    base.eval()
    losses, weights, rows = [], [], data.held_out
    for first in range(0, len(rows), 2 * task.rows):
        batch = data.collate([rows[index] for index in range(first, min(first + 2 * task.rows, len(rows)))])
        weights.append(int((batch["labels"][:, 1:] != -100).sum()))
        losses.append(float(base(**batch).loss) * weights[-1])
    base.train()
    return sum(losses) / sum(weights)


# Parts of a model -----------------------------------------------------------------------------------------------------

Part = Callable[[Sequence[ModuleSpec]], BoolArray]
"""Chooses modules, bool (modules,)."""


def _heights(modules: Sequence[ModuleSpec]) -> Any:
    """How many layers are above each module, (modules,)."""
    blocks = np.array([module.block for module in modules])
    return blocks.max() - blocks


def everything(modules: Sequence[ModuleSpec]) -> BoolArray:
    """All modules."""
    return np.full(len(modules), True)


def top(share: float) -> Part:
    """A share of the layers from the top down, rounded up."""

    def chosen(modules: Sequence[ModuleSpec]) -> BoolArray:
        heights = _heights(modules)
        return np.asarray(heights < math.ceil(share * (heights.max() + 1)))

    return chosen


def every_other_layer(modules: Sequence[ModuleSpec]) -> BoolArray:
    """The uppermost layer, and every second one below."""
    return np.asarray(_heights(modules) % 2 == 0)


def mlp(modules: Sequence[ModuleSpec]) -> BoolArray:
    """The modules of MLPs: they have the wide inner side of their layer, attention's do not."""
    return ModuleShapes.of(tuple(modules)).wide


def attention(modules: Sequence[ModuleSpec]) -> BoolArray:
    """All others."""
    return ~mlp(modules)


def ending(*ends: str) -> Part:
    """The modules whose names end so."""
    return lambda modules: np.array([module.name.endswith(ends) for module in modules])


def both(first: Part, second: Part) -> Part:
    """What is in both parts."""
    return lambda modules: first(modules) & second(modules)


def ranks_at(modules: Sequence[ModuleSpec], chosen: BoolArray, rank: int) -> dict[str, int]:
    """One rank on the chosen modules, or the most that a module can have, by name."""
    return {module.name: min(rank, module.max_rank) for module, adapted in zip(modules, chosen, strict=True) if adapted}
