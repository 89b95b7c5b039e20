"""Attaches to each Trainer of a program under `rankpilot run`, just before it trains.

The class's own `train` is replaced, so subclasses that override it run theirs once, and then reach this one. A Trainer
is left as it is if it trains no LoRA, if its script attaches, or if attaching fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from .order import Order, tell

PREPARED = "_rankpilot_train"
"""Attribute of a Trainer: its `train` as arranged by attach, or None if the Trainer is left unchanged."""


def patch(trainer_class: type[Any]) -> None:
    """Attach to Trainers of a class, and of its subclasses, when they train; a class is patched once."""
    if hasattr(trainer_class.train, PREPARED):
        return
    order, make, train = Order.of_environment(), trainer_class.__init__, trainer_class.train

    @wraps(make)
    def made(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        order.mark("made")

    @wraps(train)
    def trained(self: Any, *arguments: Any, **options: Any) -> Any:
        run = train.__get__(self)
        if _is_planning(self):
            return run(*arguments, **options)
        if PREPARED not in vars(self):
            try:
                vars(self)[PREPARED] = prepared(self, run, order)
            except Exception as error:  # libraries of other versions
                order.mark("failed", reason=repr(error))
                tell(f"{type(self).__name__} trains as it is, without rankpilot: {type(error).__name__}: {error}")
                vars(self)[PREPARED] = None
        return (vars(self)[PREPARED] or run)(*arguments, **options)

    setattr(trained, PREPARED, True)
    trainer_class.__init__, trainer_class.train = made, trained


def prepared(trainer: Any, run: Callable[..., Any], order: Order) -> Callable[..., Any] | None:
    """Attach to a Trainer if it trains LoRA, and tell the user in one line.

    Args:
        trainer: about to train.
        run: the `train` of its base class.
        order: what to do.

    Returns:
        What to call for `run`; None if the Trainer is left as it is.

    Raises:
        SystemExit: nothing is attached, nor to be trained (`--dry`), or a budget in bytes cannot be kept.
    """
    kind = type(trainer).__name__
    attached = None
    if _attaches_itself(trainer):
        order.mark("own", trainer=kind)
        tell(f"the program attaches rankpilot to {kind} itself: its own options hold.")
    elif reason := why_not(trainer):
        order.mark("left", trainer=kind, reason=reason)
        tell(f"{kind} trains as it is: {reason}.")
    else:
        from .attempt import Attempt
        from .flags import in_words

        attempt = Attempt(trainer, run, order)
        attached = attempt.train if attempt.attached else None
        if attached:
            order.mark("attached", trainer=kind)
            would = "would attach" if order.dry else "attached"
            tell(f"{would} to {kind}: {attempt.subject}; {in_words(order.options)}.")
    if order.dry and not attached:
        raise SystemExit(0)
    return attached


def why_not(trainer: Any) -> str:
    """Return the reason why a Trainer does not train LoRA; empty if it does."""
    if trainer.model is None:  # a search makes it later
        return ""
    peft: Any = sys.modules.get("peft")  # if it is not loaded, no model has an adapter
    model = trainer.accelerator.unwrap_model(trainer.model)
    if peft is None or not isinstance(model, peft.PeftModel):
        return "its model has no PEFT adapter"
    kinds = sorted({str(getattr(each.peft_type, "value", each.peft_type)) for each in model.peft_config.values()})
    return "" if kinds == ["LORA"] else f"its adapter is {', '.join(kinds)}, not LoRA"


def _attaches_itself(trainer: Any) -> bool:
    module: Any = sys.modules.get("rankpilot.finetune.callback")
    return module is not None and any(
        isinstance(each, module.RankPilotCallback) for each in trainer.callback_handler.callbacks
    )


def _is_planning(trainer: Any) -> bool:
    """True if the script plans ahead (`rankpilot.allocate`), which begins training only to see its batches."""
    modules = {type(each).__module__ for each in trainer.callback_handler.callbacks}
    return "rankpilot.finetune.trainer_step" in modules
