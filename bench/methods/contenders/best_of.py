"""The best static plan in hindsight: what nobody can choose, and nothing static beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..method import Group, Method
from ..study import DoesNotFitError, Outcome, Study, gather, loss_or_inf
from ..tasks import Cell


@dataclass(frozen=True)
class BestOf:
    """Of some methods the one with the lowest mean loss on the result seeds themselves: an upper bound, no method.

    Attributes:
        name: see `Method`.
        methods: of which the best is taken.
        group: see `Method`.
        description: see `Method`.
        quick: see `Method`.
    """

    name: str
    methods: Sequence[Method]
    group: Group = "bound"
    description: str = "the best static plan in hindsight, by the results themselves: a bound, not a method"
    quick: bool = True

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""

        def of(method: Method) -> Outcome | None:
            try:
                return method.outcome(study, cell)
            except DoesNotFitError:
                return None

        found = [outcome for outcome in gather(of, self.methods) if outcome is not None]
        if not found:
            raise DoesNotFitError
        return min(found, key=lambda outcome: sum(map(loss_or_inf, outcome.rows)))
