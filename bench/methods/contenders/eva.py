"""EVA (Paischer et al., 2024, arXiv 2410.07170), from PEFT: ranks and A from the singular vectors of activations."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import EvaConfig, initialize_lora_eva_weights
from torch.utils.data import DataLoader

from ....lora.targets import find_target_modules
from ..loop import Driver, new_loader
from ..method import Group
from ..ranks import plan_ranks, plan_text
from ..study import DoesNotFitError, Outcome, Study
from ..tasks import Cell
from ..texts import load_data
from ..work import Work, adapted_model, by_name
from .modules import deepest, ending, module_names, window

BATCHES = 8
"""Batches whose activations are looked at, at most."""

RHO = 2.0
"""A module has at most so many times the mean rank."""

RANK = 8

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


EVA = Eva()
