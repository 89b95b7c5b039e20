"""A person reviews each plan before it is applied: in an editor, and with a yes or no in the terminal or the file."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..allocation.controller import RankController
from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..allocation.policy import Decision
from ..common.arrays import IntArray
from ..common.files import read_bytes, write_text
from ..common.given_numbers import is_real
from ..common.plain_yaml import MOST_YAML_BYTES
from ..common.processes import Processes
from ..errors import ConfigError, DataError, ReviewError
from ..memory.cost import plan_cost
from .proposal import Document, Proposal, is_review_file, parse

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""How often the file is looked at, in seconds."""


class PlanReview:
    """Asks a person about each plan of one run.

    In a terminal the question is asked there. Elsewhere the run waits until the file says `approved: true` or `false`.

    Args:
        path: the file of the proposed plan; replaced at each decision.
        timeout_s: how long to wait without a terminal; None for as long as it takes.

    Attributes:
        resumed: whether the run goes on from a checkpoint. Then a plan that the file holds as approved, for the same
            proposal, is not asked for again.
        processes: those of the run; the first one asks.

    Raises:
        ConfigError: the file exists and is no review file, or the timeout is not above 0.
    """

    def __init__(self, path: str | Path, timeout_s: float | None = None) -> None:
        if not isinstance(path, str | Path) or not is_review_file(Path(path)):
            raise ConfigError(f"review is the name of a new file, or of an earlier review file; got {str(path)!r}.")
        _check_timeout(timeout_s)
        self.path: Path = Path(path)
        self.timeout_s = timeout_s
        self.resumed = False
        self.processes: Processes = Processes()

    @classmethod
    def of(cls, path: str | Path | None, timeout_s: float | None) -> PlanReview | None:
        """The review that these arguments ask for; None without a file."""
        if path is None and timeout_s is not None:
            raise ConfigError("review_timeout needs review: the file in which a person approves each plan.")
        return None if path is None else cls(path, timeout_s)

    def apply(
        self,
        controller: RankController[Any],
        observation: Observation,
        decision: Decision,
        number: int,
        step: int,
        policy: str,
        optimizer: torch.optim.Optimizer,
    ) -> tuple[Plan, dict[str, str]]:
        """Let a person review a decision, and give the adapters the plan that the person wants.

        Args:
            controller: observes the adapters and changes their ranks.
            observation: what the decision was made from.
            decision: what the policy wants.
            number: of the decision in its run, from 0.
            step: optimiser steps done before it.
            policy: name of the policy.
            optimizer: its state follows.

        Returns:
            The plan as applied, and notes for the decision log.

        Raises:
            ReviewError: the person refused the plan, or gave no answer in time.
        """
        problem, proposed = controller.propose(decision, optimizer)
        proposal = Proposal(number, step, policy, observation, decision.scores, problem, proposed)
        plan = self.processes.on_first(lambda: self.plan(proposal))
        controller.set_plan(plan.ranks, step, optimizer)
        return plan, review_notes(proposal, plan)

    def plan(self, proposal: Proposal) -> Plan:
        """The plan as the person wants it.

        Where the person changed a rank, the plan's `clipped` has the person's rank as well.

        Raises:
            ReviewError: the person refused it, or gave no answer in time.
        """
        ranks = self._approved_before(proposal) if self.resumed else None
        if ranks is None:
            write_text(self.path, proposal.text())
            ranks = self._ask(proposal) if _at_terminal() else self._wait(proposal)
            write_text(self.path, proposal.text(ranks))
        clipped = np.where(ranks == proposal.plan.ranks, proposal.plan.clipped, ranks)
        return Plan(clipped, ranks, plan_cost(proposal.problem.cost, ranks))

    def _approved_before(self, proposal: Proposal) -> IntArray | None:
        """The ranks that the file holds as approved for this proposal, if it does."""
        try:
            document = parse(self._read())
            if document.get("approved") is True and proposal.is_in(document):
                ranks = proposal.ranks_in(document)
                logger.warning("The plan of step %d in %s is approved already.", proposal.step, self.path)
                return ranks
        except ConfigError:
            pass
        return None

    def _ask(self, proposal: Proposal) -> IntArray:
        """Ask in the terminal, until there is a plan that can be used."""
        remark = ""
        while True:
            question = f"{remark}Step {proposal.step}: edit {self.path} and press Enter, or type yes or no: "
            try:
                answer = input(f"\nrankpilot: {question}").strip().lower()
            except EOFError:  # the terminal is gone
                return self._wait(proposal)
            if answer in ("n", "no"):
                raise self._refused(proposal)
            if answer not in ("", "y", "yes"):
                remark = f"Answer yes or no; got {answer!r}. "
                continue
            try:
                return self._ranks(proposal, parse(self._read()))
            except ConfigError as error:
                remark = f"{self.path} cannot be used. {error}\n"

    def _wait(self, proposal: Proposal) -> IntArray:
        """Wait for an answer in the file, and for a plan that can be used."""
        logger.warning(
            "Step %d waits for a review: edit the ranks in %s if you like, then set `approved: true` there, or false "
            "to end the run.",
            proposal.step,
            self.path,
        )
        began, before, looked_at = time.monotonic(), "", proposal.text()
        while self.timeout_s is None or time.monotonic() - began < self.timeout_s:
            time.sleep(POLL_S)
            text = self._read()
            # An editor may be in the middle of writing: a text counts when it has stood for a while.
            settled, before = text == before, text
            if not settled or text == looked_at:
                continue
            looked_at = text
            try:
                document = parse(text)
                if document.get("approved") is not None:
                    return self._ranks(proposal, document)
            except ConfigError as error:
                logger.warning("%s cannot be used. %s It is read again after its next change.", self.path, error)
        raise ReviewError(
            f"Nobody approved the plan of step {proposal.step} in {self.path} within {self.timeout_s:g} s. Raise "
            "review_timeout, or leave it out to wait without end."
        )

    def _ranks(self, proposal: Proposal, document: Document) -> IntArray:
        if document.get("approved") is False:
            raise self._refused(proposal)
        return proposal.ranks_in(document)

    def _refused(self, proposal: Proposal) -> ReviewError:
        return ReviewError(f"The plan of step {proposal.step} was refused in review, so the run ends there.")

    def _read(self) -> str:
        try:
            return read_bytes(self.path, MOST_YAML_BYTES).decode("utf-8-sig", errors="replace")
        except (OSError, DataError):
            return ""


def review_notes(proposal: Proposal, plan: Plan) -> dict[str, str]:
    """What a person changed, for the decision log: "changed in review: 8 -> 4" by module name."""
    changes = zip(proposal.names, proposal.plan.ranks.tolist(), plan.ranks.tolist(), strict=True)
    return {name: f"changed in review: {was} -> {now}" for name, was, now in changes if was != now}


def _at_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _check_timeout(timeout_s: Any) -> None:
    if timeout_s is not None and not (is_real(timeout_s) and timeout_s > 0):
        raise ConfigError(f"review_timeout is a number of seconds above 0, or None; got {timeout_s!r}.")
