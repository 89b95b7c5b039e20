"""The run of a transformers Trainer: its training step, run as it runs, up to the loss, and followed while it trains.

The loss that a Trainer trains on is its own business: it may fuse the last layer with the loss (TRL's SFTTrainer), run
the model twice (DPO), weigh classes or smooth labels. So the Trainer's `training_step` itself is run; what it hands to
`accelerator.backward` is the loss, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..common.files import writing
from ..cost.batch_shape import Batch
from ..errors import UnsupportedError
from .evaluated_parts import Result
from .known_losses import EVALUATION, STEP, unknown_trainer
from .pilot import RankPilot
from .put_back import put_back
from .rollouts import Rollouts, makes_rollouts, refuse_answers, refuse_to_plan
from .run import TrainingRun, data_of, probe_rate

RESUME = "resume_from_checkpoint"
"""The first argument of `Trainer.train`."""

COUNTED_BY_CALL = ("_metrics", "_stored_metrics")
"""Where trainers of TRL note figures of each batch."""

_ABSENT: Any = object()


class StepListener(Protocol):
    """What hears of the steps of a Trainer."""

    pilot: RankPilot

    def take_batches(self, batches: list[Batch]) -> None:
        """Hear of an optimizer step's batches before the first is run."""

    def take_loss(self, loss: torch.Tensor) -> None:
        """Hear of a batch's loss as the Trainer counts it; those of one step add up to its mean."""

    def save_state(self, folder: Path) -> bool:
        """Hear of a checkpoint before it is written; whether it may be."""

    def break_off(self, begins_again: bool) -> None:
        """Hear of an error that ends the run, or lets the Trainer begin it again with smaller batches."""


class TrainerStep:
    """The training step of one Trainer.

    Args:
        trainer: the Trainer. Functions that its user has set on it, such as another `training_step`, are run as well,
            and are there again afterwards.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._ours: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}
        self.rollouts: Rollouts | None = None
        self._done: list[tuple[Any, ...]] = []  # batches of the optimiser step that is under way
        self._listener: StepListener
        self._counts: tuple[bool, ...] = ()

    def loss(self, batch: Batch, whole: Batch | None = None) -> torch.Tensor:
        """Run the Trainer's step on a batch up to its loss, which is not divided by the accumulated batches.

        Whatever the step writes into the Trainer, such as metrics and counters, is put back.

        Args:
            batch: what the step runs on.
            whole: the batch that it is a part of, whose predictions the loss is divided by; by default the batch.

        Raises:
            UnsupportedError: the step makes no loss of the batch.
        """
        trainer, losses = self.trainer, []
        with self._aside(lambda loss, **_: losses.append(loss)) as step:
            try:
                step(batch, whole or batch)
            except Exception:
                if not losses:  # what a step does after its backward pass may ask for gradients
                    raise
        if len(losses) != 1 or not losses[0].requires_grad:
            problem = (
                f"called `accelerator.backward` {len(losses)} times" if len(losses) != 1 else "has a constant loss"
            )
            raise UnsupportedError(
                f"The training step of {type(trainer).__name__} {problem}, so what it takes cannot be measured. Let "
                "`training_step` pass one loss, which depends on the model, to `self.accelerator.backward`, or drive "
                "`rankpilot.RankPilot` from a loop of your own."
            )
        loss: torch.Tensor = losses[0]
        return loss

    @contextmanager
    def aside(self) -> Iterator[Callable[[Batch, Batch, float], torch.Tensor]]:
        """Run whole training steps inside that are none of the run; see `TrainingRun.aside`."""
        backward, shares = self.trainer.accelerator.backward, [1.0]

        def scaled(loss: torch.Tensor, **options: Any) -> None:
            backward(shares[0] * loss, **options)

        def stepped(part: Batch, whole: Batch, share: float) -> torch.Tensor:
            shares[0] = share
            return step(part, whole)

        with self._aside(scaled) as step:
            yield stepped

    @contextmanager
    def _aside(self, backward: Callable[..., None]) -> Iterator[Callable[[Batch, Batch], torch.Tensor]]:
        """Yield the Trainer's step on a part of a batch; what it writes into the Trainer is put back afterwards.

        Args:
            backward: stands for the accelerator's.
        """
        trainer = self.trainer

        def step(batch: Batch, whole: Batch) -> torch.Tensor:
            copied = copy(batch) if isinstance(batch, Mapping) else batch  # a step may take out what it has read
            if self.rollouts:
                copied = self.rollouts.inputs(copied)
                trainer._prepare_inputs = lambda inputs: inputs
            _, count = trainer.get_batch_samples(iter([whole]), 1, trainer.args.device)
            loss: torch.Tensor = trainer.training_step(trainer.model_wrapped, copied, count)
            return loss

        with (
            put_back(trainer),
            self._unfollowed(),
            _standing(trainer.accelerator, "backward", backward),
            _standing(trainer.model, "generate", partial(refuse_answers, trainer)),
        ):
            trainer.current_gradient_accumulation_steps = 1
            trainer.log = lambda *_, **__: None  # what the step logs is no step of the run
            yield step

    def run(self, args: TrainingArguments, state: TrainerState, objects: Mapping[str, Any]) -> TrainingRun:
        """The run that begins.

        Args:
            args: of the event in which training begins.
            state: of that event.
            objects: model, optimiser, scheduler and loader of that event.

        Raises:
            ConfigError: the loader is no DataLoader, or its batches have no fixed number of examples.
            UnsupportedError: ranks cannot change inside a wrapper of the model.
        """
        self._counts = self._counts_now()
        dataset, collate, rows = data_of(objects["train_dataloader"], state.train_batch_size)
        if makes_rollouts(self.trainer):
            self.rollouts = Rollouts(self.trainer)
            dataset, collate, rows = self.rollouts.dataset, self.rollouts.collate, self.rollouts.rows
        return TrainingRun(
            model=objects["model"],
            optimizer=objects["optimizer"],
            loss=self.loss,
            dataset=dataset,
            collate=collate,
            rows=rows,
            total_steps=state.max_steps,
            accumulation=args.gradient_accumulation_steps,
            learning_rate=probe_rate(objects["model"], objects["optimizer"]),
            folder=Path(args.output_dir),
            evaluations=_evaluations(args, state),
            in_parts=True,
            whole=self._whole,
            part_loss=self.loss,
            foreign=partial(self._foreign, STEP),
            stepping=self.aside,
            wrapped=self.trainer.model_wrapped,
            scheduler=objects["lr_scheduler"],
        )

    def _foreign(self, methods: Sequence[str]) -> str:
        """Why the loss of this Trainer is not known; see `unknown_trainer`."""
        if self._counts != self._counts_now():
            return "the loss counts otherwise than before training"
        ours = {name: self._before[name] for name, own in self._ours.items() if vars(self.trainer).get(name) is own}
        return unknown_trainer(
            self.trainer, methods, {name: None if before is _ABSENT else before for name, before in ours.items()}
        )

    def _counts_now(self) -> tuple[bool, ...]:
        """What decides how the losses of parts add up."""
        trainer = self.trainer
        return trainer.label_smoother is None, bool(trainer.model_accepts_loss_kwargs)

    @property
    def _whole(self) -> str:
        """Why steps of this Trainer run as a whole; empty where nothing speaks against parts."""
        if self.rollouts:
            return f"{type(self.trainer).__name__} makes its batches in its steps"
        searches = self.trainer.args.auto_find_batch_size
        return "auto_find_batch_size begins again with smaller batches where memory runs out" if searches else ""

    def around_training(
        self, follows: Callable[[], bool], prepare: Callable[[Any], Any], break_off: Callable[[], None]
    ) -> None:
        """Call functions before this Trainer trains, and after an error in it, from now on.

        A callback hears nothing before a checkpoint has been loaded, which is too late to choose it, and nothing of an
        error.

        Args:
            follows: whether the others are to be called.
            prepare: gets what `train` is asked to resume from, and returns what it resumes from.
            break_off: called after an error.
        """
        run = self.trainer.train

        def train(*arguments: Any, **options: Any) -> Any:
            if not follows():
                return run(*arguments, **options)
            first, *rest = arguments or (options.pop(RESUME, None),)
            try:
                checkpoint = prepare(first)
                return run(checkpoint, *rest, **options) if checkpoint or rest else run(**options)
            except BaseException:
                break_off()
                raise

        self.trainer.train = train

    def follow(self, listener: StepListener) -> None:
        """Follow the real steps.

        Args:
            listener: hears of the run's steps. Its pilot's figures go into each log entry that has a training loss, and
                so to all trackers.
        """
        self._listener = listener
        self._replace("get_batch_samples", self._get_batch_samples)
        self._replace("training_step", self._training_step)
        self._replace("log", self._log)
        if self.rollouts:
            self._replace("_prepare_inputs", self._prepare_inputs)
        elif listener.pilot.guard.parts.on:
            self._replace("prediction_step", self._prediction_step)
        self._replace("_save_checkpoint", self._save_checkpoint)

    def _get_batch_samples(self, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        self._done.clear()
        if self.rollouts is None:
            self._listener.take_batches(result[0])
        return result

    def _prepare_inputs(self, run: Callable[..., Any], inputs: Any) -> Any:
        with self._listener.pilot.aside():
            result = run(inputs)
        if self.rollouts and self.trainer.model.training and len(self._done) == 1:
            self._listener.take_batches(self.rollouts.of_this_step())
        return result

    def _training_step(
        self, run: Callable[..., Any], model: Any, inputs: Any, *rest: Any, **options: Any
    ) -> torch.Tensor:
        """Run a batch. After an out-of-memory error, all batches of the step so far run once more.

        Where the Trainer looks for its batch size, that goes first.
        """
        self._done.append((model, inputs, *rest))
        begins_again, again = self.trainer.args.auto_find_batch_size, self._listener.pilot.out_of_memory
        loss: torch.Tensor
        try:
            if begins_again or self.rollouts:  # answers are not made twice
                loss = run(model, inputs, *rest, **options)
            else:
                loss = _retried(lambda step: self._in_parts(run, step, options), self._done, again)
        except BaseException as error:
            self._listener.break_off(begins_again and should_reduce_batch_size(error))
            raise
        self._listener.take_loss(loss)
        return loss

    def _in_parts(self, run: Callable[..., Any], step: tuple[Any, ...], options: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a batch that runs in parts, whose losses and gradients add up to those of the batch."""
        model, inputs, *rest = step
        accelerator, losses, pilot = self.trainer.accelerator, list[torch.Tensor](), self._listener.pilot
        backward = accelerator.backward
        for part, share in pilot.parts(inputs):
            copied = copy(part) if isinstance(part, Mapping) else part  # a step may take out what it has read
            scaled = partial(_scaled, backward, pilot.hear_loss, share)
            with _standing(accelerator, "backward", scaled) if pilot.guard.parts.on else nullcontext():
                losses.append(run(model, copied, *rest, **options))
            if share != 1:
                losses[-1] = losses[-1] * share
            del part, copied  # before the next one is there
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _prediction_step(
        self, run: Callable[..., Result], model: Any, inputs: Any, *rest: Any, **options: Any
    ) -> Result:
        """Evaluate a batch in parts."""
        by_call, guard = any(vars(self.trainer).get(name) for name in COUNTED_BY_CALL), self._listener.pilot.guard
        whole = f"{type(self.trainer).__name__} shows means over them" if by_call else ""
        whole = "the model is sharded" if guard.plan.run.replicas.sharded else whole
        unknown = self._foreign(EVALUATION)
        return guard.evaluated.run(lambda part: run(model, part, *rest, **options), inputs, whole, unknown)

    def _log(self, run: Callable[..., Any], logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Log with the figures of the ranks, and the rate that steps really have."""
        run({**logs, **(self._listener.pilot.figures() if "loss" in logs else {})}, *rest, **options)

    def _save_checkpoint(self, run: Callable[..., Any], model: Any, trial: Any = None) -> None:
        folder = Path(self.trainer._get_output_dir(trial=trial)) / f"checkpoint-{self.trainer.state.global_step}"
        if self._listener.save_state(folder):
            with writing(folder):
                run(model, trial)

    def prepare_new_models(self, prepare: Callable[[Any], Any]) -> None:
        """Let a function see each model that `model_init` makes, before a checkpoint is loaded into it."""
        make = type(self.trainer).call_model_init.__get__(self.trainer)

        def made(trial: Any = None) -> Any:
            model = make(trial)
            prepare(model)
            return model

        self.trainer.call_model_init = made

    def take_no_more(self) -> None:
        """Give the Trainer no more batches: when it resumes a run that has all its steps, it would train one more."""
        self._replace("get_batch_samples", lambda *_, **__: ([], None))

    def follow_evaluations(self, evaluate: Callable[[Callable[[], Any]], Any]) -> None:
        """Let a function run the Trainer's evaluations, which it gets as a function without arguments."""
        self._replace("evaluate", lambda run, *arguments, **options: evaluate(partial(run, *arguments, **options)))

    def release(self) -> None:
        """Stop following."""
        attributes = vars(self.trainer)
        for name, before in self._before.items():
            if attributes.get(name) is self._ours[name]:  # else someone has replaced it since, and may call ours still
                _put_back(attributes, name, before)
        self._ours.clear()
        self._before.clear()

    @contextmanager
    def _unfollowed(self) -> Iterator[None]:
        """Let our functions only call those of the Trainer: a step that is measured is none of the run."""
        ours, self._ours = self._ours, {}
        try:
            yield
        finally:
            self._ours = ours

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        """Let a function, which gets the Trainer's as its first argument, stand for that one until `release`."""
        attributes, run = vars(self.trainer), getattr(self.trainer, name)
        self._before.setdefault(name, attributes.get(name, _ABSENT))

        def ours(*arguments: Any, **options: Any) -> Any:
            function_now = partial(function, run) if self._ours.get(name) is ours else run
            return function_now(*arguments, **options)

        self._ours[name] = attributes[name] = ours


def _evaluations(args: TrainingArguments, state: TrainerState) -> int:
    """How many evaluations a run makes."""
    every = {"steps": state.eval_steps, "epoch": state.max_steps / max(state.num_train_epochs, 1)}
    each = every.get(str(getattr(args.eval_strategy, "value", args.eval_strategy)))
    return int(state.max_steps / each) if each else 0


@contextmanager
def _standing(thing: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand for one of an object's."""
    attributes = vars(thing)
    before, attributes[name] = attributes.get(name, _ABSENT), function
    try:
        yield
    finally:
        _put_back(attributes, name, before)


def _put_back(attributes: dict[str, Any], name: str, before: Any) -> None:
    """Set an attribute of an object as it was, or remove it if it was not there."""
    if before is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = before


def _scaled(
    backward: Callable[..., None],
    hear: Callable[[torch.Tensor], None],
    share: float,
    loss: torch.Tensor,
    **options: Any,
) -> None:
    """Take the gradients of a share of a loss, after it was heard."""
    hear(loss)
    backward(loss if share == 1 else loss * share, **options)


def _retried(
    run: Callable[[tuple[Any, ...]], torch.Tensor],
    steps: list[tuple[Any, ...]],
    again: Callable[[torch.OutOfMemoryError], None],
) -> torch.Tensor:
    """The loss of the last of these steps; after an out-of-memory error all of them run once more.

    Args:
        run: runs one of them.
        steps: the batches of an optimiser step so far.
        again: prepares that, or raises the error that it gets.
    """
    try:
        return run(steps[-1])
    except torch.OutOfMemoryError as caught:
        error = caught
    while True:
        again(error)
        try:
            return [run(step) for step in steps][-1]
        except torch.OutOfMemoryError as caught:
            clear_frames(caught.__traceback__)  # they hold the tensors of the step


def add_before_users(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before those of users, which may copy parameters when training begins: by then ranks changed."""
    callbacks = trainer.callback_handler.callbacks
    users = (at for at, one in enumerate(callbacks) if not type(one).__module__.startswith("transformers."))
    callbacks.insert(next(users, len(callbacks)), callback)


def run_of_trainer(trainer: Trainer) -> TrainingRun:
    """The run that `trainer.train()` would begin: its step, its optimiser and its data.

    The Trainer is ready to run steps afterwards, and its own callbacks have heard of nothing.
    """
    refuse_to_plan(trainer)
    handler, finder = trainer.callback_handler, _Finder(trainer)
    callbacks, handler.callbacks = handler.callbacks, [finder]  # alone, so that no tracker opens a run
    try:
        trainer.train()
    except _FoundError:
        return finder.run
    finally:
        handler.callbacks = callbacks
    raise AssertionError("training begins with an event")


class _FoundError(Exception):
    """Ends `Trainer.train` before the first step."""


class _Finder(TrainerCallback):  # type: ignore[misc]
    """Notes the run that begins, and ends it."""

    run: TrainingRun

    def __init__(self, trainer: Trainer) -> None:
        self._step = TrainerStep(trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **objects: Any) -> None:
        self.run = self._step.run(args, state, objects)
        raise _FoundError
