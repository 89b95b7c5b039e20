"""The report of a fine-tune: a page of Markdown with pictures, made from the run's folder alone.

    report.md  figures/ranks.png  figures/loss.png  figures/memory.png

`run_data.py` says which folders it reads. A report can be made again at any time, also while the run goes on; parts
whose input is missing are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from ...allocation.decision_line import promise
from ...common.drawing import save_figure
from ...common.files import read_object, read_text, write_text
from ...common.tensor_files import read_shapes
from ...errors import DataError
from ...finetune.config import PILOT
from .comparison import markdown_table, subject
from .decisions import describe_decisions
from .figures import loss_curves
from .hardware import hardware_of
from .heatmap import rank_heatmap
from .memory_figure import cost_timeline
from .run_data import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunData, read_run
from .verdict import Verdict, verdict

LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
"""PEFT's classes that load an adapter with its base model, by the adapter's task."""


@dataclass(frozen=True, eq=False)
class Report:
    """A report that was written.

    Attributes:
        path: the page.
        run: what it is about.
        verdict: its first sentences.
    """

    path: Path
    run: RunData
    verdict: Verdict


def write_report(folder: Path) -> Report:
    """Make `report.md` and `figures/*.png` of a run's folder, again if they exist.

    Raises:
        RunFolderError: see `read_run`.
    """
    run = read_run(folder)
    opinion = verdict(run)
    sections = [
        _head(run, opinion),
        _section("Result", markdown_table(run)),
        _section("The adapter", _adapter(run)),
        _section("Where the rank went", _ranks(run)),
        _section("Loss", _losses(run)),
        _section("Memory" if run.unit == "bytes" else "Parameters", _costs(run)),
        _section("Decisions", _decisions(run)),
        _section("Reload", _reload(run)),
        _section("Set-up", _setup(run)),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return Report(path, run, opinion)


def write_figures(run: RunData) -> None:
    """Make the pictures of a report alone: `figures/*.png` in the run's folder."""
    for draw in (_ranks, _losses, _costs):
        draw(run)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _head(run: RunData, opinion: Verdict) -> str:
    title = "# Fine-tune report" + (f": {subject(run)}" if subject(run) else "")
    warnings = [f"**{sentence}**" for sentence in opinion.warnings]
    left_out = [f"Left out of this report: {'; '.join(run.missing)}."] if run.missing else []
    return "\n\n".join([title, *warnings, *opinion.results, *left_out])


def _adapter(run: RunData) -> str:
    """Where the adapter is, how plain PEFT loads and merges it, and how it is exported."""
    folder = run.adapter
    if folder is None:
        return ""
    config = read_object(folder / ADAPTER_CONFIG)
    base, outputs = config.get("base_model_name_or_path"), run.summary.get("outputs", _outputs(folder, config))
    loader = LOADERS.get(str(config.get("task_type")), "AutoPeftModel") if base else "PeftModel"
    options = f", num_labels={outputs}" if type(outputs) is int and base else ""  # no other text gets into the code
    return f"""\
The adapter is in `{folder}`; its base model is {f"`{base}`" if base else "the one that was fine-tuned"}. Plain PEFT \
loads it:

```python
from peft import {loader}

model = {loader}.from_pretrained({"" if base else "base_model, "}{str(folder)!r}{options})
merged = model.merge_and_unload()  # the base model with the adapter in its weights, for save_pretrained
```

For vLLM and llama.cpp, which read one rank for all modules, and for a new fine-tune at the learned ranks:

```bash
rankpilot export {quote(str(folder))} --output padded
rankpilot export {quote(str(folder))} --format rank-pattern
```"""


def _outputs(adapter: Path, config: Mapping[str, Any]) -> int | None:
    """How many outputs the head has that was saved with an adapter, if any: those of `out_proj`, or the fewest."""
    names = config.get("modules_to_save")
    if not str(config.get("task_type")).endswith("_CLS") or not isinstance(names, list):
        return None
    with suppress(DataError):
        shapes = read_shapes(adapter / ADAPTER_WEIGHTS).items()
        heads = {
            key: shape[0] for key, shape in shapes if len(shape) == 2 and set(key.split(".")) & set(map(str, names))
        }
        last = [count for key, count in heads.items() if ".out_proj." in key]
        return min(last or heads.values(), default=None)
    return None


def _ranks(run: RunData) -> str:
    records = run.decisions
    if not records:
        return ""
    if any(record.modules != records[0].modules for record in records):
        return "The decisions are not all about the same modules, so there is no picture of their ranks."
    steps, ranks = [record.step for record in records], [record.rank_after for record in records]
    if steps[0] > 0:  # before the first decision
        steps, ranks = [0, *steps], [records[0].rank_before, *ranks]
    figure = rank_heatmap(steps, np.array(ranks), records[0].modules, records[0].problem.blocks, run.steps)
    save_figure(figure, run.folder / "figures" / "ranks.png")
    return "![Rank of every module over the run](figures/ranks.png)"


def _losses(run: RunData) -> str:
    curves = {name: {"train": run.points(name, "loss"), "eval": run.points(name, "eval_loss")} for name in run.metrics}
    if not any(points for curve in curves.values() for points in curve.values()):
        return ""
    save_figure(loss_curves(curves, [record.step for record in run.decisions]), run.folder / "figures" / "loss.png")
    return "![Training and held-out loss](figures/loss.png)"


def _costs(run: RunData) -> str:
    peaks = run.peaks() if run.unit == "bytes" else {}
    predicted = run.predicted()
    if not run.limits or not (peaks or predicted):
        return ""
    figure = cost_timeline(peaks, run.limits, predicted, run.unit, run.steps)
    save_figure(figure, run.folder / "figures" / "memory.png")
    what = "Peak memory" if run.unit == "bytes" else "Parameters of the adapter"
    return f"![{what} against the budget](figures/memory.png)"


def _decisions(run: RunData) -> str:
    if not run.decisions:
        return ""
    note = (
        "The largest moves of each decision, with the features in which the module stood out from all others "
        "(sd: standard deviations from their mean). They show what was unusual, not what the policy weighed."
    )
    lines = "\n".join(record.line() for record in run.decisions)
    expected = "" if run.first is None or run.first.misses_goal else promise(run.first)
    return "\n\n".join(filter(None, [f"```\n{lines}\n```", expected, note, *describe_decisions(run.decisions)]))


def _reload(run: RunData) -> str:
    check = run.summary.get("reload")
    if not check:
        return ""
    same = "gives identical outputs" if check.get("identical") else "**does not give identical outputs**"
    largest = check.get("max_abs_difference")
    detail = f" (largest difference {largest:.3g})" if largest is not None else ""
    return f"The saved adapter, loaded by plain PEFT, {same}{detail}."


def _setup(run: RunData) -> str:
    keys = ("model", "data", "policy", "seed")
    lines = [f"* {key}: {run.summary[key]}" for key in keys if run.summary.get(key) is not None]
    lines += [f"* {name}: {words}" for name, words in hardware_of(run.results.get(PILOT, {})).items()]
    path = run.folder / "config.json"
    if path.is_file():
        config = read_text(path).strip()
        lines.append(f"\n<details><summary>config.json</summary>\n\n```json\n{config}\n```\n\n</details>")
    return "\n".join(lines)
