"""Read the folder of a run, and validate it before display: the folder may be untrusted.

Three kinds of folder have a decision log, and each may belong to an ongoing run:

    the folder of `rankpilot finetune`     decisions/  metrics-NAME.jsonl  summary.json  rankpilot/adapter/
    the output folder of a Trainer         decisions/  checkpoint-N/trainer_state.json
    a decision log                         decisions.jsonl ...

`standing_out` finds the features in which a module stands out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.checks import MOST_NUMBER, counted, finite
from ..common.drawing import Points
from ..common.errors import DataError, RunFolderError, first_line, shown
from ..common.files import read_json_lines, read_object
from ..common.text import cost_text
from ..cost.savers.prices import Saved
from ..decide.choice import Choice
from ..decide.log import CONTROL, LINES, DecisionLog, DecisionRecord
from ..decide.observation import MODULE_FEATURES
from ..finetune.options import PILOT, RUNS

UNUSUAL = 1.0
"""Standard deviations from the mean of all modules."""


def standing_out(record: DecisionRecord) -> list[list[tuple[str, float]]]:
    """Return each module's two features farthest from the mean of all modules at a decision, farthest first.

    Features with fewer than three different values (flags) and distances below `UNUSUAL` are left out; non-finite
    values are unknown.

    Returns:
        Up to two pairs (feature, distance in standard deviations) per module.
    """
    kept, distances, values = [], [], record.observation.modules
    for name, column in zip(MODULE_FEATURES, values.T.astype(np.float64), strict=True):
        known = column[np.isfinite(column)]
        if np.unique(known).size >= 3:
            kept.append(name)
            distances.append(np.nan_to_num((column - known.mean()) / known.std()))
    if not kept:
        return [[] for _ in values]
    rows = np.array(distances).T
    order = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :2].tolist()
    pairs = zip(rows, order, strict=True)
    return [[(kept[i], float(row[i])) for i in chosen if abs(row[i]) >= UNUSUAL] for row, chosen in pairs]


Rows = Sequence[Mapping[str, Any]]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_RESULTS = (
    "held_out_loss", "held_out_accuracy", "adapter_parameters", "peak_bytes", "budget_bytes", "median_step_s",
    "train_s", "steps", "energy_joules",
)  # fmt: skip
"""Numeric or unknown results of a run."""

_SETUP = ("seed", "held_out_rows", "largest_class", "outputs", "steps")
"""Further numbers in a summary."""


@dataclass(frozen=True)
class Race:
    """A race of learning rates.

    Attributes:
        step: the step after which it ended.
        rate: the rate that went on.
        curves: mean training loss by step for each rate, as text.
    """

    step: int
    rate: float
    curves: Mapping[str, Points]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Race:
        """Read the row of a race in `control.jsonl`."""
        curves = {
            str(rate): [(counted(step), finite(loss)) for step, loss in points] for rate, points in row["race"].items()
        }
        return cls(counted(row["step"]), finite(row["rate"]), curves)

    def __str__(self) -> str:
        """Return a sentence."""
        rates = ", ".join(self.curves)
        went_on = f"the run went on at {self.rate:.2g} from step {self.step}"
        return f"Learning rates {rates} raced on the same batches; {went_on}."


@dataclass(frozen=True, eq=False)
class RunData:
    """The contents of a run's folder.

    Attributes:
        folder: the folder.
        summary: results and settings by name; empty before the end of `rankpilot finetune`, and in other folders.
        metrics: losses and measured peaks by step, for each run in the folder.
        decisions: records of the decision log; empty without a readable one.
        missing: omissions from a page and their reasons, a few words each.
        control: changes of the learning rate, as (step, factor, new rate, whether it was restored from a copy).
        broken: steps with non-finite results, and whether each was undone.
        race: the race of learning rates; None without one, and before its end.
    """

    folder: Path
    summary: Mapping[str, Any]
    metrics: Mapping[str, Rows]
    decisions: Sequence[DecisionRecord]
    missing: tuple[str, ...]
    control: tuple[tuple[int, float, float, bool], ...] = ()
    broken: tuple[tuple[int, bool], ...] = ()
    race: Race | None = None

    @property
    def first(self) -> Choice | None:
        """The policy's computation at the first decision; None if unknown."""
        return self.decisions[0].choice if self.decisions and self.decisions[0].number == 0 else None

    @property
    def saved(self) -> tuple[Saved, ...]:
        """Memory of a plain LoRA step without exact savers and with them; empty if nothing lowers it."""
        saved = self.decisions[0].saved if self.decisions else ()
        return saved if len(saved) > 1 or (saved and saved[0].again_bytes) else ()

    @property
    def results(self) -> dict[str, Mapping[str, Any]]:
        """The results of each finished run, by name."""
        runs = self.summary.get("runs", {})
        return {name: runs[name] for name in RUNS if runs.get(name)}

    @property
    def unit(self) -> str:
        """The unit of the budget: "bytes" or "parameters"."""
        return self.decisions[0].problem.cost.unit if self.decisions else "bytes"

    @property
    def limits(self) -> Points:
        """(step, budget from that step on, in `unit`): a resumed run may change it. Empty if unknown."""
        limits = [(record.step, record.problem.limit) for record in self.decisions]
        known = self.results.get(PILOT, {}).get("budget_bytes")
        return limits or ([(0, known)] if known else [])

    @property
    def steps(self) -> int:
        """The last step mentioned in the folder."""
        rows = [row["step"] for row in self.metrics.get(PILOT, ()) if "step" in row]
        return max([*rows, *(record.step + 1 for record in self.decisions)], default=0)

    @property
    def adapter(self) -> Path | None:
        """The folder of the trained adapter, or of the last checkpoint with one."""
        checkpoints = (*_checkpoints(self.folder / PILOT), *_checkpoints(self.folder))
        folders = [self.folder / PILOT / "adapter", self.folder, *checkpoints]
        return next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)

    @property
    def predicted_of(self) -> str:
        """Display name of the predicted cost: for steps in parts, that of the smallest possible part."""
        in_parts = any("parts" in row for row in (self.results.get(PILOT, {}), *self.metrics.get(PILOT, ())))
        return "predicted cost for the longest row alone" if in_parts else "predicted cost"

    def predicted(self) -> Points:
        """(step, predicted cost of the plan) of each decision."""
        return [(record.step, record.predicted_cost) for record in self.decisions]

    def points(self, run: str, key: str) -> Points:
        """Return (step, value) for each line of a run's metrics with the value."""
        rows = self.metrics.get(run, ())
        return [(row["step"], row[key]) for row in rows if "step" in row and row.get(key) is not None]

    def peaks(self) -> dict[str, Points]:
        """(step, peak bytes) of each measured run; an ongoing run uses those of its decisions.

        Empty under a budget of parameters, where bytes are irrelevant.
        """
        if self.unit != "bytes":
            return {}
        peaks = {run: self.points(run, "peak_bytes") for run in RUNS}
        if not peaks[PILOT]:
            measured = [(record.step, record.measured_cost) for record in self.decisions]
            peaks[PILOT] = [(step, cost) for step, cost in measured if cost is not None]
        return {run: points for run, points in peaks.items() if points}


def log_of(folder: Path) -> DecisionLog | None:
    """Return the decision log in a run's folder, or of the folder itself; None if there is none."""
    logs = [DecisionLog(path) for path in (folder / "decisions", folder)]
    return next((log for log in logs if len(log)), None)


def find_log(folder: Path) -> DecisionLog:
    """Like `log_of`, but raises RunFolderError if there is none."""
    log = log_of(folder)
    if log is None:
        raise RunFolderError(f"{folder} has no decision log: neither decisions/{LINES} nor {LINES} exists.")
    return log


def read_run(folder: Path) -> RunData:
    """Read the contents of a folder.

    Raises:
        RunFolderError: it has neither a decision log nor the summary of a fine-tune.
    """
    missing: list[str] = []
    log = log_of(folder)
    of_finetune = any((folder / name).is_file() for name in ("config.json", "summary.json", f"metrics-{PILOT}.jsonl"))
    if log is None and not (folder / "summary.json").is_file():
        lacks = f"it has no decision log (decisions/{LINES} or {LINES}) and no summary.json"
        others = "the output folder of a Trainer with rankpilot.attach, or the folder of a decision log"
        advice = f"Pass the folder of `rankpilot finetune`, {others}."
        raise RunFolderError(f"{folder} is not the folder of a run: {lacks}. {advice}")
    summary = _read_summary(folder, missing) if of_finetune else {}
    if log is None and not summary:
        shows = "The page shows fine-tunes; for results of `rankpilot policy evaluate`, see its summary.json."
        why = f"there is no decision log, and {missing[0]}"
        raise RunFolderError(f"{folder} is not the folder of a run: {why}. {shows}")
    metrics = _read_metrics(folder, summary, missing) if of_finetune else _read_trainer_state(folder, missing)
    decisions: list[DecisionRecord] = []
    if log is None:
        missing.append("decisions (no decision log)")
    else:
        try:
            decisions = log.read()
        except RunFolderError as error:
            missing.append(f"all decisions ({error})")
    control = _read_control(log.folder, missing) if log else {}
    return RunData(folder, summary, metrics, decisions, tuple(missing), **control)


def _read_control(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Return `control` and `broken` of a run by name; empty without control and failures."""
    try:
        rows = read_json_lines(folder / CONTROL)
        moves = tuple(
            (counted(row["step"]), 2 ** finite(row["change"]), finite(row["rate"]), bool(row["undone"]))
            for row in rows
            if row["change"] and "race" not in row
        )
        broken = tuple((counted(row["step"]), bool(row["undone"])) for row in rows if row.get("not_finite"))
        races = [Race.of(row) for row in rows if "race" in row]
        return {"control": moves, "broken": broken, "race": races[-1] if races else None}
    except (DataError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        missing.append(f"learning-rate corrections ({first_line(error)})")
        return {}


def control_sentence(run: RunData) -> str:
    """Describe corrections of the learning rate during the run; empty without any."""
    if not run.control:
        return str(run.race or "")
    moves = [
        (f"x {factor:.2g} at step {step} (to {rate:.2g}{', restoring the previous adapters' if undone else ''})")
        for step, factor, rate, undone in run.control
    ]
    steps = [str(step) for step, undone in run.broken if undone]
    undone = f" Non-finite values after step {', '.join(steps)} were undone." if steps else ""
    return f"The learning rate was corrected during the run: {', '.join(moves)}.{undone}"


def moves_sentence(record: DecisionRecord, predicted_of: str) -> str:
    """Describe a decision: moved modules, cost of the plan, and ranks changed by the budget.

    Args:
        record: record of the decision.
        predicted_of: see `RunData.predicted_of`.
    """
    before, after, unit = record.rank_before, record.rank_after, record.problem.cost.unit
    up, down = int((after > before).sum()), int((after < before).sum())
    moved = f"{up} up, {down} down, {len(after) - up - down} unchanged"
    if record.measures:
        moved = f"{np.count_nonzero(after)} of {len(after)} modules adapted"
    plan = f"{cost_text(record.predicted_cost, unit)} of {cost_text(record.problem.limit, unit)}"
    measured = record.measured_cost
    seen = f" (measured before: {cost_text(measured, unit)})" if measured is not None else ""
    changed = int((record.rank_clipped != after).sum())
    budget = f" The budget changed the requested rank of {changed} modules." if changed else ""
    return f"{moved}; {predicted_of} {plan}{seen}.{budget}"


def rates_sentence(record: DecisionRecord) -> str:
    """Describe the plan's learning rate relative to plain LoRA's; empty if equal or unknown."""
    plain, mine = record.rates or (1.0, 1.0)
    if math.isclose(plain, mine, rel_tol=0.01):
        return ""
    return f"The plan was trained at a peak learning rate of {mine:.3g}, equivalent to {plain:.3g} for plain LoRA."


def run_names(runs: Sequence[RunData]) -> list[str]:
    """Return a unique name per run: that of its folder, with as much of the path as needed."""
    paths = [run.folder.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]  # one run, given several times


def _read_summary(folder: Path, missing: list[str]) -> Mapping[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        missing.append("results (the run has not finished: no summary.json)")
        return {}
    try:
        summary = read_object(path)
        if not isinstance(summary["runs"][PILOT], dict):
            raise TypeError(f"results ({PILOT!r} has none)")
        check_summary(summary)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing.append(f"results ({path} is unreadable: {_said(error)})")
        return {}
    return summary


def _said(error: Exception) -> str:
    """Describe an error about a file."""
    return f"missing {error}" if isinstance(error, KeyError) else first_line(error)


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
    """Read the losses logged by a Trainer up to its last checkpoint."""
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
    """Yield the checkpoints of a Trainer, the last one first."""
    numbered = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*")]
    yield from (path for _, path in sorted(((int(n), path) for n, path in numbered if n.isdecimal()), reverse=True))


def number_rows(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the numbers of each metrics line by name, and its step times; invalid lines are left out."""
    objects = [line for line in lines if isinstance(line, dict)]
    rows = [{key: value for key, value in line.items() if _belongs(key, value)} for line in objects]
    return [row for row in rows if is_number(row.get("step", 0)) and 0 <= row.get("step", 0) <= MOST_NUMBER]


def check_summary(summary: Any) -> None:
    """Validate the value types of a summary.

    Raises:
        TypeError, KeyError, AttributeError: a value has the wrong type, or is missing.
    """
    for name, run in summary["runs"].items():
        _check_numbers(run, _RESULTS, f"{shown(name)}: ")
        hardware = run.get("hardware") or {}
        _check_numbers(hardware, ("busy", "free_bytes", "total_bytes"), f"{shown(name)}: ")
        for text in (hardware.get("device"), run.get("energy_source")):
            if not isinstance(text, str | None):
                raise TypeError(f"{shown(name)} has an invalid hardware name: {shown(text)}")
        ranks = run.get("ranks") or {}
        if not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise TypeError(f"{shown(name)} has an invalid rank")
    _check_numbers(summary, _SETUP, "")
    if not (summary.get("largest_class") or 0) <= 1:
        raise TypeError(f"largest_class is {summary['largest_class']}, not a share")
    for name in ("model", "data", "policy"):
        if not isinstance(summary.get(name), str | None):
            raise TypeError(f"{name} is {shown(summary[name])}")


def is_number(value: Any) -> bool:
    """True if a value is a number within floating-point range, including NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= MOST_NUMBER


def _belongs(key: str, value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value)) if key == "step_s" else is_number(value)


def _check_numbers(values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        value = values.get(name)
        if value is not None and (not is_number(value) or value < 0):
            raise TypeError(f"{where}{name} is {shown(value)}")
