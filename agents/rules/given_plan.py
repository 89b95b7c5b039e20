"""A plan that somebody gives, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...allocation.log import DecisionRecord
from ...allocation.observation import Observation
from ...allocation.policy import Decision, decision_to_keep, is_first
from ...common.module_names import kinds_in_layers
from ...errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class GivenPlan:
    """Takes given ranks at the first decision, and keeps them.

    Attributes:
        name: the name in logs and tables.
        ranks: of each module, by its full name.
    """

    name: str
    ranks: Mapping[str, int] = field(hash=False)

    def decide(self, observation: Observation) -> Decision:
        """The plan at first, and no change after it; what it leaves of the budget is left.

        Raises:
            UnknownNameError: the plan names a module that is not there.
            ConfigError: it leaves one out.
        """
        if not is_first(observation):
            return decision_to_keep(observation)
        for name in self.ranks:
            if name not in observation.names:
                raise UnknownNameError.of("target module", name, observation.names)
        missing = [name for name in observation.names if name not in self.ranks]
        if missing:
            raise ConfigError(
                f"The plan {self.name} gives no rank for {len(missing)} of {len(observation.names)} modules, "
                f"{missing[0]!r} among them. Give each target module a rank; 0 is no adapter."
            )
        ranks = np.array([self.ranks[name] for name in observation.names], dtype=np.int64)
        return Decision(ranks, np.zeros(len(ranks)), exact=True)


def shuffled_plan(logged: DecisionRecord, seed: int) -> dict[str, int]:
    """The ranks after a decision, dealt anew among the modules of each kind; under bytes, among the adapted ones.

    Args:
        logged: the decision.
        seed: decides the deal.
    """
    names, problem = logged.observation.names, logged.problem
    kinds = dict(zip(names, kinds_in_layers(names, problem.blocks.tolist()), strict=True))
    return shuffled_within_kinds(logged.plan(), kinds, seed, adapted_alone=problem.cost.unit == "bytes")


def shuffled_within_kinds(
    ranks: Mapping[str, int], kinds: Mapping[str, str], seed: int, *, adapted_alone: bool
) -> dict[str, int]:
    """The same ranks dealt anew among the modules of each kind; the adapter keeps its size.

    Args:
        ranks: of each module, by its name.
        kinds: the kind of each module, such as "self_attn.q_proj".
        seed: decides the deal.
        adapted_alone: modules without an adapter stay without: under a budget of bytes, an adapter in a lower layer
            would not fit.
    """
    generator, dealt = np.random.default_rng(seed), dict(ranks)
    for kind in sorted(set(kinds.values())):
        members = [name for name, rank in ranks.items() if kinds[name] == kind and (rank > 0 or not adapted_alone)]
        values = generator.permutation([ranks[name] for name in members]).tolist()
        dealt |= dict(zip(members, values, strict=True))
    return dealt
