"""`python -m benchmarks pages`: figures in the documentation, written again from the stored rows of benchmarks.

A page has a block between two comments, `<!-- generated: NAME -->` and `<!-- end -->`. What stands between them is made
by the function of that name in `BLOCKS`; the rest of a page belongs to its writers, who quote no figures of rows.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rankpilot.common.errors import DataError, UnknownNameError
from rankpilot.common.files import read_json, read_object, write_text
from rankpilot.cost.cards import DeviceSpec, card_rates, device_table
from rankpilot.cost.forecast.card_use import UNDER
from rankpilot.cost.forecast.configured_step import ConfiguredStep, base_of
from rankpilot.cost.forecast.memory_of import AskedStep
from rankpilot.cost.step_config import StepConfig
from rankpilot.cost.streaming import StreamedTime
from rankpilot.decide.plan.rate import RULE
from rich.console import Console

from . import agent, published_page, race, rates, worth
from .harness import Figures
from .published_time import KINDS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

BLOCK = re.compile(r"^<!-- generated: (.+?) -->\n(.*?)^<!-- end -->$", re.M | re.S)
"""A block with its name and its content."""


@dataclass(frozen=True)
class Options:
    """Write the figures of the documentation again, from the stored rows of benchmarks.

    Attributes:
        check: write nothing; the exit status is 2 where a page is out of date.
        json: also write the names of the pages that were out of date to this file.
    """

    check: bool = False
    json: Path | None = None


# Tables ---------------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown whose first `left` columns are words; the others are figures, to the right."""
    lines = [columns, ["---" if index < left else "---:" for index in range(len(columns))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: float | str, digits: int = 1) -> str:
    """A difference in per cent with its sign; 0 has that of a gain."""
    return f"{round(float(value), digits) + 0.0:+.{digits}f} %"


def t4_in_short() -> str:
    """How exact predictions for a T4 are, in two sentences."""
    groups = ("t4",), ("t4_reserved none", "t4_reserved nf4")
    live, kept = (_percents(row for row in _list("published_rows") if row["group"] in group) for group in groups)
    told = (
        f"On {len(live)} published steps on a T4, predicted *tensor* bytes are off by {np.abs(live).mean():.1f} % on "
        f"average, and at most {-live.min():.1f} % too low. What torch's allocator reserves, which decides whether a "
        f"step fits, is harder: {np.abs(kept).mean():.1f} % on average, from {-kept.min():.1f} % too low to "
        f"{kept.max():.1f} % too high."
    )
    return textwrap.fill(told, 140)


MAY = "may not fit"

RUN_KINDS = {
    "none": "text on one GPU", "nf4": "nf4", "int8": "int8", "pictures": "pictures", "generation": "answers generated",
    "states": "layers with a state", "zero2": "ZeRO-2", "fsdp2": "FSDP2", "zero3": "ZeRO-3", "ddp": "DDP",
}  # fmt: skip
"""Kinds of runs with a margin of their own, as a page names them."""


def room_left() -> str:
    """How much of a card a run that fits leaves free, and the verdicts on runs of known outcome."""
    rows = _list("published_runs")
    known = [row for row in rows if row["outcome"]]
    failed = [row for row in known if row["outcome"] == "fails"]
    wrong, unsure = (sum(row["verdict"] == word for row in those) for word, those in (("fits", failed), (MAY, known)))
    beyond = sum((row["beyond"] or 0) > 0 for row in rows)
    table = "\n".join(
        ["| run | left free |", "|---|---:|", *(f"| {RUN_KINDS[k]} | {v:.0%} |" for k, v in UNDER.items())]
    )
    told = (
        f"Of {len(known)} published runs of known outcome, {len(failed)} ran out of memory. The verdict says that "
        f"{wrong or 'none'} of these fit, and that {unsure} of all runs may not fit. Of "
        f"{sum(bool(row['error']) for row in rows)} runs of known size, {beyond} took more than predicted with this "
        "room (causes: benchmarks/published_peaks/runs.csv)."
    )
    return f"{table}\n\n{textwrap.fill(told, 140)}"


def _percents(rows: Iterable[dict[str, Any]]) -> Any:
    """By how many per cent predictions are above what was measured, (rows,)."""
    return np.array([100 * (row["predicted"] / row["measured"] - 1) for row in rows if row["measured"]])


def races() -> str:
    """What races of learning rates choose, by where they start."""
    figures = race.report(race.stored_rows(), Console(file=io.StringIO()))
    lines = []
    for group in sorted({key.rpartition(", ")[0] for key in figures}):
        found = [f"{group}, {start:g} of the rule" for start in (0.5, 1, 2)]
        kept = [f"{figures[f'{key}: start']:+.2f}" for key in found if f"{key}: start" in figures]
        races = [
            f"{figures[f'{key}: race']:+.2f} ({figures[f'{key}: worst']:+.2f})" if f"{key}: race" in figures else ""
            for key in found
        ]
        auto = figures.get(f"{found[1]}: auto")
        cells = f"{figures[f'{found[1]}: cells']:.0f}", ", ".join(kept), "" if auto is None else f"{auto:+.2f}"
        lines.append((*group.split(", "), *cells, *races, f"{figures[f'{found[1]}: time']:.2f}"))
    names = ("models", "steps", "sweeps", "start kept, %", '`"auto"`', "race from half (worst)", "from the rule")
    return table((*names, "from twice", "time"), lines, left=2)


def agent_table() -> str:
    """A trained agent, rules and constants by how far above the best hand rule they end."""
    rows = agent.stored_rows()
    lines = [
        (name, *(f"{of[regime]:+.1f}".replace(" to ", ", ") if regime in of else "" for regime in agent.COLUMNS))
        for name, of in agent.table_rows(rows)
    ]
    counts = {each: len({row.task for row in rows if each in (row.regime, agent.ALL)}) for each in agent.COLUMNS}
    names = [
        name for name in dict.fromkeys(row.policy for row in rows) if name == agent.RULE or name.startswith("agent ")
    ]
    shares = ", ".join(f"{name} {agent.planted_share(rows, name):.0%}" for name in names)
    told = f"Of the oracle's gain on planted tasks of rank 1.5 and less: {shares}."
    return table(("", *(f"{each}, {count} tasks" for each, count in counts.items())), lines) + f"\n\n{told}"


PARTS = {
    "all": "all modules",
    "mlp": "MLPs",
    "every-other": "every other layer",
    "top-3/4": "the top three quarters of the layers",
    "attention": "attention",
    "top-1/2": "the top half",
    "top-1/4": "the top quarter",
}


DRAWN = ("language-de", "language-fi")
"""Texts whose plans had drawn rates."""


def parts_of_whole() -> list[tuple[str, int, int, list[float]]]:
    """Adapters on parts of SmolLM2-135M: the part, the least and the highest rank, and the losses in per cent.

    Losses are versus plain LoRA at the best of three rates, one for each plan; the best part comes first.
    """
    found: dict[tuple[str, bool], list[tuple[int, float]]] = defaultdict(list)
    for packed in json.loads(worth.PACKED.read_text(encoding="utf-8")):
        if packed["task"][0] == "smollm2-135m" and packed["task"][1] not in DRAWN:
            best = min(run[4] for run in packed["runs"] if run[:3] == ["all", 8, 1.0])
            for part, rank, *_, loss in packed["runs"]:
                if part in PARTS and (part, rank) != ("all", 8):
                    found[part, part == "all" and rank == 4].append((rank, 100 * math.log(loss / best)))
    rows = []
    for (part, _), runs in sorted(found.items(), key=lambda item: np.mean([loss for _, loss in item[1]])):
        ranks, losses = zip(*runs, strict=True)
        rows.append((part, min(ranks), max(ranks), [*losses]))
    return rows


def parts() -> str:
    """What adapters on a part of SmolLM2-135M lose versus plain LoRA at the best of three rates."""
    rows = []
    for part, least, most, losses in parts_of_whole():
        told = f"{least} to {most}" if least < most else f"{least}"
        least_to_most = f"{min(losses):+.1f} to {max(losses):+.1f}"
        rows.append((PARTS[part], told, f"{len(losses)}", signed(float(np.mean(losses))), least_to_most))
    return table(("adapters on", "ranks", "plans", "loss", "least to most"), rows, left=2)


def published_rates() -> str:
    """The loss above that of the best rate, over published sweeps and those of SmolLM2 whole."""
    groups = [[*rates.published()], [sweep for sweep in rates.published() if sweep.rank >= 64], [*rates.whole()]]
    rows = []
    for words, rate in (("the rule", None), ("3e-4 for all", 3e-4), ("1e-4 for all", 1e-4), ("1e-3 for all", 1e-3)):
        regrets = [[sweep.regret(rate or sweep.rate(RULE)) for sweep in group] for group in groups]
        rows.append((words, *(f"{np.mean(each):.2f} % (worst {max(each):.1f})" for each in regrets)))
    columns = ("rate", "41 published sweeps, 1B to 685B", "those of rank 64 and 128", "SmolLM2-135M, 17 texts")
    return table(columns, rows)


def step_cost() -> str:
    """The time of ten steps with a decision among them, over that of plain LoRA."""
    found = _figures("overhead")
    rows = []
    for method, words in {
        "plain_again": "plain LoRA once more",
        "adalora": "AdaLoRA, 12 to 8",
        "rankpilot": "rankpilot, signal-mean",
    }.items():
        keys = [f"{family}.{method}.cycle_ratio" for family in ("bert", "llama")]
        rows.append((words, *(f"{found[k]:.3f} ({found[f'{k}_low']:.3f} to {found[f'{k}_high']:.3f})" for k in keys)))
    for share, words in (("own_share", "of these steps"), ("own_share_of_a_step", "of a step between decisions")):
        cells = [f"{100 * found[f'{family}.rankpilot.{share}']:.1f} %" for family in ("bert", "llama")]
        rows.append((f"signals, decisions and resizes, share {words}", *cells))
    return table(("versus plain LoRA", "BERT", "Llama"), rows)


def memory_accuracy() -> str:
    """Predicted bytes, held against our own steps; and verdicts on those that others measured."""
    ours, found = _figures("memory"), _figures("published")
    under, over = (100 * ours[f"accuracy.checkpointing.peak_error_{name}"] for name in ("under", "over"))
    exact = 100 * max(
        abs(ours[f"accuracy.no_checkpointing.peak_error_{name}"]) for name in ("under", "median", "high", "over")
    )
    plans = f"{ours['accuracy.plans']} random plans, four families"
    rows = [
        (f"peak of a step, {plans}, no checkpointing", f"{exact:.2f} %", f"{exact:.2f} %"),
        ("the same with checkpointing, safety margin included", f"{max(-under, 0):.2f} %", f"{over:.2f} %"),
    ]
    every, clear = (100 * found[f"t4_verdicts.{name}_right_share"] for name in ("smaller", "clear"))
    told = (
        f"Verdicts on the T4's steps for cards of 2 to 13 GiB are right in {every:.1f} %, and in {clear:.1f} % where "
        "the published figures are 3 % or more from the card."
    )
    return f"{table(('predicted', 'too low, at most', 'too high, at most'), rows)}\n\n{textwrap.fill(told, 140)}"


def time_accuracy() -> str:
    """Predicted seconds, held against those of others on an A100."""
    found = _figures("published_time")
    rows = [
        (words, *(f"{100 * found[f'{kind}.{key}']:.1f} %" for kind in KINDS))
        for words, key in (
            ("step seconds, median error", "median_error"),
            ("step seconds, largest error", "worst_error"),
            ("ratio of two steps, median error", "median_share_error"),
            ("longer of two steps identified", "order_right"),
        )
    ]
    return table(("20 held-out steps on an A100", "bf16", "four bits"), rows)


MODEL_NAMES = {"all-minilm-l6-v2": "MiniLM", "smollm2-135m-instruct": "SmolLM2-135M"}


def steps_in_parts() -> str:
    """Steps in parts over padded rectangles, by the text whose rows have their lengths."""
    found, rows = _figures("parts"), []
    for key in (name.removesuffix(".time") for name in found if name.endswith(".16.time")):
        model, text, count = key.split(".")
        values = (found[f"{key}.{name}"] for name in ("time", "time checkpointed", "peak"))
        lengths = f"{found[f'{key}.mean length']:.0f}, {found[f'{key}.longest']}"
        differs = (f"{found[f'{key}.gradient{half}']:.0e}" for half in ("", " bf16"))
        rows.append((MODEL_NAMES[model], f"{count} of {text}", lengths, *(f"{v:.2f}" for v in values), *differs))
    columns = ("", "rows", "tokens: mean, longest", "time", "time, all layers checkpointed", "peak")
    return table((*columns, "gradient differs, fp32", "bf16 autocast"), rows, 2)


def parts_and_others() -> str:
    """Four batches of 16 rows under each method, over padded rectangles."""
    found = _figures("parts")
    keys = [name.removesuffix(".rectangle.speed") for name in found if name.endswith(".code.16.rectangle.speed")]
    ways = [re.fullmatch(rf"{re.escape(key)}\.(.+)\.speed", name) for key in keys for name in found]
    heads, rows = [], list[tuple[str, ...]]()
    for key in keys:
        model, text, count = key.split(".")
        heads.append(f"{MODEL_NAMES[model]}, {count} of {text}")
    for way in dict.fromkeys(way[1] for way in ways if way):
        cells = []
        for prefix in (f"{key}.{way}" for key in keys):
            speed, peak, differs = (found.get(f"{prefix}.{name}") for name in ("speed", "peak", "gradient"))
            cells.append("" if speed is None else f"{speed:.2f} ({peak:.2f}; {differs:.0e})")
        rows.append((way, *cells))
    return table(("rows per second (peak; gradient difference)", *heads), rows)


def parts_hold() -> str:
    """What holds of any batch in parts."""
    found = _figures("parts")
    told = (
        f"In {found['losses.steps']} steps of MiniLM losses differ by {found['losses.difference']:.0e} at most. Of "
        f"{found['budgets.batches']:,} random batches under 30 to 100 % of their bytes {found['budgets.above']} peaked "
        f"above the budget. {found['errors.met']} of {found['errors.runs']} runs continued after an error in a part; "
        f"their adapters differ by {found['errors.difference']:.0e} at most from an undisturbed run's."
    )
    return textwrap.fill(told, 140)


def _figures(name: str) -> dict[str, Any]:
    """The stored figures of a benchmark, by their flat names."""
    return read_object(RESULTS / f"{name}.json")


def _list(name: str) -> list[Any]:
    """The stored rows of a benchmark."""
    rows = read_json(RESULTS / f"{name}.json")
    assert isinstance(rows, list)
    return rows


TOKENS = (512, 1024, 2048, 4096, 8192)
"""Of a pass, in the table of streamed bases."""


def streamed_base() -> str:
    """Seconds of a step of Llama-3.1-8B with all layers streamed, over those with its whole base on the card."""
    rows = []
    kinds: dict[str, dict[str, Any]] = {"bf16": {}, "nf4": {"quantization": "nf4", "prepare_kbit": False}}
    for name, settings in kinds.items():
        asked = (StepConfig(batch_size=1, max_length=tokens, bf16=True, **settings) for tokens in TOKENS)
        steps = [AskedStep("llama-3.1-8b", step).configured()[0] for step in asked]
        for card in ("RTX 3090", "RTX 4090", "A100 80GB", "H100"):
            times = [_streamed_share(step, device_table()[card]) for step in steps]
            rows.append((f"{card}, {name}", *(f"{time:.2f}" for time in times)))
    return table(("all layers streamed", *(f"{tokens:,} tokens" for tokens in TOKENS)), rows)


def _streamed_share(step: ConfiguredStep, card: DeviceSpec) -> float:
    assert step.work is not None
    assert card.rates is not None
    base, time = base_of(step), step.work.time(card_rates(card.rates, "bf16"))
    layers, ranks = tuple(segment.name for segment in step.memory.segments), np.full(len(step.targets), 8)
    streamed = StreamedTime(time, layers, base, base.count, card.bus_bytes_per_s)
    return streamed.seconds(ranks) / time.seconds(ranks, ())


BLOCKS: dict[str, Callable[[], str]] = {
    "room left": room_left,
    "T4 in short": t4_in_short,
    "parts of SmolLM2": parts,
    "rates": published_rates,
    "agent": agent_table,
    "step cost": step_cost,
    "memory accuracy": memory_accuracy,
    "time accuracy": time_accuracy,
    "steps in parts": steps_in_parts,
    "parts and others": parts_and_others,
    "parts hold": parts_hold,
    "race": races,
    "streamed base": streamed_base,
    "published memory": lambda: published_page.page(_list("published_rows")),
}
"""What each block is made by."""


# Pages ----------------------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """All pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def made_again(text: str) -> str:
    """The text of a page with all its blocks made again.

    Raises:
        UnknownNameError: nothing makes a block of that name.
        DataError: a block has no end.
    """

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise UnknownNameError.of("generated block", name, BLOCKS)
        return f"<!-- generated: {name} -->\n\n{BLOCKS[name]()}\n\n<!-- end -->"

    if text.count("<!-- generated: ") != len(BLOCK.findall(text)):
        raise DataError("A block is between `<!-- generated: NAME -->` and `<!-- end -->`, each on a line of its own.")
    return BLOCK.sub(block, text)


def outdated() -> dict[Path, str]:
    """The pages that stored rows would have otherwise, and how."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    made = {page: made_again(text) for page, text in texts.items()}
    return {page: text for page, text in made.items() if text != texts[page]}


def benchmark(options: Options, console: Console) -> Figures:
    """Write what is out of date.

    Raises:
        DataError: with `check`, a page is out of date.
    """
    found = outdated()
    names = [page.relative_to(ROOT).as_posix() for page in found]
    if options.check and names:
        raise DataError(f"Out of date: {', '.join(names)}. `python -m benchmarks pages` writes their figures again.")
    for page, text in found.items():
        write_text(page, text)
    console.print(f"Written: {', '.join(names)}." if names else "All pages are up to date.", markup=False)
    return {"written": ", ".join(names)}
