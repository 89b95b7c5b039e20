"""Runs the steps of a run in parts: each with the layers checkpointed that it needs, and no row with much padding.

The parts of a step follow from the lengths of its rows, the plan and the limit (`plan/parts.py`): they are those of the
least seconds within the budget. A run that is resumed has the same ones, and so has any run of the same seed.

A plan is priced with one row of the longest length then, alone: whatever the rows of a step, it can run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..common.checks import counted, finite
from ..cost.batch_shape import Batch, shape_of
from ..cost.recording import BatchShape
from ..cost.savers import is_compiled
from ..plan.parts import Part, parts_sentence
from .batch_rows import SHARES, BatchRows, Cuts, longest_text
from .exact_parts import Exactness, rows_of
from .part_plans import MULTIPLE, PartPlans
from .plan_keeper import GOOD_STEPS, PlanKeeper
from .run import Participant, TrainingRun
from .watched_parts import Known, Watch

SMALLER = 0.8
"""The share of what a part was predicted to take that parts may take after it ran out of memory."""


@dataclass
class Tally:
    """What the steps of a run have had in common so far.

    Attributes:
        batches: that ran.
        parts: in which they ran.
        rectangle: tokens of the batches, padding included.
        real: tokens without padding.
        in_parts: tokens of all parts, padding included.
        layers: checkpointed layers of all parts, by their tokens.
        too_large: batches that would not have fit as a whole, with all layers checkpointed.
    """

    batches: int = 0
    parts: int = 0
    rectangle: int = 0
    real: int = 0
    in_parts: int = 0
    layers: int = 0
    too_large: int = 0

    def add(self, rows: BatchRows, parts: Sequence[Part], *, fits: bool) -> None:
        """Count a batch, and whether it would have fit as a whole."""
        self.batches += 1
        self.too_large += not fits
        self.parts += len(parts)
        self.rectangle += rows.tokens
        self.real += int(rows.lengths.sum())
        self.in_parts += sum(part.tokens for part in parts)
        self.layers += sum(part.tokens * part.layers for part in parts)

    @property
    def padding_saved(self) -> float:
        """The share of the padding that did not run; 0 where there was none."""
        padding = self.rectangle - self.real
        return (self.rectangle - self.in_parts) / padding if padding else 0.0


class StepParts(Participant):
    """The parts of a run's steps.

    Args:
        keeper: keeps the plan, and knows its run, its limit and its byte model.
        tell: gets a line where steps run as a whole, and why.
        fewest: whether parts take as few bytes as the longest row of the run, where that takes no more seconds than
            the padded batch with all layers checkpointed.

    Attributes:
        asked: whether the user asks for parts under any loss.
        tally: of the run so far.
    """

    def __init__(self, keeper: PlanKeeper, tell: Callable[[str], None], *, fewest: bool = False) -> None:
        self._keeper, self._tell, self.tally, self.plans = keeper, tell, Tally(), PartPlans(keeper, fewest=fewest)
        self._kind, self._packed = "", False
        self._since, self._wait, self._step = 0, GOOD_STEPS, 0
        self._ran: list[tuple[Part, float]] = []  # in the step so far, and the bytes of what goes in
        self._told_whole = self._accumulates = False
        self._watch: Known | Watch | None = None
        self._seed: int | None = None
        self.asked = False

    @property
    def on(self) -> bool:
        """Whether steps run in parts."""
        return bool(self._kind)

    @property
    def cuts(self) -> Cuts:
        """What may be cut from batches."""
        return self._keeper.run.cuts

    def decide(self, found: Exactness, each: int, *, seed: int | None = None) -> None:
        """Take what a test has found.

        Args:
            found: by it.
            each: rows of an example.
            seed: of further tests, under a loss that is not known.
        """
        self._kind, self._packed = found.kind, found.packed
        self._take(each, seed)
        if not found.kind and found.reason:
            self._tell(f"Steps run as a whole, and not in parts: {found.reason}.")
        if found.kind and found.draws:
            self._tell("Steps run in parts: the same gradients, but that dropout draws other numbers for other shapes.")

    def _take(self, each: int, seed: int | None) -> None:
        """Have examples of so many rows; under a loss that is not known rows may meet, so none is alone in a part."""
        self._seed, self.plans.each, self.plans.least = seed, each, 1 if seed is None else 2

    def begin_to_keep(self, run: TrainingRun) -> None:
        """Keep the gradients of one part beside the next one, which the run's step is measured with from now on."""
        self._accumulates, self.plans.compiled = run.accumulation > 1, is_compiled(run.wrapped)
        run.keep_gradients()

    def turn_off(self, reason: str) -> None:
        """Run steps as a whole from now on, for a reason that is told."""
        self.decide(Exactness("", reason), 1)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Go on in a run that is resumed."""
        if state is None:
            return
        own = state["parts"]
        if own["kind"] and own["kind"] not in SHARES:
            raise ValueError(f"parts of kind {own['kind']!r}")
        self._kind, self._packed = str(own["kind"]), bool(own["packed"])
        self._take(counted(own["each"], 1), None if own["seed"] is None else counted(own["seed"]))
        self.plans.most = None if own["most"] is None else finite(own["most"])
        self._since, self._wait = counted(own["since"]), counted(own["wait"], 1)
        self.tally = Tally(**{name: counted(own["tally"][name]) for name in vars(Tally())})

    def state(self) -> dict[str, Any]:
        """What `begin` needs to go on, as JSON values."""
        own = {name: getattr(self, f"_{name}") for name in ("kind", "packed", "seed", "since", "wait")}
        own |= {"each": self.plans.each, "most": self.plans.most}
        return {"parts": {**own, "tally": vars(self.tally)}}

    def ranks_changed(self) -> None:
        """Price parts anew."""
        self.plans.forget()

    def end(self) -> None:
        """Tell what parts have brought; a second call tells nothing."""
        if line := parts_sentence(self.figures()):
            self._tell(line)
        self._kind = ""

    # A step -----------------------------------------------------------------------------------------------------------

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Begin a step, after a test if one is due; what an error has taken from parts comes back after good steps."""
        self._step, self._ran = step, []
        if self.plans.most is not None and step - self._since >= self._wait:
            self.plans.most, self._wait = None, 2 * self._wait
        if self.on and (reason := self._watching().reason(step, batches)):
            self.turn_off(f"from step {step + 1} on. {reason[:1].upper()}{reason[1:]}")

    def _watching(self) -> Known | Watch:
        """What notices that batches may not run in parts any more."""
        if self._watch is None:
            keeper, seed = self._keeper, self._seed

            def plan(rows: BatchRows) -> list[Sequence[int]]:
                return [part.rows for part in self.plans.of(rows, None)]

            watch = partial(Watch, keeper, self._rows_of, plan, self.plans.fits, self._kind)
            self._watch = Known(keeper.run) if seed is None else watch(seed)
        return self._watch

    def hear(self, loss: torch.Tensor) -> None:
        """Hear of the loss of a part, before its backward pass; that of the first part of a step tells of the step."""
        if self._watch:
            self._watch.hear(self._step, loss)

    def _rows_of(self, batch: Batch) -> BatchRows | None:
        return rows_of(batch, self.cuts, self.plans.each, packed=self._packed)

    def shape_of(self, batch: Batch) -> BatchShape:
        """The shape with which plans are priced that have to run a batch: its longest example alone."""
        shape = shape_of(batch)
        if not self.on:
            return shape
        longest = (self._packed and longest_text(batch)) or shape.length
        return BatchShape(min(self.plans.least * self.plans.each, shape.rows), longest)

    def of(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Yield the parts of a batch, and by what the loss of each is multiplied.

        What the loop does with a part, forward and backward, belongs to the part: its layers are checkpointed until the
        next one, and other processes hear of the last one alone.

        Args:
            batch: as the loop gets it.

        Raises:
            BudgetError: a row does not fit alone.
        """
        if self.on and self._seed is None and (reason := self._watching().reason(self._step, ())):
            self.turn_off(f"from step {self._step + 1} on. {reason[:1].upper()}{reason[1:]}")  # since a callback, say
        rows = self._rows_of(batch) if self.on else None
        pairs = self._agreed(rows) if self.on else []
        if rows is None or not pairs:
            if self.on and not self._told_whole:
                self._told_whole = True
                self._tell("A batch whose rows cannot be told apart runs as a whole.")
            yield batch, 1.0
            return
        multiple = MULTIPLE if self._keeper.run.device.type == "cuda" else 1
        checkpointing, layers = self._keeper.checkpointing, self._keeper.checkpointed
        try:
            for number, (part, share) in enumerate(pairs):
                own = part.tokens < rows.tokens
                self._ran.append((part, own * rows.token_bytes * part.tokens))
                if checkpointing and self.plans.bytes:
                    checkpointing.take(self.plans.bytes.layers[: part.layers])
                    checkpointing.before_step()
                with self._keeper.run.replicas.exchanging(number + 1 == len(pairs)):
                    yield rows.part(part.rows, multiple), share
        finally:
            if checkpointing:
                checkpointing.take(layers)

    def _agreed(self, rows: BatchRows | None) -> list[tuple[Part, float]]:
        """The parts of a batch that run, and their shares; none where its rows cannot be told apart.

        Processes that run a sharded model together take as many passes, with as many layers checkpointed, inside which
        modules may be gathered again. One that has fewer parts splits them further, and runs the last part again for
        nothing where it has no more rows.
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

    # What a step takes ------------------------------------------------------------------------------------------------

    def predicted(self) -> float:
        """Bytes at the peak of the step that has run, by its parts; 0 where it ran as a whole."""
        if not self._ran or self.plans.bytes is None:
            return 0.0
        (first, given), *others = self._ran
        alone = self.plans.bytes.exact(first, first=not self._accumulates) + given
        return max([alone, *(self.plans.bytes.exact(part) + given for part, given in others)])

    def shrink(self) -> bool:
        """Let parts take less after one that ran out of memory; False if that was a row alone with all layers."""
        if not self._ran or self.plans.bytes is None:
            return False
        part, _ = self._ran[-1]
        if len(part.rows) <= self.plans.least and part.layers == self.plans.bytes.levels[-1]:
            return False
        self.plans.most, self._since = SMALLER * self.plans.bytes.exact(part), self._step
        self._ran = []
        return True

    def alone(self) -> str:
        """The row that ran alone when memory ran out, for an error; empty where several did, or none is known."""
        if not self._ran or len((part := self._ran[-1][0]).rows) != 1:
            return ""
        layers = f"{part.layers} layers checkpointed"
        return f"Row {part.rows[0]} of its batch has {part.length:,} tokens, and ran alone with {layers}."

    def longest_row(self, batches: Sequence[Batch]) -> str:
        """The longest row of some batches and the longest one that fits alone, for an error."""
        return self.plans.longest_row(list(map(self._rows_of, batches)))

    def figures(self) -> dict[str, float]:
        """What a training log shows of parts."""
        if not self.on or not self.tally.batches:
            return {}
        mean, tally = self.tally.parts / self.tally.batches, self.tally
        return {"parts": mean, "padding_saved": tally.padding_saved, "batches_too_large": float(tally.too_large)}


def _counted(rows: BatchRows, parts: Sequence[Part], kind: str) -> list[tuple[Part, float]]:
    """The parts that count in the loss of a batch, of which it is one of `SHARES`, with their shares."""
    pairs = list(zip(parts, rows.shares([part.rows for part in parts], kind), strict=True))
    # A mean over no predictions is NaN: a part without any is left out, as it adds nothing.
    return [pair for pair in pairs if pair[1]] or pairs
