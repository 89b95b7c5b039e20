"""Explanations of all decisions of a log, as JSON values for pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...agents.learned.policy import LearnedPolicy
from ...agents.learned.policy_file import DEFAULT, load_policy
from ...allocation.log import DecisionLog, DecisionRecord
from ...allocation.policy import Policy
from ...errors import PolicyFileError
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


def _about_the_plan(logged: DecisionRecord, changed: bool) -> tuple[str, ...]:
    """Where what is explained is not the plan that the run got."""
    drawn = logged.deliberation is not None and logged.deliberation.temperature > 0
    notes = {
        "The plan was drawn; what-ifs and the effect of noise are those of the plan that the policy prefers.": drawn,
        "A person in review or a limit of time changed the plan; what is explained is the policy's own.": changed,
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
