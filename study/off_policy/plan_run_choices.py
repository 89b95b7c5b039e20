"""Plan runs as logged choices: the first decisions of a training's plan runs, with predictions by value ensembles.

Plans are taken in turn there, not drawn with known probabilities: restricted choice and the direct method apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...agents.learned.plan_value import Plans, PlanValueConfig, PlanValueEnsemble
from ...agents.training.fit_plan_value import FitConfig, PlanDataset, fit_value_ensemble, groups_of, standardised
from ...allocation.features import RUN_FEATURES
from ...common.arrays import FloatArray, IntArray
from ...errors import DataError
from .cross_fit import FOLDS, Predict, cross_fit
from .logged import LoggedChoices

_PROGRESS = RUN_FEATURES.index("progress")

PlanValues = Callable[[Plans], torch.Tensor]
"""Takes plans for one state, ranks (1, plans, modules); gives their values, (plans,)."""


@dataclass(frozen=True, eq=False)
class PlanRunChoices:
    """The first decisions of plan runs. Each could choose between the plans that were run for its task.

    Attributes:
        choices: one decision a run, task by task. Outcomes are plan values: standard deviations of the log loss between
            a task's plans, 0 for their mean.
        plans: what was seen of each task, and its distinct plans: one state each, ranks (1, plans, modules).
    """

    choices: LoggedChoices
    plans: tuple[Plans, ...]

    @classmethod
    def of(cls, dataset: PlanDataset) -> PlanRunChoices:
        """Read them from a data set of plan runs.

        Raises:
            DataError: there is no task whose first decision two runs share.
        """
        first = torch.nonzero(dataset.plans.run[:, _PROGRESS] == 0).squeeze(1)
        groups = [first[group] for group in groups_of(dataset.groups[first])]
        if not groups:
            raise DataError("There are no plan runs that share a task and a first decision.")
        parts = [torch.unique(dataset.plans.ranks[group, 0], dim=0, return_inverse=True) for group in groups]
        choices = LoggedChoices(
            tasks=dataset.tasks[torch.cat(groups)].tolist(),
            plans=np.concatenate([np.full(len(chosen), len(distinct)) for distinct, chosen in parts]),
            chosen=torch.cat([chosen for _, chosen in parts]).numpy(),
            outcomes=torch.cat([standardised(dataset.gains[group]) for group in groups]).double().numpy(),
        )
        seen = [dataset.plans[group[:1]] for group in groups]
        return cls(choices, tuple(replace(a, ranks=b[None]) for a, (b, _) in zip(seen, parts, strict=True)))

    def scores(self, values: PlanValues) -> FloatArray:
        """The values of all plans, laid out as in `choices`, (sum of plans,): what a target ranks them by."""
        return self._laid_out(values, np.arange(len(self.choices.plans)))

    def with_predictions(
        self,
        dataset: PlanDataset,
        *,
        config: PlanValueConfig | None = None,
        fit: FitConfig | None = None,
        folds: int = FOLDS,
        seed: int = 0,
        workers: int = 1,
    ) -> PlanRunChoices:
        """The same with predictions by value ensembles, each fitted to the plan runs of other tasks.

        Args:
            dataset: the plan runs; later decisions of other tasks teach an ensemble, too.
            config: size of the ensembles.
            fit: how they are fitted.
            folds: see `cross_fit`.
            seed: decides folds and fits.
            workers: processes of a fit.

        Raises:
            ConfigError: folds out of range.
        """
        tasks = torch.tensor(self.choices.tasks)

        def fit_to(decisions: IntArray) -> Predict:
            ensemble = PlanValueEnsemble(config)
            rows = torch.isin(dataset.tasks, tasks[torch.from_numpy(decisions)])
            fit_value_ensemble(ensemble, dataset[rows], seed=seed, fit=fit, workers=workers)

            def value(plans: Plans) -> torch.Tensor:
                values: torch.Tensor = ensemble(plans).mean(dim=0)[0]
                return values - values.mean()

            return lambda held_out: self._laid_out(value, held_out)

        return replace(self, choices=cross_fit(self.choices, fit_to, folds=folds, seed=seed))

    @torch.no_grad()
    def _laid_out(self, values: PlanValues, decisions: IntArray) -> FloatArray:
        """The values of the plans of some decisions, one decision after another."""
        number = self._state_of[decisions]
        of_state = {state: values(self.plans[state]).double().numpy() for state in np.unique(number).tolist()}
        return np.concatenate([of_state[state] for state in number.tolist()])

    @property
    def _state_of(self) -> IntArray:
        """The place in `plans` of each decision's task, (decisions,)."""
        tasks = self.choices.task_numbers
        return np.asarray(np.cumsum(np.diff(tasks, prepend=tasks[0]) != 0))
