"""A run that begins, tells its plan in a few lines, and ends before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .before_training import step_time
from .callback import RankPilotCallback
from .pilot import RankPilot

MOST_REMARKS = 6
"""Lines told after that of the plan."""


def begin_only(callback: RankPilotCallback, tell: Callable[[str], None]) -> None:
    """Have the run of a callback end before its first step, as told in at most ten lines.

    Measuring, pricing and the first plan are those of a run that trains; the time of a step is estimated.
    Nothing is written, neither by the callback nor by others at the start of training, since this one comes first.

    Args:
        callback: attached to a Trainer that is about to train, whose `train` then raises SystemExit.
        tell: called with each line.
    """
    handler, begin, lines = callback.trainer.callback_handler, callback.on_train_begin, list[str]()
    handler.callbacks = [callback, *(each for each in handler.callbacks if each is not callback)]
    callback.keeps_log, callback.pilot.journal.tell = False, lines.append

    def begin_and_end(*event: Any, **objects: Any) -> None:
        begin(*event, **objects)
        remarks = [line for line in lines if not line.endswith(" ...")]
        plan = next((line for line in reversed(remarks) if line.startswith("step ")), "")
        told = [plan, *[line for line in remarks if line != plan][:MOST_REMARKS], step_text(callback.pilot)]
        for line in filter(None, told):
            tell(line)
        callback.break_off(begins_again=True)
        raise SystemExit(0)

    callback.__dict__["on_train_begin"] = begin_and_end


def step_text(pilot: RankPilot) -> str:
    """Tell the estimated time of a step under the first plan, as a share; empty if the plan's line does."""
    keeper = pilot.guard.plan
    run, applier = keeper.run, keeper.applier
    if applier.time:
        return ""
    time = step_time(run, applier.targets)
    layers, without = (keeper.checkpointed, ()) if keeper.checkpointing else (None, None)
    share = time.seconds(applier.ranks, layers) / time.seconds(applier.reference, without)
    return (
        f"A step takes about {share:.0%} of the time of the LoRA as configured: estimated from its counted work, as if "
        "batches ran whole, and without streamed layers."
    )
