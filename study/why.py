"""Why a decision was taken: which candidate won, by how much, and what its plan became."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..agents.learned.networks import DIRECTIONS
from ..agents.learned.policy import BASIS, FIXED_NAMES, KEEP, LearnedPolicy
from ..agents.learned.policy_file import DEFAULT, load_policy
from ..agents.log import DecisionLog, DecisionRecord
from ..agents.observation import MODULE_FEATURES
from ..agents.policy import DRAWN, Deliberation, Policy, unlike
from ..common.arrays import BoolArray, FloatArray
from ..common.text import cost_text, plural, short_names
from ..cost.cost import unit_cost
from ..errors import PolicyFileError
from ..plan.goal import improvement_of
from ..plan.plan import base_depth_bias, base_rank_floor
from .replay import PROBE_NOISE, DecidedAgain, Stability, WhatIf, redecide, stability, usual_questions, what_if
from .shapley import GROUPS, Attribution, attribute

UNITS_OF_VOTES = {
    "spread": "standard deviations of the log loss between plans",
    "log loss": "votes: asinh of the difference of log losses in per cent",
}
"""What votes are in, by `Deliberation.unit`."""

SHOWN = 3
"""Modules and groups that a sentence names at most."""

_WORDS = {"signal_mean": "the mean signal", "rank_cost": "the cost of a rank", "relative_depth": "the relative depth"}
_WORDS |= {"actor": "the actor's scores"}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a decision of a log was taken.

    Attributes:
        logged: the decision.
        attribution: which features speak for the plan; None if unknown.
        what_ifs: what would have changed the decision.
        stability: what noise leaves of it; None if unknown.
        notes: sentences on what is not known, and why.
    """

    logged: DecisionRecord
    attribution: Attribution | None = None
    what_ifs: tuple[WhatIf, ...] = ()
    stability: Stability | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """The decision in one sentence."""
        found, logged = self.logged.deliberation, self.logged
        where = f"At step {logged.step}"
        if logged.correction:
            return f"{where} the guard or a person changed the ranks; no policy decided."
        if found is None:
            return f"{where} {logged.policy} decided; the log holds no candidates and no votes."
        reference = _reference(logged)
        if found.goal.saves and found.costs is not None:
            return f"{where} {_saving(logged, found)}"
        how = f"drawn, with a probability of {found.probabilities[found.plan]:.1%}" if found.temperature else "taken"
        if found.plan == found.reference:
            why = "" if found.temperature else ": no other plan is surely better"
            return f"{where} {reference} {'was' if logged.problem.max_step is None else 'were'} {how}{why}."
        votes = found.votes[:, found.plan]
        return (
            f"{where} the plan of candidate {found.candidates[found.taken]!r} was {how}: {int((votes > 0).sum())} of "
            f"{len(votes)} networks expect it to be better than {reference}, by {found.mean[found.plan]:.3f} on the "
            "mean."
        )

    def sentences(self) -> list[str]:
        """The explanation in plain English, the most important first; the verdict is not repeated."""
        found = self.logged.deliberation
        parts = [] if found is None else _of_deliberation(self.logged, found)
        parts += _of_budget(self.logged)
        if self.attribution:
            parts.append(_of_attribution(self.attribution, self.logged))
        parts += [answer.text for answer in self.what_ifs]
        if self.stability:
            parts.append(self.stability.sentence())
        return [*parts, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, for pages."""
        found, logged = self.logged.deliberation, self.logged
        return {
            "decision": logged.number,
            "step": logged.step,
            "first": logged.problem.max_step is None,
            "policy": logged.policy,
            "verdict": self.verdict,
            "sentences": self.sentences(),
            **({} if found is None else _deliberation_json(logged, found)),
            "shapley": self.attribution and self.attribution.to_json(),
            "what_ifs": [{"text": answer.text, "side_effects": answer.side_effects} for answer in self.what_ifs],
            "stability": self.stability and self.stability.to_json(),
        }


def explanations(
    log: DecisionLog,
    policy: Policy | None = None,
    what_ifs: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any] | None]:
    """Explain every decision of a log.

    Args:
        log: of a run.
        policy: that decided; without it the policy that ships with the package is tried.
        what_ifs: also take decisions again with something changed, for what-ifs and stability: some seconds each.
        on_progress: called with (decisions done, decisions in all).

    Returns:
        By decision, what `Explanation.to_json` gives; less where less is known, with a sentence why. None for a number
        of which the log holds no decision.

    Raises:
        RunFolderError: there is no log, or it cannot be read.
    """
    records = log.read()
    found: list[dict[str, Any] | None] = [None] * (records[-1].number + 1)
    for done, logged in enumerate(records, 1):
        found[logged.number] = explain(logged, policy, what_ifs).to_json()
        if on_progress:
            on_progress(done, len(records))
    return found


def explain(logged: DecisionRecord, policy: Policy | None = None, what_ifs: bool = True) -> Explanation:
    """Explain one decision.

    Args:
        logged: the decision, as `DecisionLog.logged` gives it.
        policy: who decided; by default the policy that ships with rankpilot, if its weights are those of the log.
        what_ifs: also look for what would have changed the decision, and for how sure it is: some seconds.
    """
    found = Explanation(logged)
    obstacle = _without_votes(logged)
    if obstacle:
        return replace(found, notes=(obstacle,))
    given, obstacle = _policy_of(logged, policy)
    if given is None:
        return replace(found, notes=(obstacle,))
    differences = redecide(logged, given).differences
    if set(differences) - {"rank_after"}:
        note = (
            f"Taken again on this machine, the decision differs in {', '.join(differences)}; so there are no Shapley "
            "values and no what-ifs."
        )
        return replace(found, notes=(note,))
    notes = _about_the_plan(logged, "rank_after" in differences)
    found = replace(found, attribution=attribute(logged, given), notes=notes)
    if not what_ifs:
        return found
    case = DecidedAgain(logged, given)
    answers = [answer for question in usual_questions(case) if (answer := what_if(case, question))]
    return replace(found, what_ifs=tuple(answers), stability=stability(logged, given, PROBE_NOISE))


def _about_the_plan(logged: DecisionRecord, changed: bool) -> tuple[str, ...]:
    """Where what is explained is not the plan that the run got."""
    drawn = logged.deliberation is not None and logged.deliberation.temperature > 0
    notes = {
        "The plan was drawn; what-ifs and the effect of noise are those of the plan that the policy prefers.": drawn,
        "A limit of time, or somebody by hand, changed the plan; what is explained is the policy's own.": changed,
    }
    return tuple(note for note, applies in notes.items() if applies)


def _without_votes(logged: DecisionRecord) -> str:
    """Why a decision has no votes to explain; empty if it has."""
    if logged.correction:
        return "The log does not tell how the guard, or a person, chose these ranks."
    if logged.deliberation is not None:
        return ""
    return f"{logged.policy} is a rule, or a policy without a value ensemble: it weighs no plans."


def _policy_of(logged: DecisionRecord, policy: Policy | None) -> tuple[LearnedPolicy | None, str]:
    """The policy that decided, or why it is not at hand."""
    lacking = "so there are no Shapley values and no what-ifs."
    try:
        given = load_policy(DEFAULT) if policy is None else policy
    except PolicyFileError as error:
        return None, f"The policy cannot be read ({error}), {lacking}"
    wanted, name = logged.policy_sha256, logged.policy
    if not isinstance(given, LearnedPolicy) or given.sha256 != wanted:
        which = (
            "no policy was given, and the one that ships is another" if policy is None else "the one given is another"
        )
        return None, f"The policy {name} is not at hand ({which}: its weights have another sha256), {lacking}"
    return given, ""


def same_in_tie(deliberation: Deliberation) -> BoolArray:
    """The modules whose rank is the same in all plans that are tied, bool (modules,)."""
    plans = deliberation.plans[deliberation.tied]
    return np.asarray((plans == plans[0]).all(axis=0))


def actor_terms(logged: DecisionRecord, deliberation: Deliberation) -> FloatArray:
    """What each direction adds to the actor's scores, before they are clipped, (directions, modules)."""
    columns = [
        deliberation.actor_estimate
        if name == "estimate"
        else logged.observation.modules[:, MODULE_FEATURES.index(name)]
        for name in DIRECTIONS
    ]
    values = np.stack(columns).astype(np.float64)
    return np.asarray(deliberation.actor_gains[:, None] * (values - values.mean(axis=1, keepdims=True)))


# Words ----------------------------------------------------------------------------------------------------------------


def _reference(logged: DecisionRecord) -> str:
    found = logged.deliberation
    if logged.problem.max_step is not None:
        return "the ranks in place"
    return "rank 8 on all modules" if found and found.goal.saves else "uniform rank"


def _saving(logged: DecisionRecord, found: Deliberation) -> str:
    """The verdict under a goal of cost, without the step."""
    tolerated = f"whose loss is surely within {found.goal.tolerance:.2%} of rank 8 on all modules"
    if found.misses_goal:
        return f"uniform rank was taken: there is no plan {tolerated}, and that one does not fit the budget."
    most = "takes the least time a step" if found.goal.kind == "time" else "takes the fewest bytes"
    costs = [_cost_text(logged, found, plan) for plan in (found.plan, found.reference)]
    broad = "broad " if found.narrow.any() else ""
    return (
        f"the plan of candidate {found.candidates[found.taken]!r} was taken: of the "
        f"{int(found.within_tolerance.sum())} {broad}plans {tolerated} it {most}: {costs[0]}, against {costs[1]}."
    )


def _cost_text(logged: DecisionRecord, found: Deliberation, plan: int) -> str:
    assert found.costs is not None
    if found.goal.kind == "time" and found.seconds is not None:
        return f"{1e3 * float(found.seconds[plan]):.4g} ms"
    return cost_text(float(found.costs[plan]), logged.problem.cost.unit)


def _of_deliberation(logged: DecisionRecord, found: Deliberation) -> list[str]:
    sentences = [_recipe(logged, found), _votes(logged, found)]
    sentences += [_aim(found)] if found.goal.saves else [_margin(found)]
    if difference := unlike(found):
        sentences.append(f"The networks have learned from no run like this one: {difference}.")
    if int(found.tied.sum()) > 1:
        sentences.append(_tie(logged, found))
    return [*sentences, _actor(logged, found)]


def _recipe(logged: DecisionRecord, found: Deliberation) -> str:
    alike = int((found.plan_of == found.plan).sum()) - 1
    others = f" {plural(alike, 'other candidate')} lead{'s' * (alike == 1)} to the same plan." if alike else ""
    name = found.candidates[found.taken]
    if name == KEEP:
        return f"The candidate {name!r} leaves the ranks as they are.{others}"
    if not _follows_from_scores(name):
        return f"The candidate {name!r} is a plan that follows from no scores under this budget.{others}"
    weights = zip(BASIS, found.weights[found.taken].tolist(), strict=True)
    parts = [f"{weight:+.3g} x {_WORDS.get(part, part)}" for part, weight in weights if weight]
    scores = f"scores are {' '.join(parts)}" if parts else "all scores are equal"
    return (
        f"The recipe of {name!r}: {scores}; every adapted module should be able to have rank "
        f"{logged.decision.rank_floor:.3g} (rank floor), and each layer further down counts "
        f"{logged.decision.depth_bias:.3g} less (depth bias).{others}"
    )


def _votes(logged: DecisionRecord, found: Deliberation) -> str:
    plan, reference = found.plan, _reference(logged)
    if plan == found.reference:
        others = found.bound[found.may_take & (np.arange(len(found.plans)) != plan)]
        best = f"the highest lower bound of another plan is {others.max():.3f}" if len(others) else "no other plan"
        return f"Everything is compared with {reference}; {best}."
    if found.goal.saves:
        return _votes_on_loss(found, reference)
    votes = ", ".join(f"{vote:.3f}" for vote in found.votes[:, plan].tolist())
    taken_off = found.lcb_coefficient * found.std[plan]
    return (
        f"The networks expect {votes} {UNITS_OF_VOTES[found.unit]} over {reference}: {found.mean[plan]:.3f} on the "
        f"mean, with a spread of {found.std[plan]:.3f}. Caution takes off {found.lcb_coefficient:g} times the spread, "
        f"{taken_off:.3f}, which leaves a lower bound of {found.bound[plan]:.3f}."
    )


def _votes_on_loss(found: Deliberation, reference: str) -> str:
    """The votes on the plan taken, as changes of the loss."""
    votes, plan = ", ".join(_loss_text(vote) for vote in found.votes[:, found.plan].tolist()), found.plan
    mean = _loss_text(float(found.mean[plan]))
    reach = float(found.reach[plan])
    low, high = (_loss_text(float(found.mean[plan]) + side) for side in (reach, -reach))
    return (
        f"The networks expect a loss of {votes} against {reference}: {mean} on the mean. With "
        f"{found.lcb_coefficient:g} times their spread, and a doubt of {found.doubt:.3g} votes, to either side, that "
        f"is from {low} to {high}."
    )


def _loss_text(vote: float) -> str:
    """A vote as a change of the loss, in per cent."""
    return f"{math.expm1(-improvement_of(vote)):+.2%}"


def _follows_from_scores(name: str) -> bool:
    return name in FIXED_NAMES or name.startswith(DRAWN)


def _aim(found: Deliberation) -> str:
    """The goal in words."""
    return f"The goal is {found.goal}."


def _margin(found: Deliberation) -> str:
    if len(found.plans) == 1:
        return "All candidates lead to this one plan."
    size, unfit = abs(found.margin), int((~found.may_take).sum())
    others = f"the other {len(found.plans) - 1 - unfit} plans" + (" that fit" if unfit else "")
    if found.margin >= 0:
        return f"That is {size:.3f} above the best of {others}."
    nearest = " It was taken because it is nearest to the reference of the plans that are tied."
    return f"The best of {others} is {size:.3f} higher.{'' if found.temperature else nearest}"


def _tie(logged: DecisionRecord, found: Deliberation) -> str:
    same, names = same_in_tie(found), short_names(logged.observation.names)
    plans = found.plans[found.tied]
    spread = np.log2(1 + plans.max(axis=0)) - np.log2(1 + plans.min(axis=0))
    by = f"lower bounds differ by less than {found.tie:g}" if not found.goal.saves else "costs differ by less than 1 %"
    farthest = [index for index in np.argsort(-spread, kind="stable")[:SHOWN].tolist() if not same[index]]
    examples = ", ".join(f"{names[index]} ({plans[:, index].min()} to {plans[:, index].max()})" for index in farthest)
    differ = f" They differ the most on {examples}." if examples else ""
    return (
        f"{len(plans)} of {len(found.plans)} plans are tied: their {by}. "
        f"They give {int(same.sum())} of {len(same)} modules the same rank.{differ}"
    )


def _actor(logged: DecisionRecord, found: Deliberation) -> str:
    names, terms = short_names(logged.observation.names), actor_terms(logged, found)
    gains = sorted(zip(DIRECTIONS, found.actor_gains.tolist(), strict=True), key=lambda pair: -abs(pair[1]))
    rows = []
    for module in np.argsort(-found.actor_scores, kind="stable")[:SHOWN].tolist():
        most = int(np.argmax(np.abs(terms[:, module])))
        share = f"{DIRECTIONS[most]} {terms[most, module]:+.2f}"
        rows.append(f"{names[module]} ({found.actor_scores[module]:+.2f}, of it {share})")
    weights = ", ".join(f"{name} {gain:+.2f}" for name, gain in gains[:SHOWN])
    return f"The actor weighs {weights} the most; its highest scores are those of {', '.join(rows)}."


def _of_budget(logged: DecisionRecord) -> list[str]:
    """What became of the ranks that the policy asked for: clipped to the ladder and the bounds, then to the budget."""
    asked, clipped, got = logged.rank_wanted, logged.rank_clipped, logged.rank_after
    if np.array_equal(asked, got):
        return ["Every module got the rank that the policy asked for."]
    problem = logged.problem
    ladder, (lower, upper) = problem.ladder, problem.bounds()
    rungs = ladder.rung(asked)
    allowed = ladder.array[np.clip(rungs, lower, upper)]
    reasons = np.full(len(asked), "", dtype=object)
    reach = "no module may move further at one decision"
    reasons[rungs > upper] = np.where(upper < problem.tops, reach, "their upper bound is lower")[rungs > upper]
    reasons[rungs < lower] = np.where(lower > problem.bottoms, reach, "their lower bound is higher")[rungs < lower]
    reasons[problem.is_pinned & (allowed != asked)] = "they are pinned"
    off_ladder = (allowed == clipped) & (ladder.array[rungs] == clipped) & (asked != clipped)
    reasons[off_ladder] = "the ladder has no such rank, and the next one below counts"
    reasons[clipped != allowed] = "it was given by hand, or changed by a limit of time"
    counts = Counter(filter(None, reasons.tolist()))
    found = [f"{plural(count, 'module')} did not get the rank asked for: {why}." for why, count in counts.items()]
    lowered, raised = int((got < clipped).sum()), int((got > clipped).sum())
    if lowered:
        found.append(f"{plural(lowered, 'module')} had to give way, since the ranks asked for exceed the budget.")
    if raised:
        found.append(f"What was left of the budget raised {plural(raised, 'module')}.")
    return found


def _of_attribution(found: Attribution, logged: DecisionRecord) -> str:
    parts = sorted(zip(GROUPS, found.bound.tolist(), strict=True), key=lambda pair: -abs(pair[1]))
    words = ", ".join(f"{name} {value:+.3f}" for name, value in parts[:SHOWN])
    plan = "the best other plan" if found.plan == found.reference else "this plan"
    return (
        f"Of the lower bound of {found.bound_total:.3f} over {_reference(logged)}, the shape of {plan} alone gives "
        f"{found.bound_alone:+.3f}; what the networks see of this run adds the rest: {words} and smaller parts."
    )


# JSON -----------------------------------------------------------------------------------------------------------------


def _deliberation_json(logged: DecisionRecord, found: Deliberation) -> dict[str, Any]:
    problem, drawn = logged.problem, bool(found.temperature)
    candidates = [
        {
            "name": None if name.startswith(DRAWN) else name,
            "gains": dict(zip(BASIS, weights, strict=True)),
            "rank_floor": base_rank_floor(problem) * 2.0**floor if _follows_from_scores(name) else None,
            "depth_bias": base_depth_bias(problem) + bias if _follows_from_scores(name) else None,
            "plan": plan,
        }
        for name, weights, (floor, bias), plan in zip(
            found.candidates, found.weights.tolist(), found.placements.tolist(), found.plan_of.tolist(), strict=True
        )
    ]
    plans = [
        {
            "ranks": found.plans[plan].tolist(),
            "votes": found.votes[:, plan].tolist(),
            "mean": float(found.mean[plan]),
            "sd": float(found.std[plan]),
            "bound": float(found.bound[plan]),
            "probability": float(found.probabilities[plan]) if drawn else None,
            "tied": bool(found.tied[plan]),
            "fits": bool(found.may_take[plan]),
            "cost": unit_cost(problem.cost, found.plans[plan]),
        }
        for plan in range(len(found.plans))
    ]
    return {
        "candidates": candidates,
        "plans": plans,
        "taken": found.plan,
        "reference": found.reference,
        "caution": found.lcb_coefficient,
        "margin": found.margin,
        "unit_of_votes": UNITS_OF_VOTES[found.unit],
        "goal": str(found.goal),
        "actor": {"directions": list(DIRECTIONS), "gains": found.actor_gains.tolist()},
    }
