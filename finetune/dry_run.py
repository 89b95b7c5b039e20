"""A run that begins, tells its plan in a few lines, and ends before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .callback import RankPilotCallback

MOST_REMARKS = 6
"""Lines told after that of the plan."""


def begin_only(callback: RankPilotCallback, tell: Callable[[str], None]) -> None:
    """Have the run of a callback end before its first step, as told in at most ten lines.

    Measuring, pricing and the first plan are those of a run that trains. Nothing is written, neither by the callback
    nor by others at the start of training, since this one comes first.

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
        told = [plan, *[line for line in remarks if line != plan][:MOST_REMARKS]]
        for line in filter(None, told):
            tell(line)
        callback.break_off(begins_again=True)
        raise SystemExit(0)

    callback.__dict__["on_train_begin"] = begin_and_end
