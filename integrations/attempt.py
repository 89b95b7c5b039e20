"""Attaches to the Trainer of a program that knows nothing of it, and lets go if that fails."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..common.errors import BudgetError, RankPilotError
from ..cost.budget import Budget
from ..finetune.callback import RankPilotCallback, attach
from ..lora.targets import find_target_modules, unwrap
from .flags import attach_options
from .hook import tell
from .order import Order

PATIENCE = timedelta(minutes=2)
"""Time for all processes to report whether they failed. Beyond it one of them waits for another elsewhere."""

FINE, LEAVES, ENDS = range(3)


class Attempt:
    """Attaches to a Trainer. If that fails, or the beginning of the run under it, the run goes on as it is.

    Everything is then as it was: adapters, optimizer and random numbers, so losses equal those of the run alone. If a
    budget in bytes cannot be kept, the process ends instead.

    Args:
        trainer: about to train.
        run: the `train` of its base class.
        order: the options of `attach`.

    Attributes:
        attached: False once attaching, or the beginning of a run, has failed.

    Raises:
        SystemExit: a budget in bytes cannot be kept.
    """

    def __init__(self, trainer: Any, run: Callable[..., Any], order: Order) -> None:
        self._trainer, self._run, self._order = trainer, run, order
        self._callback: RankPilotCallback | None = None
        self._attached_run, self._entered = run, False
        self.attached = True
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

    @property
    def subject(self) -> str:
        """The model and its target modules, in words."""
        if self._trainer.model is None:
            return "each model of a search"
        model = unwrap(self._trainer.model)
        return f"{type(model.get_base_model()).__name__}, {len(find_target_modules(model))} modules with LoRA"

    def _attach(self) -> None:
        """Call `attach`, which wraps the Trainer's `train`: here that of the base class, since a subclass's has begun."""
        attributes = vars(self._trainer)
        before = {name: attributes[name] for name in ("train",) if name in attributes}
        attributes["train"] = self._enter
        try:
            self._callback = attach(self._trainer, **attach_options(self._order.options))
            self._attached_run = attributes["train"]
        finally:
            del attributes["train"]
            attributes.update(before)
        begin = self._callback.on_train_begin
        vars(self._callback)["on_train_begin"] = lambda *event, **objects: self._guarded(begin, *event, **objects)

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

    def _react(self, error: Exception | None) -> None:
        """Let go of the Trainer if there is an error in any process.

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
        self._let_go()
        self._order.mark("failed", trainer=type(self._trainer).__name__, reason=reason)
        tell(f"{type(self._trainer).__name__} trains as it is, without rankpilot: {reason}")

    def _let_go(self) -> None:
        self.attached = False
        if callback := self._callback:
            callback.break_off(begins_again=True)
            handler = self._trainer.callback_handler  # an event is just going through its list
            handler.callbacks = [each for each in handler.callbacks if each is not callback]

    def _configs(self) -> list[tuple[Any, dict[str, Any]]]:
        """PEFT's configurations, and what is in each now."""
        found = getattr(unwrap(self._trainer.model), "peft_config", {}) if self._trainer.model is not None else {}
        return [(config, copy.deepcopy(vars(config))) for config in found.values()]

    @property
    def _keeps_bytes(self) -> bool:
        given = self._order.options.get("budget")
        return given is not None and Budget.parse(given).kind in ("bytes", "total")


def random_states() -> Callable[[], None]:
    """Return a function that restores the present states of all random number generators."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


def most_of_all(number: int, error: Exception | None) -> int:
    """Return the largest of the numbers of all processes.

    Raises:
        Exception: the error passed in, if another process does not answer.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
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
