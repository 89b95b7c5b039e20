"""The run of a transformers Trainer: its own training step, run up to the loss, and followed during training.

A Trainer computes its loss in its own way: it may fuse the last layer with the loss (TRL's SFTTrainer), run the model
twice (DPO), weigh classes or smooth labels. So this module runs the Trainer's `training_step` itself; the argument of
`accelerator.backward` is the loss, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..common.errors import UnsupportedError
from ..common.files import writing
from ..cost.batch_shape import Batch
from .pilot import RankPilot
from .rollouts import Answers, Rollouts, makes_rollouts, meeting_answers, refuse_answers, refuse_to_plan
from .step.known_losses import STEP, unknown_trainer
from .step.put_back import ReplacedMethods, put_back, standing
from .step.run import TrainingRun, data_of, probe_rate

RESUME = "resume_from_checkpoint"
"""First argument of `Trainer.train`."""


class StepListener(Protocol):
    """Interface of a listener to the steps of a Trainer."""

    pilot: RankPilot

    def take_batches(self, batches: list[Batch]) -> None:
        """Take the batches of an optimizer step before the first one runs."""

    def take_loss(self, loss: torch.Tensor) -> None:
        """Take a batch's loss as the Trainer counts it; the losses of one step add up to its mean."""

    def save_state(self, folder: Path) -> bool:
        """Prepare for a checkpoint before it is written; return True if it may be."""

    def break_off(self, begins_again: bool) -> None:
        """Handle an error that ends the run, or makes the Trainer restart it with smaller batches."""


class TrainerStep:
    """The training step of one Trainer.

    Args:
        trainer: the Trainer. Functions set on it by the user, such as another `training_step`, still run, and are
            restored afterwards.

    Attributes:
        methods: the Trainer's replaced methods.
        rollouts: creates the batches of a Trainer that makes them in its steps; None for others.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.methods = trainer, ReplacedMethods(trainer)
        self.rollouts: Rollouts | None = None
        self._counts: tuple[Any, ...] = ()

    def loss(self, batch: Batch, whole: Batch | None = None) -> torch.Tensor:
        """Run the Trainer's step on a batch up to its loss, not divided by the number of accumulated batches.

        Anything the step writes into the Trainer, such as metrics and counters, is restored.

        Args:
            batch: the input of the step.
            whole: the batch it is a part of, whose predictions the loss is divided by; by default the batch.

        Raises:
            UnsupportedError: the step computes no loss of the batch.
        """
        trainer, losses = self.trainer, list[torch.Tensor]()
        copied, whole = copy(batch) if isinstance(batch, Mapping) else batch, whole or batch  # a step may pop entries
        with (
            put_back(trainer),
            self.methods.paused(),
            standing(trainer.accelerator, "backward", lambda loss, **_: losses.append(loss)),
            standing(trainer.model, "generate", partial(refuse_answers, trainer)),
        ):
            trainer.current_gradient_accumulation_steps = 1
            trainer.log = lambda *_, **__: None  # such a log is no step of the run
            if self.rollouts:
                copied = self.rollouts.inputs(copied, whole)
                trainer._prepare_inputs = lambda inputs: inputs
            _, count = trainer.get_batch_samples(iter([whole]), 1, trainer.args.device)
            try:
                trainer.training_step(trainer.model_wrapped, copied, count)
            except Exception:
                if not losses:  # code after the backward pass may need gradients
                    raise
        if len(losses) != 1 or not losses[0].requires_grad:
            problem = (
                f"called `accelerator.backward` {len(losses)} times" if len(losses) != 1 else "has a constant loss"
            )
            raise UnsupportedError(
                f"The training step of {type(trainer).__name__} {problem}, so its memory cannot be measured. "
                "`training_step` must pass a single loss that depends on the model to "
                "`self.accelerator.backward`; otherwise drive `rankpilot.RankPilot` from your own loop."
            )
        loss: torch.Tensor = losses[0]
        return loss

    def run(self, args: TrainingArguments, state: TrainerState, objects: Mapping[str, Any]) -> TrainingRun:
        """Return the run about to begin.

        Args:
            args: arguments of the event at the start of training.
            state: state of that event.
            objects: model, optimizer, scheduler and loader of that event.

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
            generates=self.rollouts is not None,
            whole=self._whole,
            part_loss=self.loss,
            foreign=partial(self.foreign, STEP),
            wrapped=self.trainer.model_wrapped,
            scheduler=objects["lr_scheduler"],
        )

    def foreign(self, methods: Sequence[str]) -> str:
        """Return why the loss of this Trainer is not known; see `unknown_trainer`."""
        if self._counts != self._counts_now():
            return "the loss has changed since before training"
        unknown = unknown_trainer(self.trainer, methods, self.methods.before())
        return unknown or (meeting_answers(self.trainer) if self.rollouts else "")

    def _counts_now(self) -> tuple[Any, ...]:
        """Return the settings that decide how the losses of parts add up."""
        trainer = self.trainer
        names = "loss_type", "importance_sampling_level"  # of GRPO
        return trainer.label_smoother is None, bool(trainer.model_accepts_loss_kwargs), *map(vars(trainer).get, names)

    @property
    def _whole(self) -> str:
        """The reason why steps of this Trainer run whole; empty if nothing prevents parts."""
        searches = self.trainer.args.auto_find_batch_size
        return "auto_find_batch_size restarts with smaller batches when memory runs out" if searches else ""

    def around_training(
        self, follows: Callable[[], bool], prepare: Callable[[Any], Any], break_off: Callable[[], None]
    ) -> None:
        """From now on, call functions before this Trainer trains, and after an error in it.

        A callback gets no event before a checkpoint is loaded, too late to choose it, and none on an error.

        Args:
            follows: returns True if the others are to be called.
            prepare: takes the checkpoint argument of `train`, and returns the one to resume from.
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
            listener: gets the run's steps. Its pilot's figures go into each log entry with a training loss, and so to
                all trackers.
        """
        _Followed(self, listener).begin()

    def prepare_new_models(self, prepare: Callable[[Any], Any]) -> None:
        """Apply a function to each new model of `model_init`, before a checkpoint is loaded into it."""
        make = type(self.trainer).call_model_init.__get__(self.trainer)

        def made(trial: Any = None) -> Any:
            model = make(trial)
            prepare(model)
            return model

        self.trainer.call_model_init = made


class _Followed:
    """The real steps of a Trainer.

    Args:
        step: the step of the Trainer.
        listener: gets the steps.
    """

    def __init__(self, step: TrainerStep, listener: StepListener) -> None:
        self._step, self._trainer, self._rollouts, self._listener = step, step.trainer, step.rollouts, listener
        self._done: list[tuple[Any, ...]] = []  # batches of the current optimizer step that began
        self._batches: list[Batch] = []  # all of them

    def begin(self) -> None:
        """Replace the methods that a step calls."""
        replace = self._step.methods.replace
        replace("get_batch_samples", self._get_batch_samples)
        replace("training_step", self._training_step)
        replace("log", self._log)
        if self._rollouts:
            replace("_prepare_inputs", self._prepare_inputs)
        replace("_save_checkpoint", self._save_checkpoint)

    def _get_batch_samples(self, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        self._done.clear()
        self._batches = result[0]
        if self._rollouts is None:
            self._listener.take_batches(result[0])
        return result

    def _prepare_inputs(self, run: Callable[..., Any], inputs: Any) -> Any:
        with self._listener.pilot.guard.aside():
            result = run(inputs)
        if self._rollouts and self._trainer.model.training and len(self._done) == 1:
            self._listener.take_batches(self._rollouts.of_this_step())
        return result

    def _training_step(
        self, run: Callable[..., Any], model: Any, inputs: Any, *rest: Any, **options: Any
    ) -> torch.Tensor:
        """Run a batch. After an out-of-memory error, repeat all batches of the step so far.

        The Trainer's own search for a batch size takes precedence.
        """
        if not self._done and not self._rollouts:
            self._run_lanes(run, model, rest, options)
        self._done.append((model, inputs, *rest))
        begins_again, pilot = self._trainer.args.auto_find_batch_size, self._listener.pilot
        loss: torch.Tensor
        try:
            if begins_again or (self._rollouts and not pilot.guard.parts.on):  # answers are not generated twice
                loss = run(model, inputs, *rest, **options)
            else:
                if self._rollouts:
                    self._done[-1] = (model, Answers.generated(self._trainer, model, inputs), *rest)
                loss = _retried(lambda step: self._in_parts(run, step, options), self._done, pilot.out_of_memory)
        except BaseException as error:
            self._listener.break_off(begins_again and should_reduce_batch_size(error))
            raise
        self._listener.take_loss(loss)
        return loss

    def _run_lanes(self, run: Callable[..., Any], model: Any, rest: Any, options: Mapping[str, Any]) -> None:
        """Run the whole optimizer step for each lane of a race other than the run itself, as the Trainer does."""
        trainer, pilot = self._trainer, self._listener.pilot
        accelerator, most = trainer.accelerator, trainer.args.max_grad_norm
        begins = accelerator.sync_gradients
        for batches, others in pilot.lanes((self._batches, rest), accelerator.scaler):
            if not pilot.beside:
                return
            done, losses = list[tuple[Any, ...]](), list[torch.Tensor]()
            with put_back(trainer):
                for inputs in batches:
                    last = len(losses) + 1 == len(batches)
                    accelerator.gradient_state._set_sync_gradients(last)
                    done.append((model, inputs, *others))
                    with nullcontext() if last else accelerator.no_sync(model):
                        losses.append(
                            _retried(lambda step: self._in_parts(run, step, options), done, pilot.out_of_memory)
                        )
                if most and most > 0:
                    accelerator.clip_grad_norm_(model.parameters(), most)
                pilot.before_optimizer_step(torch.stack([loss.detach() for loss in losses]).sum())
                trainer.optimizer.step()
                model.zero_grad()
            accelerator.gradient_state._set_sync_gradients(begins)

    def _in_parts(self, run: Callable[..., Any], step: tuple[Any, ...], options: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of a batch run in parts, whose losses and gradients add up to those of the batch."""
        model, inputs, *rest = step
        accelerator, losses, pilot = self._trainer.accelerator, list[torch.Tensor](), self._listener.pilot
        backward, answers = accelerator.backward, inputs if isinstance(inputs, Answers) else None
        with answers.counted_once() if answers else nullcontext() as begin:
            for part, share in pilot.parts(answers.batch if answers else inputs):
                copied = copy(part) if isinstance(part, Mapping) else part  # a step may pop entries
                scaled, undo = partial(_scaled, backward, share), ExitStack()
                if pilot.guard.parts.on:
                    undo.enter_context(standing(accelerator, "backward", scaled))
                if answers and begin:
                    copied, part = answers.of_part(part), None  # the copy has its tensors
                    begin(copied)
                    undo.enter_context(standing(self._trainer, "_prepare_inputs", lambda inputs: inputs))
                with undo:
                    losses.append(run(model, copied, *rest, **options))
                if share != 1:
                    losses[-1] = losses[-1] * share
                del part, copied  # before the next one exists
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _log(self, run: Callable[..., Any], logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Log with the figures of the ranks and the actual learning rate of steps."""
        run({**logs, **(self._listener.pilot.figures() if "loss" in logs else {})}, *rest, **options)

    def _save_checkpoint(self, run: Callable[..., Any], model: Any, trial: Any = None) -> None:
        folder = Path(self._trainer._get_output_dir(trial=trial)) / f"checkpoint-{self._trainer.state.global_step}"
        if self._listener.save_state(folder):
            with writing(folder):
                run(model, trial)


def _evaluations(args: TrainingArguments, state: TrainerState) -> int:
    """Return the number of evaluations in a run."""
    every = {"steps": state.eval_steps, "epoch": state.max_steps / max(state.num_train_epochs, 1)}
    each = every.get(str(getattr(args.eval_strategy, "value", args.eval_strategy)))
    return int(state.max_steps / each) if each else 0


def _scaled(backward: Callable[..., None], share: float, loss: torch.Tensor, **options: Any) -> None:
    """Compute the gradients of a share of a loss."""
    backward(loss if share == 1 else loss * share, **options)


def _retried(
    run: Callable[[tuple[Any, ...]], torch.Tensor],
    steps: list[tuple[Any, ...]],
    again: Callable[[torch.OutOfMemoryError], None],
) -> torch.Tensor:
    """Return the loss of the last of these steps; after an out-of-memory error, repeat all of them.

    Args:
        run: runs one of them.
        steps: the batches of an optimizer step so far.
        again: prepares the repetition, or raises the error passed to it.
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
            clear_frames(caught.__traceback__)  # frames hold the tensors of the step


def add_before_users(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before the user's, which may copy parameters when training begins: ranks have then changed."""
    callbacks = trainer.callback_handler.callbacks
    users = (at for at, one in enumerate(callbacks) if not type(one).__module__.startswith("transformers."))
    callbacks.insert(next(users, len(callbacks)), callback)


def run_of_trainer(trainer: Trainer) -> TrainingRun:
    """Return the run that `trainer.train()` would begin: its step, its optimizer and its data.

    The Trainer is then ready to run steps, and its own callbacks have received no event.
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
    raise AssertionError("training starts with an event")


class _FoundError(Exception):
    """Ends `Trainer.train` before the first step."""


class _Finder(TrainerCallback):  # type: ignore[misc]
    """Records the run about to begin, and ends it."""

    run: TrainingRun

    def __init__(self, trainer: Trainer) -> None:
        self._step = TrainerStep(trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **objects: Any) -> None:
        self.run = self._step.run(args, state, objects)
        raise _FoundError
