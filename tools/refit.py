"""Fit the value networks of a training again, without a run: `python -m tools.refit tools/trials`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from numpy.typing import NDArray
from rankpilot.agents.learned.networks import PlanValueEnsemble
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import WEIGHTS, load_policy, save_policy
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES
from rankpilot.common.files import as_json, from_json, sha256
from rankpilot.env.proxy_task import find_base
from rankpilot.errors import ConfigError, DataError, RunFolderError, shown
from rankpilot.training.config import TrainConfig
from rankpilot.training.fit_plan_value import ANY_COST, fit_value_ensemble
from rankpilot.training.plan_runs import RUNS, PlanRun, more_plan_runs, plan_dataset

from .dataset import FACTS, FEATURE_PREFIX, RUN_PREFIX, TrialsDataset, open_dataset


@dataclass(frozen=True, eq=False)
class Refitted:
    """A policy with new value networks.

    Attributes:
        policy: the actor of the data set with them.
        facts: how many plan runs they learned from, and how much they explain; see `fit_value_ensemble`.
    """

    policy: LearnedPolicy
    facts: dict[str, Any]


def training_config(dataset: TrialsDataset) -> TrainConfig:
    """The settings of the training that a data set holds.

    Raises:
        DataError: it holds none, or several, or that of another version, or lacks plan runs that it learned from.
    """
    try:
        config = from_json(TrainConfig, _training(dataset)["training"])
    except (ConfigError, KeyError) as error:
        raise DataError(f"The training in {dataset.folder / FACTS} is of another version: {error}") from error
    if config.more_plan_runs and config.more_plan_runs not in dataset.facts["files"]:
        raise DataError(
            f"The training in {dataset.folder / FACTS} also learned from the plan runs in "
            f"{shown(config.more_plan_runs)}, which is no file of the data set; so the same value networks cannot be "
            "fitted. Make the data set again with this version, which copies that file."
        )
    return config


def refit(dataset: TrialsDataset, config: TrainConfig) -> Refitted:
    """Fit value networks as the training did: with its seed they are the same, byte for byte.

    Args:
        dataset: with the plan runs of one training.
        config: its settings, perhaps with another seed or number of workers.

    Raises:
        DataError: the data set holds no plan runs, those of several trainings, or damaged ones.
        RunFolderError: the data set's file of further plan runs cannot be read.
    """
    source = _training(dataset)
    if source["runs_per_task"] != RUNS:
        raise DataError(f"{dataset.folder} has {source['runs_per_task']} runs a task; this version reads {RUNS}.")
    if f"{source['actor']}/{WEIGHTS}" not in dataset.facts["files"]:
        raise DataError(f"{dataset.folder} holds no actor {source['actor']!r}.")
    actor = load_policy(dataset.folder / source["actor"])
    assert isinstance(actor, LearnedPolicy)
    further = dataset.folder / config.more_plan_runs if config.more_plan_runs else None
    real = [run.seen_by(actor) for run in more_plan_runs(further)]
    runs = [*plan_runs_of(dataset), *real]
    ensemble = PlanValueEnsemble(ANY_COST)
    facts = fit_value_ensemble(ensemble, plan_dataset(runs), seed=config.seed, workers=config.worker_count)
    return Refitted(
        replace(actor, value_ensemble=ensemble, sha256=None),
        {"runs": sum(len(each.losses) for each in runs)} | facts,
    )


def save_refitted(folder: Path, refitted: Refitted, config: TrainConfig, dataset: TrialsDataset) -> Path:
    """Write the policy and its card, which names the data set; see `finish`."""
    policy, source = refitted.policy, _training(dataset)
    provenance = {
        "name": folder.resolve().name,
        "training": as_json(TrainConfig, config),
        "suite_version": source["suite_version"],
        "from_trials": {
            "name": source["name"],
            "sha256": sha256(dataset.folder / FACTS),
            "made_with": source["made_with"],
        },
        "plan_runs": refitted.facts,
        "validation": {},
    }
    return save_policy(folder, policy.network, config.schedule, provenance, policy.value_ensemble)


def plan_runs_of(dataset: TrialsDataset) -> Iterator[PlanRun]:
    """The plan runs of a data set, stack by stack, in the order in which they were learned from.

    What runs saw after they had failed is not in a data set; it is 0 here, and no fit reads it.

    Raises:
        DataError: the data set holds no plan runs, those of several trainings, or damaged ones.
    """
    table = dataset.table().sort_by([(name, "ascending") for name in ("stack", "decision", "slot")])
    stacks = table["stack"].to_numpy()
    starts = np.flatnonzero(np.diff(stacks, prepend=-1))
    if not np.array_equal(stacks[starts], np.arange(len(starts))):
        raise DataError(f"Stacks of plan runs are missing in {dataset.folder}.")
    for number, rows in enumerate(np.split(np.arange(len(stacks)), starts[1:])):
        try:
            yield _stack(table.slice(rows[0], len(rows)))
        except (ValueError, IndexError, pa.ArrowException) as error:
            raise DataError(
                f"The plan runs of stack {number} in {dataset.folder} do not fit together: {error}"
            ) from error


def _training(dataset: TrialsDataset) -> dict[str, Any]:
    """What is told of the one training in a data set."""
    found: list[dict[str, Any]] = dataset.facts["sources"]
    if len(found) != 1:
        raise DataError(
            f"Value networks are fitted to the plan runs of one training; {dataset.folder} holds {len(found)}. "
            "Make a data set of that training's folder alone."
        )
    return found[0]


def _stack(table: pa.Table) -> PlanRun:
    decision, slot = (table[name].to_numpy() for name in ("decision", "slot"))
    runs, decisions = int(slot.max()) + 1, int(decision.max()) + 1
    first = decision == 0
    if runs % RUNS or not np.array_equal(slot[first], np.arange(runs)):
        raise ValueError("first decisions are missing")
    ranks, scores = (_by_module(table, name) for name in ("ranks", "actor_score"))
    features = np.stack([_by_module(table, FEATURE_PREFIX + name) for name in MODULE_FEATURES], axis=-1)
    run = np.stack([table[RUN_PREFIX + name].to_numpy() for name in RUN_FEATURES], axis=-1)

    if not ranks.shape == scores.shape == features.shape[:2]:
        raise ValueError("lists of a row have several lengths")

    def placed(values: NDArray[Any], absent: float = 0) -> NDArray[Any]:
        whole = np.full((decisions, runs, *values.shape[1:]), absent, dtype=values.dtype)
        whole[decision, slot] = values
        return whole

    return PlanRun(
        modules=placed(features),
        scores=placed(scores),
        run=placed(run),
        ranks=placed(ranks.astype(np.int64), -1),
        losses=table["loss"].to_numpy().astype(np.float64)[first],
        initial=table["initial_loss"].to_numpy()[first],
        family=find_base(table["base"][0].as_py()).family,
    )


def _by_module(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of lists of one length as an array, (rows, modules)."""
    lists = table[name].combine_chunks()
    if lists.null_count or len(np.unique(lists.value_lengths().to_numpy())) != 1:
        raise ValueError(f"lists of {name} have several lengths")
    values: NDArray[Any] = lists.flatten().to_numpy()
    return values.reshape(len(lists), -1)


@dataclass(frozen=True)
class Options:
    """Fit value networks to the plan runs of a data set, and save them with its actor as a policy.

    Attributes:
        trials: folder of the data set (python -m tools.dataset).
        output: folder of the policy; there must be none yet.
        seed: of the fit; that of the training by default, which gives the same weights byte for byte.
        workers: processes of one thread each; those of the training by default.
    """

    trials: Annotated[Path, tyro.conf.Positional]
    output: Path = Path("runs/again")
    seed: int | None = None
    workers: int | None = None


def main(options: Options) -> None:
    """Fit, save, and say where.

    Raises:
        RunFolderError: the output is there already.
    """
    if options.output.exists():
        raise RunFolderError(f"{options.output} exists already. Pass another --output.")
    dataset = open_dataset(options.trials)
    chosen = {name: value for name in ("seed", "workers") if (value := getattr(options, name)) is not None}
    config = replace(training_config(dataset), **chosen)
    save_refitted(options.output, refit(dataset, config), config, dataset)
    sys.stdout.write(f"The policy is in {options.output}.\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
