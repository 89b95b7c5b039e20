"""What the folder of a run holds, checked before it is shown: the folder may be a stranger's.

Three kinds of folder have a decision log, and each may be of a run that goes on:

    the folder of `rankpilot finetune`     decisions/  metrics-NAME.jsonl  summary.json  rankpilot/adapter/
    the output folder of a Trainer         decisions/  checkpoint-N/trainer_state.json
    a decision log                         part-00000.parquet ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...allocation.decision_line import decision_line
from ...allocation.decision_log import DecisionLog
from ...allocation.deliberation import Deliberation
from ...allocation.log_part import FEATURE_PREFIX
from ...allocation.unusual_features import unusual_features
from ...common.arrays import BoolArray, FloatArray, IntArray
from ...common.drawing import Points
from ...common.files import read_json_lines, read_object
from ...common.units import cost_text
from ...errors import DataError, RunFolderError, first_line, shown
from ...finetune.config import PILOT, RUNS

Rows = Sequence[Mapping[str, Any]]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MOST_NUMBER = 2**53
"""The largest whole number that is read; all below are exact as floating-point numbers."""

_RESULTS = (
    "held_out_loss", "held_out_accuracy", "adapter_parameters", "peak_bytes", "budget_bytes", "median_step_s",
    "train_s", "steps", "energy_joules",
)  # fmt: skip
"""Results of a run that are numbers, or unknown."""

_SETUP = ("seed", "held_out_rows", "largest_class", "outputs", "steps")
"""What a summary tells as numbers beside them."""


@dataclass(frozen=True, eq=False)
class DecisionRows:
    """What the rows of one decision in a log tell, M modules and F features.

    Attributes:
        facts: values that the decision has once, by the name of their column: decision, step, policy, seed, loss, unit,
            limit, predicted_cost and more. A value may be None.
        modules: full names, (M,).
        blocks: the layer of each module, int (M,).
        before: ranks before the decision, int (M,).
        asked: ranks that the policy wanted, int (M,); the clipped ones in a log that does not tell.
        clipped: those on the ladder and within the bounds, int (M,).
        after: ranks of the plan, int (M,).
        scores: float (M,).
        changed: which modules the budget gave another rank than was asked for, bool (M,).
        pinned: which modules are pinned, bool (M,).
        notes: what a person noted at a module, or None, (M,).
        features: names, (F,).
        values: of the features, float (M, F).
    """

    facts: Mapping[str, Any]
    modules: tuple[str, ...]
    blocks: IntArray
    before: IntArray
    asked: IntArray
    clipped: IntArray
    after: IntArray
    scores: FloatArray
    changed: BoolArray
    pinned: BoolArray
    notes: tuple[str | None, ...]
    features: tuple[str, ...]
    values: FloatArray

    @property
    def line(self) -> str:
        """The decision in one line; see `decision_line`."""
        facts = self.facts
        cost, limit = facts["predicted_cost"], facts["limit"]
        return decision_line(facts["step"], self.before, self.after, cost, limit, facts["unit"])

    @property
    def moves(self) -> str:
        """How many modules moved and what the plan costs, in words."""
        facts, unit = self.facts, self.facts["unit"]
        up, down = int((self.after > self.before).sum()), int((self.after < self.before).sum())
        moved = f"{up} up, {down} down, {len(self.after) - up - down} unchanged"
        plan = f"{cost_text(facts['predicted_cost'], unit)} of {cost_text(facts['limit'], unit)}"
        measured = facts["measured_cost"]
        seen = f" (measured before it: {cost_text(measured, unit)})" if measured is not None else ""
        changed = int(self.changed.sum())
        budget = f" The budget changed what was asked for {changed} modules." if changed else ""
        return f"{moved}; predicted cost {plan}{seen}.{budget}"

    def standing_out(self) -> list[list[tuple[str, float]]]:
        """The unusual features of each module; see `unusual_features`."""
        return unusual_features(self.features, self.values)


def read_decisions(log: DecisionLog, on_error: Callable[[RunFolderError], None]) -> tuple[DecisionRows, ...]:
    """The decisions of a log, in order.

    Args:
        log: of a run.
        on_error: called for each decision that cannot be read, which is left out.

    Raises:
        RunFolderError: there is no log, or none of it can be read.
    """
    return _decisions(log.read(on_error))


def _decisions(log: pa.Table) -> tuple[DecisionRows, ...]:
    coded = log["module"].combine_chunks().dictionary_encode()
    names, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    per_decision = [name for name in log.column_names if not name.startswith(FEATURE_PREFIX) and name != "module"]
    features = [name for name in log.column_names if name.startswith(FEATURE_PREFIX)]
    values = np.empty((log.num_rows, len(features)))
    for index, name in enumerate(features):
        values[:, index] = log[name].to_numpy()
    clipped = log["rank_clipped"].to_numpy()
    asked = clipped if log["rank_wanted"].null_count else log["rank_wanted"].to_numpy()  # logs of schema 2 have none
    blocks, before, after, scores = (log[n].to_numpy() for n in ("block", "rank_before", "rank_after", "score"))
    changed, pinned = (
        log[name].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
        for name in ("changed_by_projection", "pinned")
    )
    starts = np.flatnonzero(np.diff(log["decision"].to_numpy(), prepend=-1)).tolist()
    return tuple(
        DecisionRows(
            facts=log.slice(start, 1).select(per_decision).to_pylist()[0],
            modules=tuple(names[code] for code in codes[start:end].tolist()),
            blocks=blocks[start:end],
            before=before[start:end],
            asked=asked[start:end],
            clipped=clipped[start:end],
            after=after[start:end],
            scores=scores[start:end],
            changed=changed[start:end],
            pinned=pinned[start:end],
            notes=tuple(log["note"].slice(start, end - start).to_pylist()),
            features=tuple(name.removeprefix(FEATURE_PREFIX) for name in features),
            values=values[start:end],
        )
        for start, end in pairwise([*starts, log.num_rows])
    )


@dataclass(frozen=True, eq=False)
class RunData:
    """What a folder says about a run.

    Attributes:
        folder: the folder.
        summary: results and settings by name; empty before the end of `rankpilot finetune`, and in other folders.
        metrics: losses and measured peaks by step, for each run of which the folder has them.
        decisions: of the decision log; none without one that can be read.
        missing: what a page has to leave out, and why, a few words each.
        first: what its policy computed at the first decision; None where that is unknown.
    """

    folder: Path
    summary: Mapping[str, Any]
    metrics: Mapping[str, Rows]
    decisions: tuple[DecisionRows, ...]
    missing: tuple[str, ...]
    first: Deliberation | None = None

    @property
    def results(self) -> dict[str, Mapping[str, Any]]:
        """The results of each finished run, by name."""
        runs = self.summary.get("runs", {})
        return {name: runs[name] for name in RUNS if runs.get(name)}

    @property
    def unit(self) -> str:
        """The unit of the budget: "bytes" or "parameters"."""
        return str(self.decisions[0].facts["unit"]) if self.decisions else "bytes"

    @property
    def limits(self) -> Points:
        """(step, budget from that step on, in `unit`): a run may be resumed with another one. Empty if unknown."""
        limits = list(zip(self.of_decisions("step"), self.of_decisions("limit"), strict=True))
        known = self.results.get(PILOT, {}).get("budget_bytes")
        return limits or ([(0, known)] if known else [])

    @property
    def steps(self) -> int:
        """The last step that the folder speaks of."""
        rows = [row["step"] for row in self.metrics.get(PILOT, ()) if "step" in row]
        return max([*rows, *(step + 1 for step in self.of_decisions("step"))], default=0)

    @property
    def adapter(self) -> Path | None:
        """The folder of the trained adapter, or else of the last checkpoint that has one."""
        checkpoints = (*_checkpoints(self.folder / PILOT), *_checkpoints(self.folder))
        folders = [self.folder / PILOT / "adapter", self.folder, *checkpoints]
        return next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)

    def of_decisions(self, column: str) -> list[Any]:
        """One value of a column for each decision."""
        return [decision.facts[column] for decision in self.decisions]

    def points(self, run: str, key: str) -> Points:
        """(step, value) of each line of a run's metrics that has the value."""
        return [
            (row["step"], row[key]) for row in self.metrics.get(run, ()) if "step" in row and row.get(key) is not None
        ]

    def peaks(self) -> dict[str, Points]:
        """(step, bytes at its peak) of each run that was measured; a run that goes on has those of its decisions."""
        peaks = {run: self.points(run, "peak_bytes") for run in RUNS}
        if not peaks[PILOT] and self.unit == "bytes":
            pairs = zip(self.of_decisions("step"), self.of_decisions("measured_cost"), strict=True)
            peaks[PILOT] = [(step, cost) for step, cost in pairs if cost is not None]
        return {run: points for run, points in peaks.items() if points}


def log_of(folder: Path) -> DecisionLog | None:
    """The decision log of a run's folder, or the folder itself if it is one; None if there is none."""
    logs = [DecisionLog(path) for path in (folder / "decisions", folder)]
    return next((log for log in logs if len(log)), None)


def find_log(folder: Path) -> DecisionLog:
    """As `log_of`; RunFolderError if there is none."""
    log = log_of(folder)
    if log is None:
        raise RunFolderError(
            f"{folder} holds no decision log: there is neither decisions/part-00000.parquet nor part-00000.parquet."
        )
    return log


def read_run(folder: Path) -> RunData:
    """Read what a folder holds.

    Raises:
        RunFolderError: it has neither a decision log nor the summary of a fine-tune.
    """
    missing: list[str] = []
    log = log_of(folder)
    of_finetune = any((folder / name).is_file() for name in ("config.json", "summary.json", f"metrics-{PILOT}.jsonl"))
    if log is None and not (folder / "summary.json").is_file():
        raise RunFolderError(
            f"{folder} holds no run: there is no decision log (decisions/part-00000.parquet or part-00000.parquet) and "
            "no summary.json. Pass the folder of `rankpilot finetune`, the output folder of a Trainer with "
            "RankPilotCallback, or the folder of a decision log."
        )
    summary = _read_summary(folder, missing) if of_finetune else {}
    if log is None and not summary:
        raise RunFolderError(
            f"{folder} holds no run: there is no decision log, and {missing[0]}. The page is about fine-tunes; what "
            "`rankpilot evaluate` found is in its summary.json."
        )
    metrics = _read_metrics(folder, summary, missing) if of_finetune else _read_trainer_state(folder, missing)
    decisions: tuple[DecisionRows, ...] = ()
    if log is None:
        missing.append("the decisions (no decision log)")
    else:
        try:
            decisions = read_decisions(log, lambda error: missing.append(f"a decision ({error})"))
        except RunFolderError as error:
            missing.append(f"all decisions ({error})")
    return RunData(folder, summary, metrics, decisions, tuple(missing), _first(log))


def _first(log: DecisionLog | None) -> Deliberation | None:
    """See `RunData`; None where the first decision cannot be read."""
    try:
        return log.logged(0).deliberation if log else None
    except RunFolderError:
        return None


def run_names(runs: Sequence[RunData]) -> list[str]:
    """A name for each run: that of its folder, with as much of the path as tells it from the others."""
    paths = [run.folder.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]  # one run, given several times


def _read_summary(folder: Path, missing: list[str]) -> Mapping[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        missing.append("the results, as the run has not finished (no summary.json)")
        return {}
    try:
        summary = read_object(path)
        if not isinstance(summary["runs"][PILOT], dict):
            raise TypeError(f"the run {PILOT!r} has no results")
        check_summary(summary)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing.append(f"the results ({path} is unreadable: {_said(error)})")
        return {}
    return summary


def _said(error: Exception) -> str:
    """What an error says of a file, for people."""
    return f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)


def _read_metrics(folder: Path, summary: Mapping[str, Any], missing: list[str]) -> dict[str, Rows]:
    metrics: dict[str, Rows] = {}
    for run in RUNS:
        path = folder / f"metrics-{run}.jsonl"
        if path.is_file():
            try:
                metrics[run] = number_rows(read_json_lines(path))
            except DataError as error:
                missing.append(f"losses of {run} ({error})")
        elif run == PILOT or run in summary.get("runs", {}):
            missing.append(f"losses of {run} (no {path.name})")
    return metrics


def _read_trainer_state(folder: Path, missing: list[str]) -> dict[str, Rows]:
    """The losses that a Trainer logged up to its last checkpoint."""
    for path in (folder / "trainer_state.json", *(path / "trainer_state.json" for path in _checkpoints(folder))):
        if not path.is_file():
            continue
        try:
            state = read_object(path)
            return {PILOT: number_rows([*state["log_history"], {"step": int(state["global_step"])}])}
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            missing.append(f"the latest losses ({path} is unreadable: {_said(error)})")
    missing.append("losses (no checkpoint with a trainer_state.json)")
    return {}


def _checkpoints(folder: Path) -> Iterator[Path]:
    """The checkpoints of a Trainer, the last one first."""
    numbered = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*")]
    yield from (path for _, path in sorted(((int(n), path) for n, path in numbered if n.isdecimal()), reverse=True))


def number_rows(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """The numbers of each line of metrics by name, and its times of steps; lines of something else are left out."""
    objects = [line for line in lines if isinstance(line, dict)]
    rows = [{key: value for key, value in line.items() if _belongs(key, value)} for line in objects]
    return [row for row in rows if is_number(row.get("step", 0)) and row.get("step", 0) >= 0]


def check_summary(summary: Any) -> None:
    """Refuse a summary whose values are not those of a run.

    Raises:
        TypeError, KeyError, AttributeError: something is of another type, or missing.
    """
    for name, run in summary["runs"].items():
        _check_numbers(run, _RESULTS, f"{shown(name)}: ")
        hardware = run.get("hardware") or {}
        _check_numbers(hardware, ("busy", "free_bytes", "total_bytes"), f"{shown(name)}: ")
        for text in (hardware.get("device"), run.get("energy_source")):
            if not isinstance(text, str | None):
                raise TypeError(f"{shown(name)} has a name of hardware that is {shown(text)}")
        ranks = run.get("ranks") or {}
        if not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise TypeError(f"{shown(name)} has a rank that is none")
    _check_numbers(summary, _SETUP, "")
    if not (summary.get("largest_class") or 0) <= 1:
        raise TypeError(f"largest_class is {summary['largest_class']}, not a share")
    for name in ("model", "data", "policy"):
        if not isinstance(summary.get(name), str | None):
            raise TypeError(f"{name} is {shown(summary[name])}")


def is_number(value: Any) -> bool:
    """Whether a value is a number, of a size that floating-point numbers have; NaN and infinity are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= MOST_NUMBER


def _belongs(key: str, value: Any) -> bool:
    if key == "step_s":
        return isinstance(value, list) and all(map(is_number, value))
    return is_number(value)


def _check_numbers(values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        value = values.get(name)
        if value is not None and (not is_number(value) or value < 0):
            raise TypeError(f"{where}{name} is {shown(value)}")
