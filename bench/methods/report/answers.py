"""Answers in plain words, made from the figures: each sentence states what the rows show, losses too."""

from __future__ import annotations

from ....common.units import plural
from .document import Block, Bullets, Heading, Paragraph
from .numbers import FEWEST_TASKS, KINDS, REFERENCE, Comparison, Costs, Results, compare, time_to_loss
from .tables import percent

OURS, FIRST = "ours", "ours-first-plan"

RANK_32 = "rslora-32"
"""Rank 32 everywhere, which needs no tool."""

STATIC = ("all-linear-8-ckpt", "top-half-16", "qv-16", "top-down", REFERENCE, "simple-ckpt", RANK_32)

CHECKS = {"check-worse": -1, "check-better": 1}
"""The sign of the gain that each check must show against `top-down`."""


def verdict(one: Comparison) -> str:
    """Which side the interval of a mean gain is on, where there are tasks enough to tell."""
    if one.tasks < FEWEST_TASKS:
        return f"{plural(one.tasks, 'task')}, too few to tell"
    if one.mean.low > 0:
        return "better"
    return "worse" if one.mean.high < 0 else "not told apart"


def against(results: Results, first: str, second: str) -> str | None:
    """One sentence on two methods; None where they share no cell."""
    one = compare(results, first, second)
    if one is None:
        return None
    pairs = one.pairs
    return (
        f"`{first}` against `{second}`, {plural(one.cells, 'cell')}: {verdict(one)}; mean gain in log "
        f"loss {percent(one.mean)} %, {pairs.wins} wins, {pairs.ties} ties, {pairs.losses} losses, worst run "
        f"{100 * one.worst:+.1f} %."
    )


def _all_against(results: Results, first: str, others: tuple[str, ...]) -> Bullets | None:
    lines = [line for other in others if (line := against(results, first, other)) is not None]
    return Bullets(tuple(lines)) if lines else None


def check_results(results: Results) -> dict[str, bool]:
    """Whether the benchmark finds each check where it must be, with its whole interval."""
    found = {}
    for name, sign in CHECKS.items():
        one = compare(results, name, "top-down")
        if one is not None:
            found[name] = (one.mean.low > 0) if sign > 0 else (one.mean.high < 0)
    return found


def checks(results: Results) -> list[Block]:
    """What the methods show that are worse or better by construction."""
    lines = []
    for name, ok in check_results(results).items():
        wanted = "better" if CHECKS[name] > 0 else "worse"
        state = "found" if ok else "NOT FOUND: differences of this size cannot be told apart here"
        parts = {"mean gain": results, **{f"on {kind} alone": results.of_kind(kind) for kind in KINDS}}
        compared = {words: one for words, part in parts.items() if (one := compare(part, name, "top-down")) is not None}
        told = ", ".join(f"{words} {percent(one.mean)} %" for words, one in compared.items())
        lines.append(f"`{name}` must be {wanted} than `top-down`: {state}; {told}.")
    return [Heading("Does the benchmark see what must be there?"), Bullets(tuple(lines))] if lines else []


def answers(results: Results, costs: dict[str, Costs]) -> list[Block]:
    """The five questions."""
    blocks: list[Block] = [Heading("Five questions")]
    for title, made in (
        ("Does it use memory better?", _memory(results, costs)),
        ("Is it more accurate, or faster?", _accuracy(results, costs)),
        ("Is it better than static ranks?", [_all_against(results, OURS, STATIC)]),
        ("What decides the best allocation?", _decides(results)),
        ("What would improve it?", _improves(results)),
    ):
        kept = [block for block in made if block is not None]
        if kept:
            blocks += [Heading(title, 3), *kept]
    return blocks


def _memory(results: Results, costs: dict[str, Costs]) -> list[Block | None]:
    if OURS not in costs:
        return [None]
    mine = costs[OURS]
    names = [name for name in ("all-linear-8-ckpt", REFERENCE) if name in costs]
    beside = ", ".join(
        f"`{name}` {100 * costs[name].bytes:.0f} % and a step of {costs[name].step:.2f}" for name in names
    )
    text = (
        f"Under the budgets of these cells `{OURS}` takes {100 * mine.bytes:.0f} % of the bytes of all-linear rank 8 "
        f"at the peak, and a step {mine.step:.2f} of its time ({beside}). Steps measured above the limit: in "
        f"{mine.breaches} runs."
    )
    return [
        Paragraph(text),
        _all_against(results, OURS, ("all-linear-8-ckpt", "adalora-peak", "random")),
        _all_against(results, "ours-recompute", (REFERENCE, "all-linear-8-ckpt", "simple-ckpt")),
    ]


def _accuracy(results: Results, costs: dict[str, Costs]) -> list[Block | None]:
    lines = []
    for name in (OURS, FIRST, "adalora-peak", "all-linear-8-ckpt"):
        reached = time_to_loss(results, name)
        if reached is not None and name in costs:
            time = f"after {reached[0]:.2f} of its time (median)" if reached[1] else "never"
            lines.append(
                f"`{name}` reaches the loss at which `{REFERENCE}` ends in {reached[1]} of {reached[2]} runs, {time}."
            )
    return [Bullets(tuple(lines)) if lines else None]


def _decides(results: Results) -> list[Block | None]:
    lines = [
        against(results, OURS, "ours-shuffled"),
        against(results, OURS, "ours-replay"),
        against(results, "top-down", "random"),
        against(results, "qv-16", "top-half-16"),
        *(against(results, FIRST, f"ours-no-{group}") for group in ("signals", "costs", "place", "progress")),
    ]
    kept = tuple(line for line in lines if line is not None)
    return [Bullets(kept) if kept else None]


def _improves(results: Results) -> list[Block | None]:
    lines = [
        against(results, OURS, FIRST),
        against(results, OURS, "ours-no-rank-0"),
        against(results, OURS, "tpe"),
        against(results, OURS, "best-static"),
        *_by_kind(results, RANK_32, REFERENCE),
        *_by_kind(results, OURS, RANK_32),
        _worst_cells(results),
    ]
    kept = tuple(line for line in lines if line is not None)
    return [Bullets(kept) if kept else None]


def _by_kind(results: Results, first: str, second: str) -> list[str | None]:
    """Two methods on each kind of task alone, where there are several."""
    parts = {kind: against(results.of_kind(kind), first, second) for kind in KINDS}
    return [f"On {kind} alone, {line}" for kind, line in parts.items() if line] if all(parts.values()) else []


def _worst_cells(results: Results) -> str | None:
    """In which cells ours loses most."""
    cells = results.shared(OURS, REFERENCE)
    if not cells:
        return None
    gains = {
        cell.name: float((results.found[REFERENCE, cell.name].logs - results.found[OURS, cell.name].logs).mean())
        for cell in cells
    }
    worst = sorted(gains, key=lambda name: gains[name])[:3]
    told = "; ".join(f"{name} ({100 * gains[name]:+.1f} %)" for name in worst)
    return f"Cells in which `{OURS}` is weakest against `{REFERENCE}`: {told}."


def limits(results: Results) -> list[Block]:
    """What these figures cannot tell."""
    seeds, tasks = len(results.study.suite.seeds), {cell.task.name for cell in results.cells}
    lines = [
        f"{plural(len(results.cells), 'cell')} of {plural(len(tasks), 'task')}, {seeds} seeds each: short runs of "
        "small models, since they run on CPUs. Differences that grow with the size of a model or the length of a run "
        "are not seen.",
        "Methods that do not fit a budget have no figures there, so rows of one table may stand on different cells; "
        "comparisons in sentences are on shared cells.",
        "All methods have their learning rate from the same grid, and `simple` and `tpe` more trainings for their "
        "plans; the column of tuning tells how much. A rate is chosen on one seed and held-out rows of its own, by "
        "factors of two. Where labels are learned in short runs, the loss of one seed is a lottery, and so is such a "
        "rate; that, and the luck of five seeds, is why labels are told apart.",
        "Rivals of one mean rank (`eva`, `gora-style`, AdaLoRA) leave part of the bytes unused; `ours` and `simple` "
        "choose rank and depth by the budget. The column of bytes tells how much each takes.",
        "Times are CPU times of one thread on a busy machine, as ratios of steps that took turns; losses are the same "
        "bit for bit when a run is repeated there.",
        "The shipped policy learned on small proxies that read bytes, some of them on film reviews of "
        "`rotten-tomatoes`, and was chosen on others that read newsgroup posts; of these models it has seen few runs, "
        "on other data (`bench plan-runs`). It was not tuned on these cells, but some of its versions were dropped "
        "after they had been looked at (docs/experiments.md).",
        "It decides once, before the first step. So `ours`, `ours-first-plan` and `ours-replay` differ by the luck of "
        "a probe and of fresh adapter rows alone, and what lies between them is as much as luck makes.",
    ]
    if results.missing:
        cells = "; ".join(
            dict.fromkeys(cell.name for cell in results.cells if cell.name in {c for _, c in results.missing})
        )
        lines.append(f"{len(results.missing)} pairs of method and cell have not been run yet, in: {cells}.")
    return [Heading("Limits"), Bullets(tuple(lines))]
