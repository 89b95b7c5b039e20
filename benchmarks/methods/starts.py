"""Other ways to begin: EVA, GoRA's style, and MiSS in place of LoRA.

EVA (Paischer et al., 2024, arXiv 2410.07170), from PEFT: ranks and A from the singular vectors of activations.

GoRA's style (He et al., 2025, arXiv 2502.12171): a few batches give the gradient G of each frozen weight W. A module's
importance is the mean of |W G|; ranks share out the budget of a mean rank in proportion to it, each rank counted as
sqrt(d_in + d_out), between half and four times the mean rank. B begins at the best approximation of the negative
gradient in the row space of A, as small as one step. Written from the paper, with a scale of B that does not depend on
the loss: not the authors' code.

MiSS (Kang and Yin, 2024, arXiv 2409.15371), from PEFT: one trained matrix a module, in place of LoRA's two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import EvaConfig, MissConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from rankpilot.data.task import KINDS
from rankpilot.lora.targets import TargetModule, find_target_modules
from torch.utils.data import DataLoader

from .plans import at_rank, blocks, deepest, deepest_measured, depth, ending, module_names, window
from .rows import Work, plan_ranks, plan_text
from .study import DoesNotFitError, Group, Modules, Outcome, Study
from .tasks import Cell
from .texts import load_data
from .training import Driver, adapted_model, by_name, new_base, new_loader

BATCHES = 8
"""Batches whose activations or gradients are looked at, at most."""

RHO = 2.0
"""A module has at most so many times the mean rank."""

RANK = 8
"""The mean rank."""

POOLER = ("pooler.dense",)
"""Left out: PEFT's EVA cannot read its inputs, a slice of a tensor ("view size is not compatible")."""


def _inputs(layer_input: Any, places: torch.Tensor, name: str) -> torch.Tensor:
    """What a module reads, one row a token; some modules, such as BERT's pooler, read one token of each text.

    Args:
        layer_input: the module's inputs.
        places: row and column of each token that is no padding, (tokens, 2).
        name: of the module.
    """
    states: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    return states if states.dim() == 2 else states[places.T.unbind()]


class EvaDriver(Driver):
    """Plain LoRA from EVA's start; see `Driver`.

    Args:
        work: with the arguments plan (mean ranks) and seed.
    """

    def __init__(self, work: Work) -> None:
        ranks, names = plan_ranks(work.get("plan")), module_names(work.task)
        start = time.process_time()
        eva = EvaConfig(rho=RHO, use_label_mask=False)
        model = adapted_model(
            work.task, work.get("seed"), by_name(ranks, names), init_lora_weights="eva", eva_config=eva
        )
        loader: DataLoader[Any] = new_loader(work.task, load_data(work.task), work.get("seed"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(work.get("seed"))
            initialize_lora_eva_weights(
                model,
                [dict(batch) for batch in islice(loader, BATCHES)],
                prepare_layer_inputs_fn=_inputs,
                show_progress_bar=False,
            )
        self._seconds = time.process_time() - start
        given = {target.name: target.rank for target in find_target_modules(model)}
        for parameter in (p for target in find_target_modules(model) for p in target.parameters.values()):
            parameter.requires_grad_(True)
        super().__init__(model.train(), np.array([given.get(name, 0) for name in names]))

    def finish(self) -> dict[str, Any]:
        """What the start took."""
        return {"setup_s": round(self._seconds, 3)}


@dataclass(frozen=True)
class Eva:
    """EVA at a mean rank of 8, on as many top layers as fit even if all had twice that, or else at that."""

    name: str = "eva"
    group: Group = "adaptive"
    description: str = "EVA: ranks and start from the activations, mean rank 8 on as many top layers as fit"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        layers = deepest(modules, cell.budget, int(RANK * RHO)) or deepest(modules, cell.budget, RANK)
        ranks = np.where(ending(modules, POOLER), 0, window(modules, layers, RANK))
        if not ranks.any():
            raise DoesNotFitError
        plan = plan_text(ranks)
        return study.outcome(cell, lambda rate, seed: study.training(cell.task, "eva", rate, seed, plan=plan))


SHARE = 0.05
"""Norm of the first change of a weight in GoRA's style over the norm of the weight, by the paper's gamma."""

LEAST, MOST = RANK // 2, 4 * RANK


def shared_out(importance: dict[str, float], sizes: dict[str, int]) -> dict[str, int]:
    """Ranks in proportion to importance, within the budget of the mean rank.

    Args:
        importance: of each module, by name.
        sizes: d_in + d_out of each.
    """
    roots = {name: float(np.sqrt(size)) for name, size in sizes.items()}
    budget, total = RANK * sum(roots.values()), sum(importance.values()) or 1.0
    wanted = {name: budget * value / total / roots[name] for name, value in importance.items()}
    return {name: int(np.clip(round(rank), LEAST, MOST)) for name, rank in wanted.items()}


def _gradients(work: Work, model: PeftModel, targets: list[TargetModule]) -> dict[str, torch.Tensor]:
    """The gradient of each frozen weight over a few batches, as (d_out, d_in)."""
    weights = {target.name: target.layer.get_base_layer() for target in targets}
    loader = new_loader(work.task, load_data(work.task), work.get("seed"))
    for layer in weights.values():
        layer.weight.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.get("seed"))
        for batch in islice(loader, BATCHES):
            (model(**batch).loss / BATCHES).backward()
    gradients = {}
    for name, layer in weights.items():
        gradients[name] = layer.weight.grad.T if type(layer).__name__ == "Conv1D" else layer.weight.grad
        layer.weight.requires_grad_(False)
    model.zero_grad()
    for layer in weights.values():
        layer.weight.grad = None
    return gradients


class GoraDriver(Driver):
    """Plain LoRA from a start in GoRA's style; see `Driver`.

    Args:
        work: with the arguments plan (mean ranks) and seed.
    """

    def __init__(self, work: Work) -> None:
        start, names, seed = time.process_time(), module_names(work.task), work.get("seed")
        mean = by_name(plan_ranks(work.get("plan")), names)
        model = adapted_model(work.task, seed, mean)
        targets = find_target_modules(model)
        gradients = _gradients(work, model, targets)
        importance = {target.name: _importance(target, gradients[target.name]) for target in targets}
        ranks = shared_out(importance, {target.name: target.d_in + target.d_out for target in targets})
        ranks = {target.name: min(ranks[target.name], target.max_rank) for target in targets}
        model = adapted_model(work.task, seed, ranks)
        for target in find_target_modules(model):
            _start(target, gradients[target.name])
        self._seconds = time.process_time() - start
        super().__init__(model, np.array([ranks.get(name, 0) for name in names]))

    def finish(self) -> dict[str, Any]:
        """What the start took."""
        return {"setup_s": round(self._seconds, 3)}


def _importance(target: TargetModule, gradient: torch.Tensor) -> float:
    layer = target.layer.get_base_layer()
    weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
    return float((weight.detach() * gradient).abs().mean())


@torch.no_grad()
def _start(target: TargetModule, gradient: torch.Tensor) -> None:
    """Let B A begin at the part of the negative gradient that A can express."""
    a = target.weight_a
    b = -gradient @ torch.linalg.pinv(a)
    size = torch.linalg.norm(b @ a) * target.scaling
    base = target.layer.get_base_layer().weight
    if size > 0:
        target.weight_b.copy_(b * (SHARE / np.sqrt(max(base.shape)) * torch.linalg.norm(base) / size))


@dataclass(frozen=True)
class Gora:
    """GoRA's style at a mean rank of 8, on as many top layers as fit at twice that, or else at that."""

    name: str = "gora-style"
    group: Group = "adaptive"
    description: str = "in the style of GoRA: ranks and start from gradients, mean rank 8 on as many top layers as fit"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        layers = most_layers(modules, cell.budget)
        if not layers:
            raise DoesNotFitError
        plan = plan_text(at_rank(modules, blocks(modules) >= depth(modules) - layers, RANK))
        return study.outcome(cell, lambda rate, seed: study.training(cell.task, "gora", rate, seed, plan=plan))


def most_layers(modules: Modules, budget: str) -> int:
    """How many top layers fit when ranks are twice the mean, or else at the mean."""
    return deepest(modules, budget, 2 * RANK) or deepest(modules, budget, RANK)


MISS_RANK = 16
"""Its matrix has rank x d_out numbers: about as many as LoRA's rank 8."""


def miss(work: Work) -> Driver:
    """MiSS on the modules of the argument `plan`, which have one rank."""
    ranks, task, seed = plan_ranks(work.get("plan")), work.task, work.get("seed")
    kind = KINDS[task.kind]
    base = new_base(task, load_data(task).labels, seed)
    config = MissConfig(r=MISS_RANK, target_modules=list(by_name(ranks, module_names(task))), task_type=kind.peft_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MissDriver(get_peft_model(base, config).train(), ranks)


class _MissDriver(Driver):
    """Its bytes are not LoRA's, and no model predicts them."""

    def finish(self) -> dict[str, Any]:
        """No bytes are predicted."""
        return {"predicted": None}


@dataclass(frozen=True)
class Miss:
    """MiSS on as many top layers as fit, as its steps are measured."""

    name: str = "miss"
    group: Group = "peer"
    description: str = "MiSS, rank 16, on as many top layers as fit"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        if cell.task.model.startswith("gpt2"):  # PEFT has no MiSS for Conv1D
            raise DoesNotFitError
        layers = deepest_measured(study, cell, deepest(modules, cell.budget, 1), "miss", MISS_RANK)
        if not layers:
            raise DoesNotFitError
        plan = plan_text(window(modules, layers, MISS_RANK))
        return study.outcome(cell, lambda rate, seed: study.training(cell.task, "miss", rate, seed, plan=plan))
