"""A search by Optuna's TPE (Bergstra et al., 2011) over windows, ranks of attention and MLP, and the learning rate.

It has about the compute that `simple` spends on tuning: as many trainings, on the same tuning seeds. What it finds is
then run on the result seeds. Plans that do not fit cost it nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rankpilot.common.arrays import IntArray
from rankpilot.cost.cost import cost_from_state
from rankpilot.errors import UnsupportedError
from rankpilot.lora.spec import ModuleSpec

from .plans import at_rank, blocks, depth, mlp
from .rows import Work, plan_ranks, plan_text
from .study import Group, Modules, Outcome, Study, loss_or_inf
from .tasks import Cell

RANKS = (0, 4, 8, 16, 32, 64)
FACTORS = (-2, -1, 0, 1, 2)
"""Powers of 2 around the task's rate."""

MOST_ASKED = 20
"""Proposals for each training at most: most of them may not fit."""


def search(work: Work, perform: Callable[[Work], dict[str, Any]]) -> dict[str, Any]:
    """Search on the tuning seeds of the argument `seeds` within `budget`, with so many `trials`; `perform` trains.

    Raises:
        UnsupportedError: Optuna is not installed.
    """
    optuna = _optuna()
    costs = perform(Work.of("costs", work.task))
    specs = tuple(ModuleSpec(*fields) for fields in costs["modules"])
    modules = Modules(specs, cost_from_state(costs["cost"]), costs["reference"])
    problem, seeds = modules.problem(work.get("budget")), [int(seed) for seed in work.get("seeds").split()]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    tried: list[dict[str, Any]] = []
    for _ in range(MOST_ASKED * work.get("trials")):
        if len(tried) == work.get("trials"):
            break
        trial = study.ask()
        plan = _proposed(trial, modules)
        if not plan.any() or not problem.fits(plan):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        rate = work.task.rate * 2.0 ** trial.suggest_categorical("factor", FACTORS)
        loss = float(np.mean([_loss(work, perform, plan, rate, seed) for seed in seeds]))
        study.tell(trial, loss if np.isfinite(loss) else 1e3)
        tried.append({"plan": plan_text(plan), "rate": rate, "loss": loss if np.isfinite(loss) else None})
    best = min(tried, key=loss_or_inf)
    return {"plan": best["plan"], "rate": best["rate"], "tried": tried}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UnsupportedError("The search needs Optuna: pip install 'rankpilot[bench]', or leave out tpe.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _proposed(trial: Any, modules: Modules) -> IntArray:
    """Ranks of attention and of MLP on neighbouring layers."""
    layers = depth(modules)
    top = trial.suggest_int("top", 1, layers)
    bottom = trial.suggest_int("bottom", 0, layers - 1)
    of_layer, of_mlp = blocks(modules), mlp(modules)
    inside = (of_layer < top) & (of_layer >= min(bottom, top - 1))
    ranks = {kind: trial.suggest_categorical(kind, RANKS) for kind in ("attention", "mlp")}
    return at_rank(modules, inside & ~of_mlp, ranks["attention"]) + at_rank(modules, inside & of_mlp, ranks["mlp"])


def _loss(work: Work, perform: Callable[[Work], dict[str, Any]], plan: IntArray, rate: float, seed: int) -> float:
    arguments: dict[str, Any] = {"plan": plan_text(plan), "rate": rate, "seed": seed, "tuning": True}
    return loss_or_inf(perform(Work.of("train", work.task, trainer="lora", **arguments)))


@dataclass(frozen=True)
class Tpe:
    """The plan and the rate that TPE finds."""

    name: str = "tpe"
    group: Group = "search"
    description: str = "Optuna's TPE over windows, ranks and rates, with the compute of simple's tuning"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        seeds = " ".join(map(str, study.suite.tuning_seeds))
        made = Work.of("search", cell.task, budget=cell.budget, trials=study.suite.trials, seeds=seeds)
        found = study.result(made)
        plan = plan_ranks(found["plan"])
        return study.runs(
            cell, lambda rate, seed: study.plan_run(cell.task, plan, rate, seed), found["rate"], frozenset([made])
        )


TPE = Tpe()
