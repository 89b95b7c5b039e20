"""The report on a trained policy, docs/policy.md: what it had to show on the test split, and what came of it.

    python -m rankpilot.study.policy_report RUN EVALUATION --ablations EVALUATION --output docs/policy.md

RUN is the folder of `rankpilot train`, EVALUATION that of `rankpilot evaluate RUN constant:RUN RUN/warm_start heur3
fracrule fracrule-mlp uniform oracle --split test --seeds 2`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ..agents.comparison import ROWS
from ..agents.policy_file import read_card
from ..agents.results import Row, read_rows
from ..agents.statistics import Estimate, compare_pairs, estimate, interquartile_means
from ..agents.training import PROGRESS
from ..errors import RankPilotError, RunFolderError
from ..files import read_json_lines, write_text
from .figures import learning_curve, save_figure

TRAINED_BASES = ("llama-4x32", "llama-4x64", "bert-4x32", "bert-4x64")


@dataclass(frozen=True)
class Question:
    """One claim, and how it is judged.

    Attributes:
        title: which runs.
        keep: whether a row belongs to them.
        other: what the policy is compared with: a competitor, or "uniform" for the tuned uniform run of the same task.
        bar: what was asked for, in words.
        passes: whether it is reached, from nats gained over the other (mean) and the chance of being better.
    """

    title: str
    keep: Callable[[Row], bool]
    other: str
    bar: str
    passes: Callable[[Estimate, Estimate], bool]


def _better(gain: Estimate, chance: Estimate) -> bool:
    return chance.low > 0.5


def _not_worse(gain: Estimate, chance: Estimate) -> bool:
    return gain.low >= -0.005


def _plain_bytes(row: Row) -> bool:
    return row.price == "bytes"


BETTER, NOT_WORSE = "chance above 50 %", "no more than .005 nats worse"

QUESTIONS = (
    Question(
        "real shifts, equal parameters",
        lambda r: r.kind != "planted" and r.unit == "parameters",
        "uniform",
        BETTER,
        _better,
    ),
    Question(
        "real shifts, 30 to 100 % of the bytes",
        lambda r: r.kind != "planted" and _plain_bytes(r) and 0.3 <= r.budget <= 1,
        "fracrule",
        NOT_WORSE,
        _not_worse,
    ),
    Question("real shifts, bytes", lambda r: r.kind != "planted" and _plain_bytes(r), "uniform", BETTER, _better),
    Question(
        "planted in low layers, bytes", lambda r: r.place == "low" and r.unit == "bytes", "fracrule", BETTER, _better
    ),
    Question("checkpointed", lambda r: r.price == "checkpointed", "fracrule", BETTER, _better),
    Question("30 % of the bytes and less", lambda r: _plain_bytes(r) and r.budget <= 0.3, "fracrule", BETTER, _better),
    Question("all tasks", lambda r: True, "constant", BETTER, _better),
    Question("all tasks", lambda r: True, "warm_start", BETTER, _better),
    Question("all tasks", lambda r: True, "heur3", BETTER, _better),
    Question("all tasks", lambda r: True, "uniform", BETTER, _better),
    Question("bases that training knew", lambda r: r.base in TRAINED_BASES, "uniform", BETTER, _better),
    Question("twice as deep", lambda r: r.depth == 8, "uniform", BETTER, _better),
    Question("another family (GPT-2)", lambda r: r.family == "gpt2", "uniform", BETTER, _better),
)


@dataclass(frozen=True)
class PolicyReport:
    """Write the report on a trained policy.

    Attributes:
        run: folder of its training.
        evaluation: folder of its comparison on the test split.
        ablations: folder of a comparison with `rankpilot evaluate`, of the policy with things taken from it.
        output: where to write; pictures go beside it, into images/.
    """

    run: Annotated[Path, tyro.conf.Positional]
    evaluation: Annotated[Path, tyro.conf.Positional]
    ablations: Path | None = None
    output: Path = Path("docs/policy.md")


def _pairs(rows: Iterable[Row], policy: str, other: str) -> list[tuple[Row, float]]:
    """Rows of a policy, and the other's loss on the same run (infinite if it failed)."""
    rows = list(rows)
    mine = [row for row in rows if row.policy == policy]
    if other == "uniform":
        return [(row, row.uniform_loss) for row in mine]
    theirs = {row.key[1:]: math.inf if row.loss is None else row.loss for row in rows if row.policy == other}
    return [(row, theirs[row.key[1:]]) for row in mine if row.key[1:] in theirs]


def _loss(row: Row) -> float:
    return math.inf if row.loss is None else row.loss


def _reached(row: Row) -> float:
    """The held-out loss; a run that failed has gained nothing."""
    return row.initial_loss if row.loss is None else row.loss


def _number(found: Estimate, sign: str = "+") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _chance(found: Estimate) -> str:
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def _answer(question: Question, rows: Sequence[Row], policy: str, names: dict[str, str]) -> str | None:
    """A line of the table; None if nothing was measured."""
    pairs = _pairs([row for row in rows if question.keep(row)], policy, names.get(question.other, question.other))
    if len({row.task for row, _ in pairs}) < 2:
        return None
    tasks = [row.task for row, _ in pairs]
    gains = [other - _loss(row) for row, other in pairs]
    finite = [gain if math.isfinite(gain) else math.copysign(1.0, gain) for gain in gains]
    gain, middle = estimate(finite, tasks), estimate(finite, tasks, interquartile_means)
    found = compare_pairs([-_loss(row) for row, _ in pairs], [-other for _, other in pairs], tasks)
    verdict = "yes" if question.passes(gain, found.better) else "**no**"
    counts = f"{found.wins} / {found.ties} / {found.losses}"
    cells = (question.title, question.other, f"{len(set(tasks))} x {len(tasks) // len(set(tasks))}", _number(gain))
    return "| " + " | ".join((*cells, _number(middle), _chance(found.better), counts, question.bar, verdict)) + " |"


def oracle_share(rows: Sequence[Row], policy: str) -> Estimate | None:
    """Share of what the oracle gains over uniform that a policy gains, in log divergence, at mean rank 1 to 2.

    Args:
        rows: of the policy and of "oracle".
        policy: its name.

    Returns:
        A ratio of means; its interval is a bootstrap over tasks. None where nothing was measured.
    """
    some = [row for row in rows if row.kind == "planted" and row.unit == "parameters"]
    oracle = {row.key[1:]: row for row in some if row.policy == "oracle"}
    mine = [row for row in some if row.policy == policy and row.key[1:] in oracle]
    if not mine:
        return None
    gained = np.array([math.log(row.uniform_loss / _reached(row)) for row in mine])
    possible = np.array([math.log(row.uniform_loss / _reached(oracle[row.key[1:]])) for row in mine])

    def ratio(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.asarray((counts @ values) / (counts @ possible))

    return estimate(gained, [row.task for row in mine], ratio)


def _best_tables(rows: Sequence[Row], names: dict[str, str]) -> list[str]:
    """Mean gain over uniform, in shares of the headroom, by competitor and kind of task."""
    places = sorted({("planted" if row.kind == "planted" else "shift", row.price) for row in rows})
    shown = {value: key for key, value in names.items()}
    lines = ["| | " + " | ".join(f"{kind}, {price}" for kind, price in places) + " |", "|---" * (len(places) + 1) + "|"]
    for policy in dict.fromkeys(row.policy for row in rows):
        cells = [shown.get(policy, policy)]
        for kind, price in places:
            own = [
                r
                for r in rows
                if r.policy == policy and (r.kind == "planted") == (kind == "planted") and r.price == price
            ]
            found = estimate([r.improvement for r in own], [r.task for r in own]) if own else None
            cells.append(f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(options: PolicyReport) -> str:
    """The report's text; its picture is written.

    Raises:
        RunFolderError: a folder holds no results.
        PolicyFileError: the run holds no policy.
    """
    card, rows = read_card(options.run), read_rows(options.evaluation / ROWS)
    if not rows:
        raise RunFolderError(f"{options.evaluation} holds no results. Pass the --output of `rankpilot evaluate`.")
    policy = str(card["name"])
    names = {"constant": f"constant:{policy}"}
    progress = read_json_lines(options.run / PROGRESS)
    picture = options.output.parent / "images" / "learning_curve.png"
    save_figure(learning_curve(progress), picture)
    answers = [_answer(question, rows, policy, names) for question in QUESTIONS]
    shares = {name: oracle_share(rows, name) for name in dict.fromkeys(row.policy for row in rows)}
    columns = ("runs", "against", "tasks x seeds", "nats gained, mean", "interquartile mean", "chance of being better")
    header = "| " + " | ".join((*columns, "wins / ties / losses", "asked for", "reached")) + " |"
    lines = [
        "# The shipped policy, measured",
        "",
        "Generated by `python -m rankpilot.study.policy_report`; see docs/experiments.md for what else was tried.",
        f"The test split was touched once, by weights {card['sha256'][:12]}. All runs are paired:",
        "same task, seed, batches and budget. Intervals are 95 %, by a bootstrap over tasks. Uniform runs at the",
        "learning rate that is best for it.",
        "",
        "## What it had to show",
        "",
        header,
        "|---" * 9 + "|",
        *[answer for answer in answers if answer],
        "",
        "## Share of the oracle's headroom, planted changes at mean rank 1 and 2",
        "",
        "Log divergence gained over uniform, as a share of what the oracle gains; at least 50 % was asked for.",
        "",
        "| | share |",
        "|---|---|",
        *[f"| {name} | {_chance(found)} |" for name, found in shares.items() if found],
        "",
        "## Gain over uniform by kind of task",
        "",
        "Mean improvement over uniform in shares of the task's headroom (-3 to 3).",
        "",
        *_best_tables(rows, names),
    ]
    if options.ablations:
        lines += [
            "",
            "## Ablations",
            "",
            "The same policy with something taken from it, on the validation split.",
            "",
            *_best_tables(read_rows(options.ablations / ROWS), {}),
        ]
    lines += [
        "",
        "## Training",
        "",
        f"{card['episodes']} episodes in {len(progress) - 1} rounds, from seed {card['training']['seed']}.",
        "",
        "![Learning curve](images/learning_curve.png)",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = tyro.cli(PolicyReport, args=arguments, prog="python -m rankpilot.study.policy_report")
    try:
        write_text(options.output, report(options))
    except RankPilotError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
