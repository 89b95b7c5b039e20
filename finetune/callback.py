"""Entry point for the transformers Trainer: a policy decides the ranks of a real fine-tune."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import BudgetError, ConfigError, DataError, UnsupportedError
from ..common.processes import Processes
from ..cost.batch_shape import Batch
from ..cost.savers.exact import graphs_per_plan
from ..decide.applier import PlanApplier
from ..decide.log import DecisionLog
from ..decide.policy import Policy
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import let_train, resizable_targets
from ..lora.spec import Scaling
from .checkpoint import chosen_checkpoint, load_state, save_state
from .options import GivenOptions, PilotOptions
from .pilot import RankPilot
from .rollouts import left_alone, makes_rollouts
from .step.replicas import check_arguments
from .trainer_step import TrainerStep, add_before_users

logger = logging.getLogger(__name__)


EVALUATION_ROOM = 0.5
"""Share of the budget targeted by a smaller evaluation batch, since not all of its memory shrinks with it."""


_WITHOUT_TRAINER = (
    "A RankPilotCallback works only with the Trainer it was created for. Create the Trainer without "
    'it, then call `rankpilot.attach(trainer, budget="80%")` with the arguments of the '
    "callback."
)

WITH_LIGER = "Steps are measured with Liger's kernels; exact savers with no benefit on top of its fused loss are off."


def attach(
    trainer: Trainer, policy: str | Path | Policy | None = None, options: GivenOptions = None, **changes: Any
) -> RankPilotCallback:
    """Keep a Trainer's runs inside a hard budget of memory; call this before `train`.

    Before the first step it measures the cost of plans in the Trainer's own training step, on its data. By default the
    LoRA stays as configured, and what loses nothing makes it fit: exact savers, batches in parts, checkpointed layers,
    a streamed base; ranks shrink only where nothing else helps. A policy chooses the ranks instead, and again at later
    steps if its schedule has any: adapters are physically resized, the optimizer keeps its state, and plain PEFT can
    load every checkpoint. Adapters that are already trained are kept. `train(resume_from_checkpoint=True)` picks the
    last complete checkpoint.

    Args:
        trainer: a transformers or TRL Trainer, with a PEFT model.
        policy: None, to keep the ranks of the LoraConfig, or what chooses others; see `RankPilot`.
        options: all options, or the budget alone.
        changes: single options by name; see `PilotOptions`.

    Returns:
        The callback, already added to the Trainer ahead of the user's own: a callback that copies parameters when
        training begins finds the ranks of the first plan.

    Raises:
        UnsupportedError: another such callback decides its ranks, or its model has no adapter of a known kind.
        DataError: its training set is empty.
        ConfigError, UnknownNameError, PolicyFileError, BudgetError: an argument is invalid. `Trainer.train` then raises
            the errors of `RankPilot.begin` and its other methods.

    Example:
        >>> rankpilot.attach(trainer, budget="80%")  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        kind = trainer.__name__ if isinstance(trainer, type) else f"a {type(trainer).__name__}"
        raise ConfigError(
            f"attach takes an existing Trainer from transformers or TRL; got {kind}. For your own training "
            "loop use `rankpilot.RankPilot`, for a LoraConfig only `rankpilot.allocate`."
        )
    if any(isinstance(one, RankPilotCallback) for one in trainer.callback_handler.callbacks):
        raise UnsupportedError("This Trainer already has a RankPilotCallback. Call attach only once.")
    callback = RankPilotCallback(trainer, policy, options, **changes)
    add_before_users(trainer, callback)
    return callback


class RankPilotCallback(TrainerCallback):  # type: ignore[misc]
    """Decides the LoRA rank of each module in a Trainer's runs; created by `attach`.

    Args:
        trainer: the only Trainer whose ranks it decides.
        policy: the policy, in any form that `attach` takes.
        options: all options, or the budget alone.
        changes: single options by name.

    Attributes:
        trainer: as above.
        pilot: decides the ranks.
        keeps_log: False if this run has no decision log.

    Raises:
        ConfigError: there is no Trainer; plus all errors of `attach`.
    """

    trainer: Trainer

    def __init__(
        self,
        trainer: Trainer | None = None,
        policy: str | Path | Policy | None = None,
        options: GivenOptions = None,
        **changes: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise ConfigError(_WITHOUT_TRAINER)
        self.trainer = trainer
        self._options = PilotOptions.of(options, changes)
        if makes_rollouts(trainer):
            policy, self._options = left_alone(trainer, policy, self._options)
        tell, progress = partial(tell_beside_bar, trainer), partial(bar_of_trainer, trainer)
        self.pilot: RankPilot = RankPilot(policy, self._options, tell=tell, progress=progress)
        self.keeps_log = True
        self._step = TrainerStep(trainer)
        self._resumed: Path | None = None
        self._batches: list[Batch] = []
        self._loss: torch.Tensor | float = 0.0
        self._between_steps, self._save_later = True, False
        self._evaluations = Evaluations(trainer, self.pilot)
        ready_to_train(trainer, self._options.scaling)
        if trainer.model_init is not None:
            self._step.prepare_new_models(lambda model: resizable_targets(model, self._options.scaling))
        self._step.around_training(
            lambda: self in trainer.callback_handler.callbacks, self._before_training, self.break_off
        )

    @property
    def applier(self) -> PlanApplier[PeftAdapters] | None:
        """Observes the adapters and changes their ranks; None before training."""
        return self.pilot.applier

    @property
    def predictions(self) -> list[tuple[int, float]]:
        """(step, cost of the plan) of each decision."""
        return self.pilot.predictions

    @property
    def peaks(self) -> list[tuple[int, int]]:
        """(step, peak bytes) of each measured step."""
        return self.pilot.peaks

    @property
    def limit(self) -> float:
        """Maximum cost of a plan, in bytes or parameters. Known once training begins."""
        return self.pilot.limit

    # The events of a run, in order ------------------------------------------------------------------------------------

    def _before_training(self, resume: Any) -> str | bool | None:
        """Prepare to load a checkpoint; return the one to resume from, as `train` takes it."""
        ready_to_train(self.trainer, self._options.scaling)
        output = self.trainer.args.output_dir
        chosen = Processes.of_this_run().on_first(lambda: chosen_checkpoint(resume, output))
        self._resumed = Path(chosen) if isinstance(chosen, str) else None
        return chosen

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Prepare the run and take the first decision, or resume from a checkpoint."""
        if state is not self.trainer.state:
            raise ConfigError(_WITHOUT_TRAINER)
        check_arguments(args)
        step, pilot = self._step, self.pilot
        step.methods.release()
        schedule_steps = pilot.schedule.steps(state.max_steps) if state.max_steps > 0 else ()
        warn_of_recompiles(objects["model"], args, 1 + sum(at > state.global_step for at in schedule_steps))
        pilot.seed = args.seed if self._options.seed is None else self._options.seed
        if self._options.log is None or not self.keeps_log:
            pilot.journal.log = self._default_log() if self.keeps_log else None
        run, name = step.run(args, state, objects), Path(args.output_dir).name
        if state.global_step > 0:
            folder = self._resumed or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            pilot.load_state_dict(run, load_state(folder), name=name)
            if absent := [kind for kind in ("rng_state", "optimizer", "scheduler") if not any(folder.glob(f"{kind}*"))]:
                pilot.journal.note(f"{folder.name} has no {', '.join(absent)}; continuing without.")
        else:
            pilot.begin(run, name=name)
        if args.use_liger_kernel:
            pilot.journal.note(WITH_LIGER)
        step.follow(self)
        if not step.rollouts:
            step.methods.replace("evaluate", self._evaluations.run)
            self._evaluations.expect()
        self._between_steps, self._save_later = True, False
        if state.global_step >= state.max_steps:
            # On resuming a finished run, the Trainer would train one more batch.
            step.methods.replace("get_batch_samples", lambda *_, **__: ([], None))
            control.should_training_stop = True

    def on_step_begin(self, *event: Any, **objects: Any) -> None:
        """Decide if a decision is due, inspect the step's batches, and measure the step if due.

        If batches are generated inside the step, all this waits for them.

        Raises:
            BudgetError: no plan fits the batches, or the memory left; the run is saved first.
            ConfigError: the budget function fails; the run is saved first.
        """
        self._loss = 0.0
        if not self._step.rollouts:
            self._begin_step()

    def _begin_step(self) -> None:
        with self._saved_on_error():
            self.pilot.before_step(*self._batches)

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save the run if it ends because no plan fits any more, or because the budget is unknown."""
        args, state = self.trainer.args, self.trainer.state
        try:
            yield
        except (BudgetError, ConfigError) as error:
            if not state.global_step:
                raise
            self._between_steps = True  # adapters and optimizer are in the state of a complete step
            self.trainer._save_checkpoint(self.trainer.model, None)
            raise type(error)(
                f"{error} Step {state.global_step} is saved in {args.output_dir}. Pass "
                "resume_from_checkpoint=True to continue."
            ) from error

    def on_pre_optimizer_step(self, *event: Any, **objects: Any) -> None:
        """Read the gradients, which are now complete."""
        self._between_steps = False
        self.pilot.before_optimizer_step(self._loss)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **objects: Any) -> None:
        """Compare the peak with the budget. A due decision waits for the start of the next step, if there is one.

        Raises:
            BudgetError: the step exceeded the budget, and no plan fits; the run is saved first.
        """
        with self._saved_on_error():
            self.pilot.after_step(decide=False)
        self._between_steps = True
        if self._save_later:
            control.should_save, self._save_later = True, False

    def on_train_end(self, *event: Any, **objects: Any) -> None:
        """Stop measuring, and write the ranks to PEFT's configuration: the best checkpoint may have been loaded."""
        self._step.methods.release()
        self._evaluations.put_back()
        self.pilot.finish()

    # Handlers of the events -------------------------------------------------------------------------------------------

    def _default_log(self) -> DecisionLog:
        trainer = self.trainer  # each trial of a search has its own folder
        return DecisionLog(Path(trainer._get_output_dir(getattr(trainer, "_trial", None))) / "decisions")

    def break_off(self, begins_again: bool = False) -> None:
        """Stop measuring and following the Trainer after an error.

        Args:
            begins_again: True if the Trainer restarts the run with a smaller batch.
        """
        self._between_steps, self._save_later = True, False
        try:
            self.pilot.break_off(as_found=begins_again)
        finally:
            self._step.methods.release()
            self._evaluations.put_back()

    def take_batches(self, batches: list[Batch]) -> None:
        """Take the batches of the optimizer step about to begin, before the first one runs."""
        self._batches = batches
        if self._step.rollouts:
            self._begin_step()

    def take_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a batch to that of its optimizer step."""
        self._loss = self._loss + loss

    def save_state(self, checkpoint: Path) -> bool:
        """Write the state of this callback into a checkpoint, before the Trainer writes its files.

        The checkpoint is then complete when the Trainer deletes older ones. Other callbacks may request one before this
        callback sees the end of the step; the save is then slightly delayed.
        """
        self._save_later = not self._between_steps
        if self._between_steps:
            state = self.pilot.state_dict()
            if self.trainer.args.should_save:  # only one of several processes writes
                save_state(checkpoint, state)
        return self._between_steps


def ready_to_train(trainer: Trainer, scaling: Scaling) -> None:
    """Let a Trainer's model load adapters of any rank, and train those left at rank 0 by an earlier run.

    Raises:
        DataError: the training set is empty.
        UnsupportedError: the model has no adapter of a known kind.
    """
    if isinstance(trainer.train_dataset, Sized) and not len(trainer.train_dataset):
        raise DataError("The training set is empty. Pass a train_dataset with at least one row.")
    if trainer.model is not None:  # in a search, the next trial's model does not exist yet
        let_train([target for target in resizable_targets(trainer.model, scaling) if not target.rank])


def tell_beside_bar(trainer: Trainer, text: str) -> None:
    """Show a line above the progress bar; without a bar, log it if its level is enabled, else print it."""
    if not trainer.args.disable_tqdm or not logger.isEnabledFor(logging.INFO):
        tqdm.write(f"rankpilot: {text}")
    else:
        logger.info(text)


def bar_of_trainer(trainer: Trainer, items: Iterable[Any], label: str, count: int) -> Iterable[Any]:
    """Show progress through these items, if the Trainer shows progress bars."""
    bar: Iterable[Any] = tqdm(items, desc=label, total=count, disable=trainer.args.disable_tqdm, leave=False)
    return bar


class Evaluations:
    """Predicts and measures one evaluation per batch size in a Trainer's run, and keeps them within the budget.

    Args:
        trainer: the Trainer, whose `per_device_eval_batch_size` may shrink.
        pilot: knows the budget.
    """

    def __init__(self, trainer: Trainer, pilot: RankPilot) -> None:
        self._trainer, self._pilot = trainer, pilot
        self._measured, self._own = 0, 0  # batch sizes; 0 for none

    def expect(self) -> None:
        """Use smaller batches from the first evaluation on, if those of the user are predicted to exceed the budget."""
        rows = self._trainer.args.per_device_eval_batch_size
        share = self._pilot.guard.expected_evaluation(rows)
        if self._trainer.args.eval_strategy != "no" and rows > 1 and share > 1:
            self._shrink(rows, share, "would take")

    def run(self, evaluate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run an evaluation, measuring the first one of each batch size."""
        rows = self._trainer.args.per_device_eval_batch_size
        if rows == self._measured:
            return evaluate(*arguments, **options)
        self._measured = rows
        with self._pilot.guard.evaluation():
            result = evaluate(*arguments, **options)
        share = self._pilot.guard.evaluation_share
        if share > 1 and rows > 1:
            self._shrink(rows, share, "took")
        return result

    def _shrink(self, rows: int, share: float, took: str) -> None:
        """Have later evaluations use smaller batches than these, which take a share of the budget above 1."""
        self._own = self._own or rows
        self._have(max(1, int(EVALUATION_ROOM * rows / share)))
        logger.warning(
            "An evaluation with a batch size of %d %s %.0f %% of the budget; the next one uses %d.",
            rows,
            took,
            100 * share,
            self._trainer.args.per_device_eval_batch_size,
        )

    def put_back(self) -> None:
        """Restore the user's batch size for evaluations after the run."""
        if self._own:
            self._have(self._own)
        self._measured, self._own = 0, 0

    def _have(self, rows: int) -> None:
        """Set the batch size from the next evaluation on, even if the Trainer caches its loaders."""
        self._trainer.args.per_device_eval_batch_size = rows
        vars(self._trainer).pop("_eval_dataloaders", None)


def warn_of_recompiles(model: nn.Module, args: TrainingArguments, plans: int) -> None:
    """Warn if a compiled run plans more sets of ranks than torch caches graphs; any further one runs uncompiled.

    Measured on torch 2.13: a compiled model is one frame with the LoRA layers inlined, so a set of ranks takes one
    graph however many modules it changes, and a repeated set takes none. Layers compiled one by one share the cache of
    their common code, and each takes one graph per set. Once a cache holds `recompile_limit` graphs, the code runs
    uncompiled for every further set, with just a line in torch's log.

    Args:
        model: the Trainer's model, possibly compiled by the user.
        args: the Trainer's arguments; `torch_compile` is set if the Trainer compiles the model.
        plans: the number of sets of ranks still ahead, including the current one.
    """
    limit: int = torch._dynamo.config.recompile_limit
    needed = plans * (graphs_per_plan(model) or int(args.torch_compile))
    if needed > limit:
        logger.warning(
            "This run is compiled and plans %d sets of ranks, which need %d graphs, but "
            "torch._dynamo.config.recompile_limit is %d; graphs beyond it run uncompiled. Use a schedule "
            "with fewer decisions in `attach`, or set the limit a little above %d before training (new batch "
            "lengths and peak corrections need extra graphs).",
            plans,
            needed,
            limit,
            needed,
        )
