"""Running steps in parts, each with only the checkpointed layers it needs, and without rows of much padding.

The parts of a step depend on the lengths of its rows, the plan and the limit (`decide/plan/parts.py`): they minimize
seconds within the budget. A resumed run has the same parts, as does any run with the same seed.

Plans are then priced with a single row of the longest length, so any step can run, whatever its rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import functional

from ...common.checks import counted, finite
from ...cost.batch_shape import Batch, shape_of
from ...cost.recording import BatchShape
from ...cost.savers.exact import is_compiled
from ...decide.plan.parts import Part, parts_sentence
from ...lora.resize import gradient_nodes
from .batch_rows import SHARES, BatchRows, Cuts, longest_text
from .exact_parts import Exactness, rows_of
from .known_losses import HOOKS, foreign_modes
from .part_plans import MULTIPLE, PartPlans
from .plan_keeper import GOOD_STEPS, PlanKeeper
from .run import Participant, TrainingRun

LOOK_EVERY = 100
"""Steps between checks of the modules of a model with a known loss."""

SMALLER = 0.8
"""Memory limit of parts after one ran out of memory, as a share of that part's prediction."""


@dataclass
class Tally:
    """Totals over the steps of a run so far.

    Attributes:
        batches: number of batches.
        parts: number of their parts.
        rectangle: tokens of the batches, padding included.
        real: tokens without padding.
        in_parts: tokens of all parts, padding included.
        too_large: batches too large to run whole, even with all layers checkpointed.
    """

    batches: int = 0
    parts: int = 0
    rectangle: int = 0
    real: int = 0
    in_parts: int = 0
    too_large: int = 0

    def add(self, rows: BatchRows, parts: Sequence[Part], *, fits: bool) -> None:
        """Add a batch; `fits` is True if it would have fit as a whole."""
        self.batches += 1
        self.too_large += not fits
        self.parts += len(parts)
        self.rectangle += rows.tokens
        self.real += int(rows.lengths.sum())
        self.in_parts += sum(part.tokens for part in parts)

    @property
    def padding_saved(self) -> float:
        """Share of the padding that was skipped; 0 without padding."""
        padding = self.rectangle - self.real
        return (self.rectangle - self.in_parts) / padding if padding else 0.0


class RanParts:
    """The parts of the current step that ran so far: their peak, and the limit of parts once one is out of memory.

    Args:
        plans: chooses parts; gets the limit.

    Attributes:
        accumulates: True if the gradients of earlier batches lie next to the first part.
        since: the step whose error set the limit.
        wait: good steps before the limit is lifted; doubled each time.
    """

    def __init__(self, plans: PartPlans) -> None:
        self._plans, self._pairs, self._step = plans, list[tuple[Part, float]](), 0
        self.accumulates, self.since, self.wait = False, 0, GOOD_STEPS

    def begin(self, step: int) -> None:
        """Begin a step; lift limits from an earlier error after enough good steps."""
        self._step, self._pairs = step, []
        if self._plans.most is not None and step - self.since >= self.wait:
            self._plans.most, self.wait = None, 2 * self.wait

    def add(self, part: Part, given: float) -> None:
        """Add the part about to run, with the bytes of its inputs."""
        self._pairs.append((part, given))

    def predicted(self) -> float:
        """Return the peak bytes of the last step, predicted from its parts; 0 if it ran whole."""
        cost = self._plans.bytes
        if not self._pairs or cost is None:
            return 0.0
        (first, given), *others = self._pairs
        alone = cost.exact(first, first=not self.accumulates) + given
        return max([alone, *(cost.exact(part) + given for part, given in others)])

    def shrink(self) -> bool:
        """Lower the limit of parts after an out-of-memory error; False for a lone row with all layers checkpointed."""
        cost = self._plans.bytes
        if not self._pairs or cost is None:
            return False
        part, _ = self._pairs[-1]
        if len(part.rows) == 1 and part.layers == cost.levels[-1]:
            return False
        self._plans.most, self.since = SMALLER * cost.exact(part), self._step
        self._pairs = []
        return True

    def alone(self) -> str:
        """Describe the single row that ran out of memory, for an error; empty if several did, or none is known."""
        if not self._pairs or len((part := self._pairs[-1][0]).rows) != 1:
            return ""
        layers = f"{part.layers} layers checkpointed"
        return f"Row {part.rows[0]} of its batch has {part.length:,} tokens, and ran on its own with {layers}."


class StepParts(Participant):
    """The parts of a run's steps.

    Args:
        keeper: keeps the plan, and knows its run, its limit and its byte model.
        tell: called with a line if steps run whole, and why.
        fewest: True if parts take as few bytes as the longest row of the run, unless that takes more seconds than the
            padded batch with all layers checkpointed.

    Attributes:
        tally: totals of the run so far.
        plans: chooses the parts.
        ran: the parts of the current step that ran so far.
    """

    def __init__(self, keeper: PlanKeeper, tell: Callable[[str], None], *, fewest: bool = False) -> None:
        self._keeper, self._tell, self.tally, self.plans = keeper, tell, Tally(), PartPlans(keeper, fewest=fewest)
        self.ran, self._step = RanParts(self.plans), 0
        self._kind, self._packed, self._told_whole = "", False, False
        self._seen: tuple[int, ...] | None = None

    @property
    def on(self) -> bool:
        """True if steps run in parts."""
        return bool(self._kind)

    @property
    def cuts(self) -> Cuts:
        """What may be cut from batches."""
        return self._keeper.run.cuts

    def decide(self, found: Exactness, each: int) -> None:
        """Apply the result of a test.

        Args:
            found: the result.
            each: rows of an example.
        """
        self._kind, self._packed, self.plans.each = found.kind, found.packed, each
        if not found.kind and found.reason:
            self._tell(f"Steps run whole, not in parts: {found.reason}.")
        if found.kind and found.draws:
            self._tell("Steps run in parts: the same gradients, except that dropout masks differ with the shapes.")

    def begin_to_keep(self, run: TrainingRun) -> None:
        """Keep the gradients of one part alongside the next; from now on the run's step is measured this way."""
        self.ran.accumulates, self.plans.compiled = run.accumulation > 1, is_compiled(run.wrapped)
        run.keep_gradients()

    def turn_off(self, reason: str) -> None:
        """Run steps whole from now on, and report the reason."""
        self.decide(Exactness("", reason), 1)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state in a resumed run."""
        if state is None:
            return
        own = state["parts"]
        if own["kind"] and own["kind"] not in SHARES:
            raise ValueError(f"parts of kind {own['kind']!r}")
        self._kind, self._packed = str(own["kind"]), bool(own["packed"])
        self.plans.each = counted(own["each"], 1)
        self.plans.most = None if own["most"] is None else finite(own["most"])
        self.ran.since, self.ran.wait = counted(own["since"]), counted(own["wait"], 1)
        self.tally = Tally(**{name: counted(own["tally"][name]) for name in vars(Tally())})

    def state(self) -> dict[str, Any]:
        """Return the state for `begin`, as JSON values."""
        own = {
            "kind": self._kind,
            "packed": self._packed,
            "since": self.ran.since,
            "wait": self.ran.wait,
            "each": self.plans.each,
        }
        own["most"] = self.plans.most
        return {"parts": {**own, "tally": vars(self.tally)}}

    def ranks_changed(self) -> None:
        """Discard the prices of parts."""
        self.plans.forget()

    def end(self) -> None:
        """Report the effect of parts; a second call reports nothing."""
        if line := parts_sentence(self.figures()):
            self._tell(line)
        self._kind = ""

    # A step -----------------------------------------------------------------------------------------------------------

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Begin a step."""
        self._step = step
        self.ran.begin(step)
        self._check_known()

    def _check_known(self) -> None:
        """Run steps whole from now on if the known loss has become another one, as through a callback.

        Modules are looked at every `LOOK_EVERY` steps; a new hook, a replaced function or a mode is noticed at once.
        """
        if not self.on:
            return
        run = self._keeper.run
        own = [vars(module) for module in run.model.modules()]
        trains = {name: each for name, each in run.model.named_parameters() if each.requires_grad}
        seen = (
            len(own),
            hash(tuple(id(hook) for each in own for kept in HOOKS for hook in each[kept].values())),
            hash(tuple(id(each.get(name)) for each in own for name in ("forward", "_loss_function"))),
            sum(bool(each._backward_hooks or each._post_accumulate_grad_hooks) for each in trains.values()),
            hash(tuple(map(sys.getrefcount, gradient_nodes(trains).values()))),
            id(functional.cross_entropy),
            len(foreign_modes()),
        )
        looks, self._seen = seen != self._seen or self._step % LOOK_EVERY == 0, seen
        if reason := run.unknown() if looks else run.foreign():
            self.turn_off(f"from step {self._step + 1} on. {reason[:1].upper()}{reason[1:]}")

    def _rows_of(self, batch: Batch) -> BatchRows | None:
        return rows_of(batch, self.cuts, self.plans.each, packed=self._packed)

    def shape_of(self, batch: Batch) -> BatchShape:
        """Return the shape used to price plans that must run a batch: its longest example alone."""
        shape = shape_of(batch)
        if not self.on:
            return shape
        longest = (self._packed and longest_text(batch)) or shape.length
        return BatchShape(min(self.plans.each, shape.rows), longest)

    def of(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Yield the parts of a batch, each with the factor of its loss.

        All work on a part, forward and backward, belongs to it: its layers stay checkpointed until the next part, and
        gradients are exchanged with other processes only in the last one.

        Args:
            batch: the batch as passed to the loop.

        Raises:
            BudgetError: a row does not fit alone.
        """
        self._check_known()  # a callback may have changed it since the step began
        rows = self._rows_of(batch) if self.on else None
        pairs = self._agreed(rows) if self.on else []
        if rows is None or not pairs:
            if self.on and not self._told_whole:
                self._told_whole = True
                self._tell("A batch with rows that cannot be told apart runs whole.")
            yield batch, 1.0
            return
        multiple = MULTIPLE if self._keeper.run.device.type == "cuda" else 1
        checkpointing, layers = self._keeper.checkpointing, self._keeper.checkpointed
        try:
            for number, (part, share) in enumerate(pairs):
                own = part.tokens < rows.tokens
                self.ran.add(part, own * rows.token_bytes * part.tokens)
                if checkpointing and self.plans.bytes:
                    checkpointing.take(self.plans.bytes.layers[: part.layers])
                    checkpointing.before_step()
                with self._keeper.run.replicas.exchanging(number + 1 == len(pairs)):
                    yield rows.part(part.rows, multiple), share
        finally:
            if checkpointing:
                checkpointing.take(layers)

    def _agreed(self, rows: BatchRows | None) -> list[tuple[Part, float]]:
        """Return the parts of a batch to run, and their shares; none if its rows cannot be separated.

        Processes that share a sharded model make the same number of passes, with the same number of checkpointed
        layers, whose modules may be gathered again. A process with fewer parts splits them further, and out of rows
        repeats the last part with a share of 0.
        """
        together = self._keeper.run.replicas.together
        parts = self.plans.of(rows, None) if rows else ()
        pairs = _counted(rows, parts, self._kind) if rows else []
        (most,) = together(len(pairs) or math.inf)
        if rows is None or math.isinf(most):
            return []
        if len(pairs) < most:
            parts = self.plans.of(rows, min(max(int(most), len(parts)), rows.examples))
            pairs = _counted(rows, parts, self._kind)
            pairs += [(pairs[-1][0], 0.0)] * (int(most) - len(pairs))
        assert self.plans.bytes is not None, "the parts have a price"
        whole = Part(tuple(range(rows.examples)), rows.shape.length, self.plans.bytes.levels[-1], rows.packed)
        room = self._keeper.room_for(self._keeper.applier.ranks)
        self.tally.add(rows, parts, fits=self.plans.bytes.of(whole) <= room)
        layers = together(*(part.layers for part, _ in pairs))
        return [(replace(part, layers=int(own)), share) for (part, share), own in zip(pairs, layers, strict=True)]

    def longest_row(self, batches: Sequence[Batch]) -> str:
        """Describe the longest row of some batches and the longest that fits alone, for an error."""
        return self.plans.longest_row(list(map(self._rows_of, batches)))

    def figures(self) -> dict[str, float]:
        """Return figures on parts for a training log."""
        if not self.on or not self.tally.batches:
            return {}
        mean, tally = self.tally.parts / self.tally.batches, self.tally
        return {"parts": mean, "padding_saved": tally.padding_saved, "batches_too_large": float(tally.too_large)}


def _counted(rows: BatchRows, parts: Sequence[Part], kind: str) -> list[tuple[Part, float]]:
    """Return the parts that count in a batch's loss, of this kind of `SHARES`, with their shares."""
    pairs = list(zip(parts, rows.shares([part.rows for part in parts], kind), strict=True))
    # A mean over no predictions is NaN: such a part is left out, as it adds nothing.
    return [pair for pair in pairs if pair[1]] or pairs
