"""Explanations of all decisions of a log, as JSON values for pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...agents.learned.policy import LearnedPolicy
from ...agents.learned.policy_file import DEFAULT, load_policy
from ...allocation.decision_log import DecisionLog, LoggedDecision
from ...allocation.policy import Policy
from ...errors import PolicyFileError, RunFolderError
from .case import Case
from .redecide import redecide
from .shapley import attribute
from .stability import PROBE_NOISE, stability
from .what_if import usual_questions, what_if
from .why import Explanation, explain_votes


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
        By decision, what `Explanation.to_json` gives; less where less is known, with a sentence why. None for a
        decision of which nothing can be read.

    Raises:
        RunFolderError: there is no log, or none of it can be read.
    """
    table = log.read(lambda error: None)
    decisions = {}
    numbers = sorted(set(table["decision"].to_pylist()))
    for done, number in enumerate(numbers, 1):
        try:
            logged = log.logged(number)
        except RunFolderError as error:
            decisions[number] = _known(table.filter(pc.equal(table["decision"], number)), str(error))
        else:
            decisions[number] = explain(logged, policy, what_ifs).to_json()
        if on_progress:
            on_progress(done, len(numbers))
    return [decisions.get(number) for number in range(max(len(log), *(number + 1 for number in decisions)))]


def explain(logged: LoggedDecision, policy: Policy | None = None, what_ifs: bool = True) -> Explanation:
    """Explain one decision.

    Args:
        logged: the decision, as `DecisionLog.logged` gives it.
        policy: who decided; by default the policy that ships with rankpilot, if its weights are those of the log.
        what_ifs: also look for what would have changed the decision, and for how sure it is: some seconds.
    """
    found = explain_votes(logged)
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
    case = Case(logged, given)
    answers = [answer for question in usual_questions(case) if (answer := what_if(case, question))]
    return replace(found, what_ifs=tuple(answers), stability=stability(logged, given, PROBE_NOISE))


def _about_the_plan(logged: LoggedDecision, changed: bool) -> tuple[str, ...]:
    """Where what is explained is not the plan that the run got."""
    drawn = logged.deliberation is not None and logged.deliberation.temperature > 0
    notes = {
        "The plan was drawn; what-ifs and the effect of noise are those of the plan that the policy prefers.": drawn,
        "A limit of time, or somebody by hand, changed the plan; what is explained is the policy's own.": changed,
    }
    return tuple(note for note, applies in notes.items() if applies)


def _without_votes(logged: LoggedDecision) -> str:
    """Why a decision has no votes to explain; empty if it has."""
    if logged.value("correction"):
        return "The log does not tell how the guard, or a person, chose these ranks."
    if logged.deliberation is not None:
        return ""
    if logged.state is None:
        return "The log is of schema 3, which does not hold the candidates and votes. Later runs log them."
    return f"{logged.value('policy')} is a rule, or a policy without a value ensemble: it weighs no plans."


def _policy_of(logged: LoggedDecision, policy: Policy | None) -> tuple[LearnedPolicy | None, str]:
    """The policy that decided, or why it is not at hand."""
    lacking = "so there are no Shapley values and no what-ifs."
    try:
        given = load_policy(DEFAULT) if policy is None else policy
    except PolicyFileError as error:
        return None, f"The policy cannot be read ({error}), {lacking}"
    wanted, name = logged.value("policy_sha256"), logged.value("policy")
    if not isinstance(given, LearnedPolicy) or given.sha256 != wanted:
        which = (
            "no policy was given, and the one that ships is another" if policy is None else "the one given is another"
        )
        return None, f"The policy {name} is not at hand ({which}: its weights have another sha256), {lacking}"
    return given, ""


def _known(table: pa.Table, reason: str) -> dict[str, Any]:
    """What the rows of a decision tell that cannot be taken again."""
    first = table.slice(0, 1).to_pylist()[0]
    ranks = {
        key: table[column].to_pylist()
        for key, column in (("asked", "rank_wanted"), ("clipped", "rank_clipped"), ("got", "rank_after"))
        if not table[column].null_count
    }
    return {
        "decision": first["decision"],
        "step": first["step"],
        "first": first["decision"] == 0,
        "policy": first["policy"],
        "verdict": f"At step {first['step']} {first['policy']} decided; the log does not hold enough to explain it.",
        "sentences": [reason],
        "projection": ranks,
    }
