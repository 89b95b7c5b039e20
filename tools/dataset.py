"""Write a data set of the plan runs of a training: `python -m tools.dataset runs/policy --output runs/trials`.

    trials-00000.parquet ...   the rows, see `COLUMNS`
    actor-0/                   the actor that the plan runs were made with
    more-plan-runs-0.safetensors
                               of a training that also learned from plan runs of real fine-tunes: these
    dataset.json               sizes, sha256 of all files, and where the rows come from
    README.md                  the data card

The folder is complete or absent. `python -m tools.refit` fits value networks to it.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from rankpilot.agents.learned.policy import ALL_LINEAR, FIXED_NAMES, KEEP, LearnedPolicy
from rankpilot.agents.learned.policy_file import CARD as POLICY_CARD
from rankpilot.agents.learned.policy_file import load_policy, read_card, save_policy
from rankpilot.agents.observation import MODULE_FEATURE_TABLE, MODULE_FEATURES, RUN_FEATURE_TABLE, RUN_FEATURES
from rankpilot.common.files import as_json, atomic_path, from_json, read_json, sha256, write_json, write_text
from rankpilot.env.proxy_task import VERSION
from rankpilot.errors import ConfigError, DataError, PolicyFileError, RunFolderError
from rankpilot.training.config import TrainConfig
from rankpilot.training.plan_runs import CHOICES, MOVES, RUNS, PlanRun, read_plan_run, read_real_plan_runs
from rankpilot.training.plan_runs import PLAN_RUNS as PLAN_RUNS_FOLDER

FACTS, CARD = "dataset.json", "README.md"

FEATURE_PREFIX, RUN_PREFIX = "feature.", "run."
"""Before the names of features of modules and of the run."""

MORE = "more-plan-runs-0.safetensors"
"""The copy of further plan runs, from real fine-tunes."""

STACKS = 32
"""Stacks of plan runs in one file of rows, at most: about 6,000 rows."""

FOLDS = 5

LEVEL = 15
"""Of zstd. Files are a tenth smaller than at the usual 1, and without dictionaries a quarter smaller than with them."""

FORMAT, SCHEMA = "rankpilot-trials", 1
"""What `dataset.json` calls the data set, and the version of its columns and files."""

PLAN_RUNS = "plan runs"
"""The value of the columns `source` and `behaviour`."""


class Column(NamedTuple):
    """One column.

    Attributes:
        name: of the column.
        kind: Arrow type. Lists have one value for each module, in the order of the column `module`.
        unit: of its values.
        meaning: what is in it.
    """

    name: str
    kind: pa.DataType
    unit: str
    meaning: str


_TEXT, _WHOLE, _DOUBLE, _FLAG = pa.string(), pa.int32(), pa.float64(), pa.bool_()

_IDENTITY = (
    Column("source", _TEXT, "", "plan runs of a training"),
    Column("origin", _WHOLE, "", "number of the folder that the row comes from, see `sources` in dataset.json"),
    Column("run", _TEXT, "", "the run; its rows are its decisions"),
    Column("stack", _WHOLE, "", "stack of plan runs that trained side by side; null for policy runs"),
    Column("slot", _WHOLE, "", "place of the run in its stack; null for policy runs"),
)

_TASK = (
    Column("task", _TEXT, "", "id of the task: base, kind and place, budget, seed"),
    Column("seed", pa.int64(), "", "of data, teacher and adapters; a task and its variation share it"),
    Column("split", _TEXT, "", 'the task\'s split of the suites: "train", "validation" or "test"'),
    Column(
        "fold", pa.int8(), "", "0 to 4, by the seed alone: tasks of one seed are in one fold, for fits across folds"
    ),
    Column("kind", _TEXT, "", '"planted", "shift" or "classify"'),
    Column("base", _TEXT, "", "proxy base"),
    Column("place", _TEXT, "", "where a change was planted, or the text that was shifted to"),
    Column("budget", _DOUBLE, "share", "limit, as a share of what rank 8 on all modules takes"),
    Column("total_steps", _WHOLE, "steps", "optimiser steps of the run; null for a task of no suite"),
    Column("learning_rate", _DOUBLE, "", "peak of a linear decay (AdamW); null for a task of no suite"),
    Column("cost_kind", _TEXT, "", 'the budget counts "bytes", "checkpointed", "large batch" or "parameters"'),
)

_DECISION = (
    Column("behaviour", _TEXT, "", 'who decided: the policy, or "plan runs"'),
    Column("behaviour_sha256", _TEXT, "", "of the policy's weights; null for a rule"),
    Column(
        "temperature",
        _DOUBLE,
        "votes",
        "of the softmax that the plan was drawn from, in the unit of the votes; 0 for the best plan; or null",
    ),
    Column(
        "choice",
        _TEXT,
        "",
        'what was taken: a candidate, "drawn", "keep", or a kind of plan; null of most rules',
    ),
    Column("choice_probability", _DOUBLE, "", "of this choice in this slot of the plan runs; null for policy runs"),
    Column("probability", _DOUBLE, "", "of this plan under the behaviour, given what it saw; null if not known"),
    Column("decision", _WHOLE, "", "number of the decision in its run, from 0"),
    Column("step", _WHOLE, "steps", "optimiser steps done before it"),
)

_RESULT = (
    Column("initial_loss", _DOUBLE, "nats", "held-out loss before training"),
    Column("loss", _DOUBLE, "nats", "held-out loss at the end of the run; null if it failed"),
    Column("failed", _FLAG, "", "whether a loss was not finite"),
    Column("uniform_loss", _DOUBLE, "nats", "of uniform rank in the same budget; null where it was not measured"),
    Column("best_loss", _DOUBLE, "nats", "of the best known plan; null where none is known"),
)

_MODULES = (
    Column("module", pa.list_(_TEXT), "", "names of the target modules"),
    Column("ranks", pa.list_(_WHOLE), "rank", "after the decision"),
    Column("actor_score", pa.list_(pa.float32()), "log rank", "the actor's scores less their mean; null for rules"),
)

_FEATURES = tuple(
    Column(FEATURE_PREFIX + name, pa.list_(pa.float32()), values, meaning)
    for name, meaning, values in MODULE_FEATURE_TABLE
)

_RUN_FEATURES = tuple(
    Column(RUN_PREFIX + name, pa.float32(), values, meaning) for name, meaning, values in RUN_FEATURE_TABLE
)

COLUMNS = (*_IDENTITY, *_TASK, *_DECISION, *_RESULT, *_MODULES, *_RUN_FEATURES, *_FEATURES)
"""All columns, in the order of the files."""

SCHEMA_OF_FILES = pa.schema([(column.name, column.kind) for column in COLUMNS])
"""The Arrow schema of every `trials-NNNNN.parquet`."""


OF_CARD = [column.name for column in COLUMNS if not pa.types.is_list(column.kind)]
"""Columns from which the card counts."""

Row = dict[str, Any]
"""A row by column; columns that it lacks are null."""


@dataclass(frozen=True, eq=False)
class TrialsDataset:
    """A data set whose files are whole.

    Attributes:
        folder: where it is.
        facts: what its `dataset.json` tells.
    """

    folder: Path
    facts: dict[str, Any]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows, in the order of the files; all columns, or those of some names."""
        names = sorted(name for name in self.facts["files"] if name.endswith(".parquet"))
        return pa.concat_tables(pq.read_table(self.folder / name, columns=columns) for name in names)


def open_dataset(folder: str | Path) -> TrialsDataset:
    """Open a data set, and check the size and sha256 of each file.

    Raises:
        DataError: the folder is no data set of this version, or a file is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise DataError(
            f"{folder} is no data set of rankpilot: it has no {FACTS}. `python -m tools.dataset` writes one."
        )
    facts = read_json(folder / FACTS)
    told = (facts["format"], facts["schema"], facts["module_features"], facts["run_features"])
    if told != (FORMAT, SCHEMA, list(MODULE_FEATURES), list(RUN_FEATURES)):
        raise DataError(f"{folder / FACTS} has another format, or other features of modules. Make the data set again.")
    for name, file in facts["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"] or sha256(path) != file["sha256"]:
            raise DataError(f"{path} is missing or damaged: {FACTS} tells another size or sha256. Copy it again.")
    return TrialsDataset(folder, facts)


@dataclass(frozen=True, eq=False)
class Training:
    """The plan runs of a finished training.

    Attributes:
        folder: of the training.
        stacks: the files of plan runs, in the order in which they were learned from.
        card: of the policy.
        config: of the training.
        policy: what came out.
    """

    folder: Path
    stacks: tuple[Path, ...]
    card: dict[str, Any]
    config: TrainConfig
    policy: LearnedPolicy

    @classmethod
    def open(cls, folder: Path) -> Training:
        """Read what a folder holds.

        Raises:
            RunFolderError: the training is not finished, or of a version that did not note its tasks, or the file of
                further plan runs that it learned from is not there.
        """
        stacks = tuple(sorted((folder / PLAN_RUNS_FOLDER).glob("*.safetensors")))
        if not (folder / POLICY_CARD).is_file() or not stacks:
            raise RunFolderError(
                f"The training in {folder} is not finished, or has no plan runs. Finish it: rankpilot train --resume."
            )
        try:
            card = read_card(folder)
            config, policy = from_json(TrainConfig, card.get("training")), load_policy(folder)
        except (PolicyFileError, ConfigError) as error:
            raise RunFolderError(f"The training in {folder} cannot be read: {error}") from error
        assert isinstance(policy, LearnedPolicy)
        if config.more_plan_runs and not Path(config.more_plan_runs).is_file():
            raise RunFolderError(
                f"The training in {folder} also learned from the plan runs in {config.more_plan_runs}, and there is no "
                "such file. Put it back, or call this from the folder in which the training was started."
            )
        return cls(folder, stacks, card, config, policy)

    @property
    def parts(self) -> int:
        """How many files of rows it gives."""
        return -(-len(self.stacks) // STACKS)

    def rows(self, part: int) -> list[Row]:
        """The rows of some stacks, by stack, decision and slot.

        Raises:
            RunFolderError: a file cannot be read, or is of a version that did not note its tasks.
        """
        numbers = range(part * STACKS, min((part + 1) * STACKS, len(self.stacks)))
        return [row for number in numbers for row in self._of_stack(number)]

    def _of_stack(self, number: int) -> Iterator[Row]:
        path = self.stacks[number]
        runs = read_plan_run(path)
        if not runs.tasks or runs.choices is None:
            raise RunFolderError(
                f"{path} was written by an earlier version, which did not write down tasks and choices. Train again."
            )
        steps = self.config.schedule.steps(runs.tasks[0].steps)
        for decision, slot in np.argwhere(runs.ranks.min(axis=2) >= 0).tolist():
            yield {
                **self._run(runs, number, slot),
                **self._decision(runs, decision, slot),
                "step": steps[decision],
            }

    def _run(self, runs: PlanRun, number: int, slot: int) -> Row:
        """What is the same at all decisions of a run."""
        task, loss = runs.tasks[slot // RUNS], float(runs.losses[slot])
        failed = not np.isfinite(loss)
        return {
            "source": PLAN_RUNS,
            "origin": 0,
            "run": f"0/{number:05}/{slot:02}",
            "stack": number,
            "slot": slot,
            "task": task.id,
            "seed": task.seed,
            "split": "train",
            "fold": fold_of(task.seed),
            "kind": task.kind,
            "base": task.base,
            "place": task.placement if task.kind == "planted" else task.corpus,
            "budget": task.budget,
            "cost_kind": task.cost_kind,
            "total_steps": task.steps,
            "learning_rate": task.learning_rate,
            "behaviour": PLAN_RUNS,
            "initial_loss": float(runs.initial[slot]),
            "loss": None if failed else loss,
            "failed": failed,
        }

    def _decision(self, runs: PlanRun, decision: int, slot: int) -> Row:
        assert runs.choices is not None
        choice = CHOICES[runs.choices[decision, slot]]
        modules, run = runs.modules[decision, slot], runs.run[decision, slot]
        first = decision == 0
        later = 1 - MOVES if choice == KEEP else MOVES
        return {
            "decision": decision,
            "choice": choice,
            "choice_probability": 1.0 if first else later,
            # A draw is continuous; and a plan that is kept may also be drawn. How likely these plans are, nobody knows.
            "probability": 1.0 if first and choice in (*FIXED_NAMES, ALL_LINEAR) else None,
            "actor_score": runs.scores[decision, slot],
            "module": list(runs.names),
            "ranks": runs.ranks[decision, slot].astype(np.int32),
            **{FEATURE_PREFIX + name: modules[:, index] for index, name in enumerate(MODULE_FEATURES)},
            **{RUN_PREFIX + name: run[index] for index, name in enumerate(RUN_FEATURES)},
        }

    def facts(self) -> dict[str, Any]:
        """What is known of the training."""
        return {
            "kind": PLAN_RUNS,
            "name": self.folder.name,
            "stacks": len(self.stacks),
            "runs_per_task": RUNS,
            "training": self.settings(),
            "suite_version": self.card.get("suite_version", VERSION),
            "made_with": self.card.get("versions", {}),
            "actor": "actor-0",
        }

    def settings(self) -> dict[str, Any]:
        """The settings of the training, which name the data set's own copy of further plan runs."""
        settings: dict[str, Any] = as_json(TrainConfig, self.config)
        return settings | ({"more_plan_runs": MORE} if self.config.more_plan_runs else {})


def fold_of(seed: int) -> int:
    """The fold of all tasks with this seed, 0 to `FOLDS` - 1."""
    return hashlib.sha256(str(seed).encode()).digest()[0] % FOLDS


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as a table with all columns."""
    arrays = [pa.array([row.get(column.name) for row in rows], column.kind) for column in COLUMNS]
    return pa.Table.from_arrays(arrays, schema=SCHEMA_OF_FILES)


def write_dataset(source: Path, folder: Path) -> TrialsDataset:
    """Write the data set of a training, and read it back.

    Args:
        source: folder of a finished training with plan runs.
        folder: of the data set; there must be none yet.

    Raises:
        RunFolderError: the folder exists, or the source gives no rows.
    """
    from .dataset_card import data_card

    if folder.exists():
        raise RunFolderError(f"{folder} exists already. Pass another --output.")
    training = Training.open(source)
    with atomic_path(folder) as work:
        work.mkdir()
        tables = []
        for part in range(training.parts):
            table = table_of(training.rows(part))
            path = work / f"trials-{part:05}.parquet"
            pq.write_table(table, path, compression="zstd", compression_level=LEVEL, use_dictionary=False)
            tables.append(table.select(OF_CARD))
        given = {"name": training.policy.name, "training": training.settings()}
        save_policy(work / "actor-0", training.policy.network, training.config.schedule, given)
        if training.config.more_plan_runs:
            read_real_plan_runs(Path(training.config.more_plan_runs))  # sound, or an error
            shutil.copyfile(training.config.more_plan_runs, work / MORE)
        rows = pa.concat_tables(tables)
        facts = _facts(training, work, rows)
        write_text(work / CARD, data_card(facts, rows, COLUMNS))
        write_json(work / FACTS, facts)
    return open_dataset(folder)


def _facts(training: Training, folder: Path, table: pa.Table) -> dict[str, Any]:
    """What `dataset.json` tells."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        rows = {"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {}
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path), **rows}
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "rows": table.num_rows,
        "runs": pc.count_distinct(table["run"]).as_py(),
        "tasks": pc.count_distinct(table["task"]).as_py(),
        "module_features": list(MODULE_FEATURES),
        "run_features": list(RUN_FEATURES),
        "sources": [training.facts()],
        "files": files,
        "written_with": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rankpilot", "pyarrow")},
        },
    }


@dataclass(frozen=True)
class Options:
    """Write the plan runs of a training as a data set, for research: Parquet files, a data card and checksums.

    Attributes:
        source: folder of a training with plan runs (rankpilot train --plan-tasks).
        output: new folder of the data set.
    """

    source: Annotated[Path, tyro.conf.Positional]
    output: Path = Path("runs/trials")


def main(options: Options) -> None:
    """Write the data set, and say what is in it."""
    told = write_dataset(options.source, options.output).facts
    line = f"{told['rows']:,} decisions of {told['runs']:,} runs on {told['tasks']:,} tasks are in {options.output}."
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
