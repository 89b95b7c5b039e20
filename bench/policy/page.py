"""The page on the shipped policy (docs/policy.md), from stored rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...agents.evaluation.results import Row
from ...allocation.features import RUN_FEATURES, run_feature_number
from ...common.statistics import Estimate, compare_pairs, estimate, ratio_estimate
from ..harness import Figures
from .rows import PolicyRows

UNIFORM = "uniform"
"""The rival whose losses stand in each row."""

WORSE = 0.01
"""A run whose log loss is higher by more is told."""

_AGAINST = "the policy against"

FEW_RANKS = 0.25
"""Budgets of parameters up to this share of rank 8 are mean ranks of 1 and 2, where a choice matters most."""

_LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class Against:
    """The policy beside another one on the same runs.

    Attributes:
        runs: how many.
        gain: by how much the log loss is lower, on the mean.
        better: chance of being better, a tie counting half.
        wins: runs on which it is better.
        ties: runs on which both are equal.
        losses: runs on which it is worse.
        worse: runs on which its log loss is higher by more than `WORSE`.
    """

    runs: int
    gain: Estimate
    better: Estimate
    wins: int
    ties: int
    losses: int
    worse: int


def log_loss(row: Row) -> float:
    """The log of a run's loss; a run that failed has the one before training."""
    return math.log(max(row.initial_loss if row.loss is None else row.loss, _LEAST_LOSS))


def against(rows: Sequence[Row], policy: str, rival: str) -> Against | None:
    """The policy beside a rival, run by run; None if they have fewer than two tasks in common.

    Args:
        rows: of all competitors.
        policy: its name in the rows.
        rival: a name in the rows, or `UNIFORM`.
    """
    mine = [row for row in rows if row.policy == policy]
    if rival == UNIFORM:
        others = {row.key[1:]: math.log(max(row.uniform_loss, _LEAST_LOSS)) for row in mine}
    else:
        others = {row.key[1:]: log_loss(row) for row in rows if row.policy == rival}
    pairs = [(log_loss(row), others[row.key[1:]], row.task) for row in mine if row.key[1:] in others]
    if len({task for *_, task in pairs}) < 2:
        return None
    own, other = (np.array(values) for values in list(zip(*pairs, strict=True))[:2])
    tasks = [task for *_, task in pairs]
    found = compare_pairs(-own, -other, tasks)
    return Against(
        runs=len(pairs),
        gain=estimate(other - own, tasks),
        better=found.better,
        wins=found.wins,
        ties=found.ties,
        losses=found.losses,
        worse=int((own > other + WORSE).sum()),
    )


def oracle_share(rows: Sequence[Row], policy: str) -> Estimate | None:
    """The share of what the oracle gains over uniform rank, on planted changes at a mean rank of 1 and 2.

    Args:
        rows: of all competitors.
        policy: its name in the rows.
    """
    found = _beside_oracle(rows, policy)
    if len({task for *_, task in found}) < 2:
        return None
    own, best = (np.array(values) for values in list(zip(*found, strict=True))[:2])
    return ratio_estimate(own, np.maximum(best, 0), [task for *_, task in found]) if (best > 0).any() else None


def _oracle_median(rows: Sequence[Row], policy: str) -> float:
    """The same share in the median run, of those in which the oracle gains something."""
    return float(np.median([own / best for own, best, _ in _beside_oracle(rows, policy) if best > 0]))


def _beside_oracle(rows: Sequence[Row], policy: str) -> list[tuple[float, float, str]]:
    """What a policy and the oracle gain over uniform rank in log loss, and the task of each run."""
    oracle = {row.key[1:]: log_loss(row) for row in rows if row.policy == "oracle"}
    return [
        (math.log(row.uniform_loss) - log_loss(row), math.log(row.uniform_loss) - oracle[row.key[1:]], row.task)
        for row in rows
        if row.policy == policy and _few_ranks(row) and row.key[1:] in oracle
    ]


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the question that they answer."""
    kinds = sorted({(row.kind, row.cost_kind) for row in rows})
    found = {
        f"{kind}, {cost}": [row for row in rows if (row.kind, row.cost_kind) == (kind, cost)] for kind, cost in kinds
    }
    others: dict[str, Callable[[Row], bool]] = {
        "planted, mean rank 1 and 2": _few_ranks,
        "8 layers, of which it knows real fine-tunes alone": lambda row: row.depth > 4,
        "GPT-2, of which it knows real fine-tunes alone": lambda row: row.family == "gpt2",
    }
    return found | {name: [row for row in rows if belongs(row)] for name, belongs in others.items()}


def _few_ranks(row: Row) -> bool:
    return row.kind == "planted" and row.cost_kind == "parameters" and row.budget <= FEW_RANKS


def page(measured: PolicyRows) -> str:
    """The page as Markdown."""
    rows, name = measured.rows["test"], str(measured.card["name"])
    share = oracle_share(rows, name)
    parts = [
        _HEAD.format(sha=measured.card["sha256"][:12], runs=len(rows), tasks=len({row.task for row in rows})),
        "## Beside other ways to decide\n\nAll tasks of the test split.",
        _table(_AGAINST, {rival: against(rows, name, rival) for rival in _others(rows, name)}),
        "## Beside uniform rank, by kind of task",
        _table("tasks", {group: against(part, name, UNIFORM) for group, part in groups(rows).items()}),
    ]
    shifts = [row for row in rows if row.kind == "shift"]
    beside = {rival: found for rival in _others(shifts, name) if (found := against(shifts, name, rival))}
    if beside:
        parts += [
            "## On shifts of text\n\nThe kind of proxy task that is most like a fine-tune.",
            _table(_AGAINST, beside),
        ]
    if share:
        parts.append(
            "## Beside the oracle\n\nWhere something was planted and the mean rank is 1 or 2, the oracle knows where "
            f"it is. Of what the oracle gains over uniform rank in log loss, the policy gains {share:.0%}; in the "
            f"median run {_oracle_median(rows, name):.0%}."
        )
    if hidden := measured.rows.get("validation"):
        without = dict.fromkeys(row.policy for row in hidden if " without " in row.policy)
        parts += [
            "## What it needs to see\n\nThe policy beside itself, when it does not see a group of features "
            "(validation split).",
            _table("against the policy", {rival.partition(" ")[2]: against(hidden, name, rival) for rival in without}),
        ]
    return "\n\n".join([*parts, _limits(measured), _training(measured)]) + "\n"


def _table(first: str, compared: Mapping[str, Against | None]) -> str:
    lines = [
        f"| {first} | runs | log loss gained, mean | chance of being better | better / equal / worse | 1 % worse |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in compared.items():
        if found:
            counts = f"{found.wins} / {found.ties} / {found.losses}"
            lines.append(
                f"| {name} | {found.runs} | {found.gain:+.3f} | {found.better:.0%} | {counts} | {found.worse} |"
            )
    return "\n".join(lines)


def _limits(measured: PolicyRows) -> str:
    seen = measured.card["plan_value"]
    bounds = zip(RUN_FEATURES, seen["lowest"], seen["highest"], strict=True)
    known = {name: " to ".join(run_feature_number(name, value) for value in both) for name, *both in bounds}
    return _LIMITS.format(**known)


def _training(measured: PolicyRows) -> str:
    card = measured.card
    settings, runs = card["training"], card.get("plan_runs", {})
    units = {"doubt": " votes", "doubt on labels": " votes"}
    known = [f"{name} {value:.3g}{units.get(name, '')}" for name, value in runs.items() if name != "runs"]
    return (
        f"## Training\n\n{card.get('episodes', 0):,} episodes of PPO in {settings['iterations']} rounds, then "
        f"{runs.get('runs', 0):,} plan runs, from seed {settings['seed']}"
        + (f" (value networks: {', '.join(known)})" if known else "")
        + ".\n\n![Learning curve](images/learning_curve.png)"
    )


def figures_of(measured: PolicyRows) -> Figures:
    """The main figures by flat name."""
    rows, name = measured.rows["test"], str(measured.card["name"])
    found: Figures = {"sha256": str(measured.card["sha256"]), "runs": len(rows)}
    for rival in _others(rows, name):
        compared = against(rows, name, rival)
        if compared:
            key = rival.replace(" ", "_")
            for part, value in (("gain", compared.gain), ("better", compared.better)):
                found |= {
                    f"{key}.{part}": value.value,
                    f"{key}.{part}_low": value.low,
                    f"{key}.{part}_high": value.high,
                }
            found[f"{key}.worse"] = compared.worse
    share = oracle_share(rows, name)
    return found | ({"oracle_share": share.value} if share else {})


def _others(rows: Iterable[Row], policy: str) -> list[str]:
    """Whom the policy is compared with: uniform rank and all other competitors but the oracle."""
    return [UNIFORM, *dict.fromkeys(row.policy for row in rows if row.policy not in (policy, "oracle"))]


_HEAD = """# The shipped policy, measured

`rankpilot bench policy` made this page: {runs:,} runs of {tasks} tasks of the test split, which was not used to choose
anything, for the policy with weights {sha}. All runs are paired: same task, seed, batches, budget and learning rate,
which is the one that is best for uniform rank. Intervals are 95 %, by a bootstrap over tasks; one that holds 0 (or
50 %) decides nothing. On real fine-tunes, with every method at a rate of its own: [results](results.md). What else was
tried: [experiments](experiments.md)."""

_LIMITS = """## What it cannot do

* It has learned from models of a few layers, 32 and 64 wide, that read bytes, and from few real ones. It sees shares
  and ratios alone, so it decides for larger models, but nobody has trained it on one.
* It has learned from runs of {horizon} steps with {rows} rows each, on {modules} modules. Where a run lies outside, it
  says so before the first step, and decides all the same: which plan is best may be another one there.
* Where its networks do not agree, it takes uniform rank, or plain LoRA, if that fits, under a goal of time or bytes.
  Then it gains nothing. On a family of models that none of them has learned from they may agree and be wrong together,
  as on GPT-NeoX ([what can be saved](saving.md)); no measure was found that tells such a family beforehand."""
