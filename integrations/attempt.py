"""Attaches to the Trainer of an unmodified program, and lets go of it after a failure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..common.errors import BudgetError, RankPilotError, UnsupportedError
from ..common.processes import Processes
from ..cost.budget import Budget
from ..finetune.callback import RankPilotCallback, attach
from ..finetune.dry_run import begin_only
from ..finetune.step.put_back import random_states
from ..finetune.step.replicas import Replicas, rebuild_reducer
from ..lora.targets import find_target_modules, unwrap
from .flags import attach_options
from .order import Order, tell

PATIENCE = timedelta(minutes=2)
"""Time for all processes to report whether they failed. Beyond it one of them waits for another elsewhere."""

LATER_EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_train_end")

FINE, LEAVES, ENDS = range(3)


class Attempt:
    """Attaches to a Trainer; if attaching or rankpilot's part of the run fails, the run continues without it.

    Before the first step, adapters, optimizer and random numbers are restored, so losses equal those of the run alone.
    Later, ranks stay. If a budget in bytes cannot be kept, the process ends instead.

    Args:
        trainer: about to train.
        run: the `train` of its base class.
        order: the options of `attach`.

    Attributes:
        attached: False once it has failed.
        subject: the model and its target modules, in words.

    Raises:
        SystemExit: a budget in bytes cannot be kept.
    """

    def __init__(self, trainer: Any, run: Callable[..., Any], order: Order) -> None:
        self._trainer, self._run, self._order = trainer, run, order
        self._callback: RankPilotCallback | None = None
        self._attached_run, self._entered = run, False
        self.attached, self.subject = True, "the models of a search"
        self._guarded(self._attach)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as attach arranges it, or as the Trainer alone does once that has failed."""
        self._entered, put_back = False, random_states()
        try:
            return self._attached_run(*arguments, **options)
        except Exception as error:
            if self._entered or not self.attached:  # an error of the program, or of the run under way
                raise
            self._react(error)
        put_back()
        return self._run(*arguments, **options)

    def _attach(self) -> None:
        """Call `attach`, which wraps the Trainer's `train`: here the base class's; a subclass's is running."""
        if self._trainer.model is not None:  # a search makes it later
            model = unwrap(self._trainer.model)
            name, count = type(model.get_base_model()).__name__, len(find_target_modules(model))
            self.subject = f"{name}, {count} modules with LoRA"
        attributes = vars(self._trainer)
        before, attributes["train"] = attributes.get("train"), self._enter
        try:
            self._callback = attach(self._trainer, **attach_options(self._order.options))
            self._attached_run = attributes["train"]
        finally:
            del attributes["train"]
            if before is not None:
                attributes["train"] = before
        if self._order.dry:
            begin_only(self._callback, tell)
        replaced = {"on_train_begin": partial(self._guarded, self._callback.on_train_begin)}
        replaced |= {name: partial(self._watched, getattr(self._callback, name)) for name in LATER_EVENTS}
        self._callback.__dict__.update(replaced)

    def _enter(self, *arguments: Any, **options: Any) -> Any:
        self._entered = True
        return self._run(*arguments, **options)

    def _guarded(self, work: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Do some work before the first step; after an error, react to it in all processes."""
        put_back, configs = random_states(), self._configs()
        try:
            work(*arguments, **options)
        except Exception as error:
            self._react(error)
        else:
            self._react(None)
        if not self.attached:
            put_back()
            for config, settings in configs:  # as an ended run saves its ranks there
                vars(config).clear()
                vars(config).update(settings)

    def _watched(self, work: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Do some work during the run; after an error, which all processes share, react to it."""
        try:
            work(*arguments, **options)
        except Exception as error:
            self._react(error, as_found=False)

    def _react(self, error: Exception | None, *, as_found: bool = True) -> None:
        """Let go of the Trainer if there is an error in any process.

        Args:
            error: that of this process.
            as_found: also undo the first plan, since no step has passed.

        Raises:
            SystemExit: a budget in bytes cannot be kept.
            Exception: this error, if another process waits for this one, so that the run cannot go on.
        """
        own = FINE if error is None else ENDS if isinstance(error, BudgetError) and self._keeps_bytes else LEAVES
        result = most_of_all(own, error)
        if result == FINE:
            return
        reason = _in_words(error) if error else "it failed in another process"
        if result == ENDS:
            tell(f"error: {reason}")
            raise SystemExit(1)
        self._let_go(as_found)
        self._order.mark("failed", trainer=type(self._trainer).__name__, reason=reason)
        if self._order.dry:
            tell(f"{type(self._trainer).__name__} would train as it is, without rankpilot: {reason}")
            raise SystemExit(0)
        on = "trains as it is" if as_found else f"goes on from step {self._trainer.state.global_step}"
        tell(f"{type(self._trainer).__name__} {on}, without rankpilot: {reason}")

    def _let_go(self, as_found: bool) -> None:
        self.attached = False
        if callback := self._callback:
            callback.break_off(begins_again=as_found)
            handler = self._trainer.callback_handler  # an event is just going through its list
            handler.callbacks = [each for each in handler.callbacks if each is not callback]
            with suppress(UnsupportedError):  # wrappers under which ranks have not changed
                if as_found and (wrapper := Replicas.of(self._trainer.model_wrapped).wrapper):
                    rebuild_reducer(wrapper)  # or gradients of adapters that had another rank are not averaged

    def _configs(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return PEFT's configurations, each with a copy of its settings."""
        found = getattr(unwrap(self._trainer.model), "peft_config", {}) if self._trainer.model is not None else {}
        return [(config, copy.deepcopy(vars(config))) for config in found.values()]

    @property
    def _keeps_bytes(self) -> bool:
        given = self._order.options.get("budget")
        return given is not None and Budget.parse(given).kind in ("bytes", "total")


def most_of_all(number: int, error: Exception | None) -> int:
    """Return the largest of the numbers of all processes.

    Raises:
        Exception: the error passed in, if another process does not answer.
    """
    if Processes.of_this_run().count == 1:
        return number
    most = torch.tensor([number])
    try:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=dist.new_group(backend="gloo", timeout=PATIENCE))
    except RuntimeError as silence:
        raise error or silence from silence
    return int(most)


def _in_words(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, RankPilotError) else f"{type(error).__name__}: {text}".removesuffix(": ")
