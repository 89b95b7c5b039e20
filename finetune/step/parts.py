"""Running steps in parts, each with only the checkpointed layers it needs, and without rows of much padding.

The parts of a step depend on the lengths of its rows, the plan and the limit (`decide/plan/parts.py`): they minimize
seconds within the budget. A resumed run has the same parts, as does any run with the same seed.

Plans are then priced with a single row of the longest length, so any step can run, whatever its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...common.checks import counted, finite
from ...cost.batch_shape import Batch, shape_of
from ...cost.recording import BatchShape
from ...cost.savers.exact import is_compiled
from ...decide.plan.parts import Part, parts_sentence
from .batch_rows import SHARES, BatchRows, Cuts, longest_text
from .exact_parts import Exactness, rows_of
from .part_plans import MULTIPLE, PartPlans
from .plan_keeper import GOOD_STEPS, PlanKeeper
from .run import Participant, TrainingRun
from .watched_parts import Known, Watch

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
        if len(part.rows) <= self._plans.least and part.layers == cost.levels[-1]:
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
        asked: True if the user asks for parts under any loss.
        tally: totals of the run so far.
        plans: chooses the parts.
        ran: the parts of the current step that ran so far.
    """

    def __init__(self, keeper: PlanKeeper, tell: Callable[[str], None], *, fewest: bool = False) -> None:
        self._keeper, self._tell, self.tally, self.plans = keeper, tell, Tally(), PartPlans(keeper, fewest=fewest)
        self.ran, self._step = RanParts(self.plans), 0
        self._kind, self._packed, self._told_whole = "", False, False
        self._watch: Known | Watch | None = None
        self._seed: int | None = None
        self.asked = False

    @property
    def on(self) -> bool:
        """True if steps run in parts."""
        return bool(self._kind)

    @property
    def cuts(self) -> Cuts:
        """What may be cut from batches."""
        return self._keeper.run.cuts

    def decide(self, found: Exactness, each: int, *, seed: int | None = None) -> None:
        """Apply the result of a test.

        Args:
            found: the result.
            each: rows of an example.
            seed: seed of further tests, under an unknown loss.
        """
        self._kind, self._packed = found.kind, found.packed
        self._take(each, seed)
        if not found.kind and found.reason:
            self._tell(f"Steps run whole, not in parts: {found.reason}.")
        if found.kind and found.draws:
            self._tell("Steps run in parts: the same gradients, except that dropout masks differ with the shapes.")

    def _take(self, each: int, seed: int | None) -> None:
        """Set the rows of an example; under an unknown loss rows may interact, so no part is a single row."""
        self._seed, self.plans.each, self.plans.least = seed, each, 1 if seed is None else 2

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
        self._take(counted(own["each"], 1), None if own["seed"] is None else counted(own["seed"]))
        self.plans.most = None if own["most"] is None else finite(own["most"])
        self.ran.since, self.ran.wait = counted(own["since"]), counted(own["wait"], 1)
        self.tally = Tally(**{name: counted(own["tally"][name]) for name in vars(Tally())})

    def state(self) -> dict[str, Any]:
        """Return the state for `begin`, as JSON values."""
        own = {name: getattr(self, f"_{name}") for name in ("kind", "packed", "seed")}
        own |= {"since": self.ran.since, "wait": self.ran.wait, "each": self.plans.each, "most": self.plans.most}
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
        """Begin a step, after a test if due."""
        self._step = step
        self.ran.begin(step)
        if self.on and (reason := self._watching().reason(step, batches)):
            self.turn_off(f"from step {step + 1} on. {reason[:1].upper()}{reason[1:]}")

    def _watching(self) -> Known | Watch:
        """Return the watch for batches that may no longer run in parts."""
        if self._watch is None:
            keeper, seed = self._keeper, self._seed

            def plan(rows: BatchRows) -> list[Sequence[int]]:
                return [part.rows for part in self.plans.of(rows, None)]

            watch = partial(Watch, keeper, self._rows_of, plan, self.plans.fits, self._kind)
            self._watch = Known(keeper.run) if seed is None else watch(seed)
        return self._watch

    def hear(self, loss: torch.Tensor) -> None:
        """Take the loss of a part, before its backward pass; the first part of a step represents the step."""
        if self._watch:
            self._watch.hear(self._step, loss)

    def _rows_of(self, batch: Batch) -> BatchRows | None:
        return rows_of(batch, self.cuts, self.plans.each, packed=self._packed)

    def shape_of(self, batch: Batch) -> BatchShape:
        """Return the shape used to price plans that must run a batch: its longest example alone."""
        shape = shape_of(batch)
        if not self.on:
            return shape
        longest = (self._packed and longest_text(batch)) or shape.length
        return BatchShape(min(self.plans.least * self.plans.each, shape.rows), longest)

    def of(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Yield the parts of a batch, each with the factor of its loss.

        All work on a part, forward and backward, belongs to it: its layers stay checkpointed until the next part, and
        gradients are exchanged with other processes only in the last one.

        Args:
            batch: the batch as passed to the loop.

        Raises:
            BudgetError: a row does not fit alone.
        """
        if self.on and self._seed is None and (reason := self._watching().reason(self._step, ())):
            self.turn_off(f"from step {self._step + 1} on. {reason[:1].upper()}{reason[1:]}")  # due to a callback
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
