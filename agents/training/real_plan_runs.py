"""Plan runs of real fine-tunes in one file, which a training reads beside those of fresh proxies.

`python -m benchmarks plan-runs` makes the file. A task's runs share its seed and batches, and each had one decision,
before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...common.arrays import Arrays
from ...common.files import atomic_path, parse_json
from ...common.tensor_files import read_arrays
from ...errors import DataError, RunFolderError, first_line
from ..learned.policy import LearnedPolicy
from ..learned.policy_file import SCHEMA
from .plan_runs import CHOICES, REFERENCE, RUNS, PlanRun

LEAST_FALL = 0.01
"""A fine-tune in which some plan takes a smaller share off the loss is not learned from."""

WEIGHT = 5
"""How often a real fine-tune is learned from whenever a proxy task is once. Planted changes, which most proxies have,
ask for plans that no text asks for; at the same weight networks believed in them on real fine-tunes too."""


@dataclass(frozen=True, eq=False)
class RealPlanRun:
    """`RUNS` plans of one real fine-tune.

    Attributes:
        task: names model, data, size and seed.
        family: model and data; seeds differ. Models whose names begin alike, up to a hyphen, are held out together.
        names: of the modules, (modules,).
        modules: what was seen of them, float32 (modules, features).
        run: what was seen of the run, float32 (features,).
        ranks: int64 (RUNS, modules), plain LoRA first.
        losses: held-out losses at the end in nats, NaN for runs that failed, float64 (RUNS,).
        train_losses: the loss of each step's batch, which all plans share, float32 (RUNS, steps).
        initial: the held-out loss before training.
        choices: how each plan was chosen, see `plan_runs.CHOICES`, int8 (RUNS,).
    """

    task: str
    family: str
    names: tuple[str, ...]
    modules: NDArray[np.float32]
    run: NDArray[np.float32]
    ranks: NDArray[np.int64]
    losses: NDArray[np.float64]
    train_losses: NDArray[np.float32]
    initial: float
    choices: NDArray[np.int8]

    @property
    def learned(self) -> bool:
        """Whether plain LoRA, and each plan that came to an end, took at least `LEAST_FALL` off the held-out loss.

        On other fine-tunes luck decides more than plans do: which of them leaves a plateau of the loss in time.
        """
        most = (1 - LEAST_FALL) * self.initial
        return bool(self.losses[REFERENCE] <= most and not (self.losses > most).any())

    def seen_by(self, actor: LearnedPolicy) -> PlanRun:
        """The same as the value networks of a policy learn from it: with the scores of its actor."""
        scores = actor.scores_of(self.modules, self.run)
        return PlanRun(
            modules=np.tile(self.modules, (1, RUNS, 1, 1)),
            scores=np.tile((scores - scores.mean()).astype(np.float32), (1, RUNS, 1)),
            run=np.tile(self.run, (1, RUNS, 1)),
            ranks=self.ranks[None],
            losses=self.losses,
            initial=np.full(RUNS, self.initial),
            choices=self.choices[None],
            names=self.names,
            family=self.family.partition("-")[0],
            weight=WEIGHT,
        )


_ARRAYS = ("modules", "run", "ranks", "losses", "train_losses", "choices")
_TEXTS = ("task", "family", "names", "initial")


def write_real_plan_runs(runs: Sequence[RealPlanRun], path: Path) -> int:
    """Write plan runs into one file; returns its bytes."""
    arrays = {f"{number}.{name}": getattr(each, name) for number, each in enumerate(runs) for name in _ARRAYS}
    for name, values in arrays.items():
        if name.endswith("ranks"):
            arrays[name] = values.astype(np.int16)
    origin = json.dumps([{name: getattr(each, name) for name in _TEXTS} for each in runs])
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"schema": str(SCHEMA), "origin": origin})
        return temporary.stat().st_size


def more_plan_runs(path: str | Path | None) -> list[RealPlanRun]:
    """The plan runs of the file that a training also learns from, where all plans `learned`; none without a file."""
    runs = read_real_plan_runs(Path(path)) if path else []
    return [run for run in runs if run.learned]


def read_real_plan_runs(path: Path) -> list[RealPlanRun]:
    """The plan runs of a file.

    Raises:
        RunFolderError: it is damaged, or of another version.
    """
    try:
        arrays, metadata = read_arrays(path)
        if metadata.get("schema") != str(SCHEMA):
            raise RunFolderError(f"{path} was written by another version of rankpilot. Make it again.")
        return [_one(arrays, number, texts) for number, texts in enumerate(parse_json(metadata["origin"]))]
    except (DataError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"The plan runs in {path} cannot be read: {first_line(error)}") from error


def _one(arrays: Arrays, number: int, texts: dict[str, Any]) -> RealPlanRun:
    """The fine-tune of a number; ValueError if its arrays do not go together."""
    mine: dict[str, Any] = {name: arrays[f"{number}.{name}"] for name in _ARRAYS}
    names, count = tuple(texts["names"]), len(texts["names"])
    shapes = {
        "modules": (count, len(MODULE_FEATURES)),
        "run": (len(RUN_FEATURES),),
        "ranks": (RUNS, count),
        "losses": (RUNS,),
        "choices": (RUNS,),
    }
    wrong = [name for name, shape in shapes.items() if mine[name].shape != shape]
    if wrong or mine["train_losses"].shape[:-1] != (RUNS,):
        raise ValueError(f"{texts['task']} has other shapes than it should: {', '.join(wrong) or 'train_losses'}.")
    choices = mine["choices"]
    if mine["ranks"].min(initial=0) < 0 or not ((choices >= 0) & (choices < len(CHOICES))).all():
        raise ValueError(f"{texts['task']} has ranks below 0, or choices that do not exist.")
    mine["ranks"] = mine["ranks"].astype(np.int64)
    return RealPlanRun(**texts | {"names": names}, **mine)
