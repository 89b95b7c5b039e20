"""The columns of a data set of allocation decisions: names, types, units and meanings, for the files and the card."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from ...allocation.features import FEATURE_PREFIX, MODULE_FEATURE_TABLE, RUN_FEATURE_TABLE, RUN_PREFIX

FORMAT, SCHEMA = "rankpilot-trials", 1
"""What `dataset.json` calls the data set, and the version of its columns and files."""

PLAN_RUNS, POLICY_RUNS = "plan runs", "policy runs"
"""Values of the column `source`."""


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
    Column("source", _TEXT, "", '"plan runs" of a training, or "policy runs" of a comparison'),
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
