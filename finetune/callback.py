"""The callback for the transformers Trainer: a policy decides the ranks of a real fine-tune."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..agents.learned.exploring import drawing_from
from ..agents.learned.policy_file import DEFAULT
from ..allocation.bounds import Bounds
from ..allocation.controller import RankController
from ..allocation.log import DecisionLog
from ..allocation.policy import Policy
from ..allocation.schedule import DecisionSchedule
from ..common.processes import Processes
from ..errors import ConfigError, DataError, UnsupportedError
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import let_train, resizable_targets
from ..lora.scaling_names import Scaling
from ..memory.budget import Budget, TimeBudget
from ..memory.recording import Batch
from ..memory.step_config import check_seed
from .checkpoint import chosen_checkpoint, load_state, save_state
from .evaluations import Evaluations
from .parallel_kinds import check_arguments
from .pilot import RankPilot
from .recompiles import warn_of_recompiles
from .run import TrainingRun, data_of, probe_rate
from .stop import StopOnSigterm
from .trainer_step import TrainerStep, around_training, find_trainer, resumed_from

logger = logging.getLogger(__name__)


class RankPilotCallback(TrainerCallback):  # type: ignore[misc]
    """Decides the LoRA rank of each module in a Trainer's run, inside a hard memory budget.

    Before the first step it measures what plans cost in the Trainer's own training step, on its data, and probes which
    modules matter. Then the policy decides the ranks, and again at later steps if its schedule has any. The adapters
    really change their size, the optimiser keeps its state, and every checkpoint is an adapter that plain PEFT loads.
    Adapters that are trained already are kept. Where nobody handles SIGTERM, it saves a checkpoint and ends the process
    with status 143.

    Args:
        policy: see `RankPilot`, as `budget`, `schedule`, `measure_every`, `bounds` and `fresh`.
        budget: bytes ("350MB"), a share of what plain LoRA takes ("80%"), "auto", or parameters ("300k params").
        log: the folder of the decision log; by default `decisions` in the Trainer's output folder.
        schedule: when to decide; by default as the policy was trained to.
        seed: of the probe and of fresh rows; by default `TrainingArguments.seed`.
        measure_every: measure the real peak every so many steps, and after each change of ranks.
        bounds: the rank of single modules, or their least and largest rank.
        fresh: begin with new adapters even where they are trained.
        recompute: let as few layers as each plan needs run again in the backward pass; see `RankPilot`.
        time: what a step may take in time, beside the budget: "75%", "0.8s"; see `RankPilot`.
        explore: draw plans at this temperature, and log their probabilities; see `RankPilot`.
        scaling: what stays when a rank changes, "alpha" or "constant"; see `RankPilot`.
        goal: "quality", or the cheapest plan that loses nothing: "time" or "bytes"; see `RankPilot`, as `tolerance`.
        tolerance: what counts as nothing, in log loss.

    Attributes:
        pilot: decides the ranks.

    Raises:
        ConfigError, UnknownNameError, PolicyFileError, BudgetError: an argument that cannot be used. `Trainer.train`
            then raises what `RankPilot.begin` and its other methods do.

    Example:
        >>> trainer = Trainer(..., callbacks=[RankPilotCallback("signal-mean", budget="80%")])  # doctest: +SKIP

    For a Trainer that exists already there is `attach`. `train(resume_from_checkpoint=True)` takes the last checkpoint
    that is whole.
    """

    def __init__(
        self,
        policy: str | Path | Policy = DEFAULT,
        budget: str | float | Budget = "100%",
        *,
        log: str | Path | None = None,
        schedule: DecisionSchedule | None = None,
        seed: int | None = None,
        measure_every: int = 100,
        bounds: Bounds | None = None,
        fresh: bool = False,
        recompute: bool = False,
        time: str | TimeBudget | None = None,
        explore: float | None = None,
        scaling: Scaling = "alpha",
        goal: str = "quality",
        tolerance: float | None = None,
    ) -> None:
        self.pilot: RankPilot = RankPilot(
            policy,
            budget,
            log=log,
            schedule=schedule,
            measure_every=measure_every,
            bounds=bounds,
            fresh=fresh,
            tell=self._tell,
            progress=self._progress,
            recompute=recompute,
            time=time,
            explore=explore,
            scaling=scaling,
            goal=goal,
            tolerance=tolerance,
        )
        if seed is not None:
            check_seed(seed)
        around_training(_prepared, _broken_off)
        self._seed, self._log_is_given, self._explores = seed, log is not None, explore is not None
        self._bar = False
        self._step: TrainerStep | None = None
        self._stop: StopOnSigterm | None = None
        self._batches: list[Batch] = []
        self._loss: torch.Tensor | float = 0.0
        self._between_steps, self._save_later = True, False
        self._evaluations: Evaluations | None = None

    @property
    def controller(self) -> RankController[PeftAdapters] | None:
        """Observes the adapters and changes their ranks; None before training."""
        return self.pilot.controller

    @property
    def predictions(self) -> list[tuple[int, float]]:
        """(step, cost of the plan) of each decision."""
        return self.pilot.predictions

    @property
    def peaks(self) -> list[tuple[int, int]]:
        """(step, bytes at its peak) of each measured step."""
        return self.pilot.peaks

    @property
    def limit(self) -> float:
        """What a plan may cost, in bytes or parameters. It is known from the start of training on."""
        return self.pilot.limit

    def connect(self, trainer: Trainer) -> None:
        """Take a Trainer as the one whose run is decided, and let its model load adapters of any ranks.

        Raises:
            UnsupportedError: another such callback decides its ranks, or its model has no adapter of a known kind.
            DataError: its training set is empty.
        """
        others = [one for one in trainer.callback_handler.callbacks if isinstance(one, RankPilotCallback)]
        if any(one is not self for one in others):
            raise UnsupportedError("Two RankPilotCallbacks would decide the ranks of one Trainer. Pass it one.")
        if isinstance(trainer.train_dataset, Sized) and not len(trainer.train_dataset):
            raise DataError("The training set is empty. Pass a train_dataset that holds rows.")
        if self._step is None or self._step.trainer is not trainer:
            self._step = TrainerStep(trainer)
        if trainer.model is not None:  # of a search the next trial's model is yet to be made
            targets = resizable_targets(trainer.model, self.pilot.scaling)
            let_train([target for target in targets if not target.rank])  # which an earlier run left
        if trainer.model_init is not None:
            self._step.prepare_new_models(lambda model: resizable_targets(model, self.pilot.scaling))
        self._go_ahead(trainer.callback_handler.callbacks)

    # Trainer events, in the order of a run ----------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Find the Trainer. A checkpoint may be loaded before training begins, so the adapters get ready here."""
        trainer = find_trainer(self)
        if trainer:
            self.connect(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Prepare the run and take the first decision, or go on from a checkpoint."""
        check_arguments(args)
        step, pilot = self._connected(), self.pilot
        step.release()
        schedule_steps = pilot.schedule.steps(state.max_steps) if state.max_steps > 0 else ()
        warn_of_recompiles(objects["model"], args, 1 + sum(at > state.global_step for at in schedule_steps))
        pilot.seed = args.seed if self._seed is None else self._seed
        if self._explores:
            pilot.policy = drawing_from(pilot.policy, pilot.seed)
        if not self._log_is_given:
            pilot.journal.log = self._default_log(args)
        self._bar = not args.disable_tqdm
        run, name = run_of(step, args, state, objects), Path(args.output_dir).name
        if state.global_step > 0:
            folder = resumed_from(step.trainer, state.global_step)
            pilot.resume(run, load_state(folder), step=state.global_step, name=name)
        else:
            pilot.begin(run, name=name)
        self._evaluations = Evaluations(step.trainer, pilot)
        step.follow(
            self._take_batches, self._take_loss, pilot.out_of_memory, pilot.figures, self._save_state, self._break_off
        )
        step.follow_evaluations(self._evaluations.run)
        self._between_steps, self._save_later = True, False
        if state.global_step >= state.max_steps:
            step.take_no_more()
            control.should_training_stop = True
        if self._stop:  # of a run that began before and found another batch size
            self._stop.release()
        self._stop = StopOnSigterm.unless_handled(step.trainer, run.replicas.processes)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Decide if a decision is due, look at the step's batches, and measure the step if it is due."""
        self._loss = 0.0
        self.pilot.before_step(*self._batches)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Read the gradients, which are complete now."""
        self._between_steps = False
        self.pilot.before_optimizer_step(self._loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Compare the peak with the budget. A decision that is due is made when the next step begins, if one does."""
        self.pilot.after_step(decide=False)
        self._between_steps = True
        if self._save_later:
            control.should_save, self._save_later = True, False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Stop measuring, and write the ranks to PEFT's configuration: the best checkpoint may have been loaded."""
        self._connected().release()
        if self._evaluations:
            self._evaluations.put_back()
        self.pilot.finish()

    # What the events do -----------------------------------------------------------------------------------------------

    def _connected(self) -> TrainerStep:
        """The step of the Trainer that runs now."""
        trainer = find_trainer(self)
        if trainer and (self._step is None or self._step.trainer is not trainer):
            self.connect(trainer)
        if self._step is None:
            raise UnsupportedError(
                "RankPilotCallback found no Trainer whose step it could run. Call `rankpilot.attach(trainer, ...)` in "
                "place of `callbacks=[RankPilotCallback(...)]`, or drive `rankpilot.RankPilot` from your own loop."
            )
        return self._step

    def _go_ahead(self, callbacks: list[TrainerCallback]) -> None:
        """Come before callbacks of users, which may copy parameters when training begins: by then ranks have changed.

        Those of transformers keep their places. Each callback still hears the event in which this happens once.
        """
        users = (at for at, one in enumerate(callbacks) if not type(one).__module__.startswith("transformers."))
        first = next(users, 0)
        if self in callbacks[first + 1 :]:
            callbacks.remove(self)
            callbacks.insert(first, self)

    def _default_log(self, args: TrainingArguments) -> DecisionLog | None:
        trainer = self._connected().trainer  # the trials of a search have a folder each
        return DecisionLog(Path(trainer._get_output_dir(getattr(trainer, "_trial", None))) / "decisions")

    def _break_off(self) -> None:
        """Stop measuring, following the Trainer and handling SIGTERM, since the run ends with an error."""
        self._between_steps, self._save_later = True, False
        try:
            self.pilot.break_off()
        finally:
            if self._step:
                self._step.release()
            if self._evaluations:
                self._evaluations.put_back()
            if self._stop:
                self._stop.release()

    def _take_batches(self, batches: list[Batch]) -> None:
        self._batches = batches

    def _take_loss(self, loss: torch.Tensor) -> None:
        self._loss = self._loss + loss

    def _save_state(self, checkpoint: Path) -> bool:
        """Write the state of this callback into a checkpoint, before the Trainer writes its files.

        So the checkpoint is complete when the Trainer deletes older ones. Other callbacks may ask for one while this
        callback has not heard yet of the end of the step; then it is made a moment later.
        """
        self._save_later = not self._between_steps
        if self._between_steps:
            state = self.pilot.state_dict()
            if self._connected().trainer.args.should_save:  # of several processes one writes
                save_state(checkpoint, state)
        return self._between_steps

    def _tell(self, text: str) -> None:
        """Show a line above the progress bar; without one, log it if logs of this level are kept, and else print it."""
        if self._bar or not logger.isEnabledFor(logging.INFO):
            tqdm.write(f"rankpilot: {text}")
        else:
            logger.info(text)

    def _progress(self, items: Iterable[Any], label: str, count: int) -> Iterable[Any]:
        bar: Iterable[Any] = tqdm(items, desc=label, total=count, disable=not self._bar, leave=False)
        return bar


def attach(trainer: Trainer, policy: str | Path | Policy = DEFAULT, **options: Any) -> RankPilotCallback:
    """Let a policy decide the ranks of a Trainer's runs; call this before `train`.

    Args:
        trainer: a transformers Trainer or one of TRL, with a PEFT model.
        policy: see `RankPilotCallback`.
        options: see `RankPilotCallback`.

    Returns:
        The callback, which is among the Trainer's from now on.

    Raises:
        UnsupportedError: another such callback decides its ranks, or its model has no adapter of a known kind.
        DataError: its training set is empty.
        ConfigError, UnknownNameError, PolicyFileError, BudgetError: an argument that cannot be used.

    Example:
        >>> rankpilot.attach(trainer, budget="80%")  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        kind = trainer.__name__ if isinstance(trainer, type) else f"a {type(trainer).__name__}"
        raise ConfigError(
            f"attach takes a Trainer that has been made, of transformers or TRL; got {kind}. For a loop of your own "
            "there is `rankpilot.RankPilot`, for a LoraConfig alone `rankpilot.allocate`."
        )
    callback = RankPilotCallback(policy, **options)
    callback.connect(trainer)
    trainer.add_callback(callback)
    return callback


def _prepared(trainer: Trainer, resume: Any) -> Any:
    """Get a Trainer ready to load a checkpoint, and return the one that it loads; one without our callback is left."""
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, RankPilotCallback)]
    for callback in callbacks:
        callback.connect(trainer)
    if not callbacks:
        return resume
    return Processes.of_this_run().on_first(lambda: chosen_checkpoint(resume, trainer.args.output_dir))


def _broken_off(trainer: Trainer) -> None:
    """Leave nothing behind of a run that ended with an error, wherever it came from."""
    for callback in [one for one in trainer.callback_handler.callbacks if isinstance(one, RankPilotCallback)]:
        callback._break_off()


def run_of(step: TrainerStep, args: TrainingArguments, state: TrainerState, objects: dict[str, Any]) -> TrainingRun:
    """The run that begins, from the arguments of a callback's event."""
    dataset, collate, rows = data_of(objects["train_dataloader"], state.train_batch_size)
    return TrainingRun(
        model=objects["model"],
        optimizer=objects["optimizer"],
        loss=step.loss,
        dataset=dataset,
        collate=collate,
        rows=rows,
        total_steps=state.max_steps,
        accumulation=args.gradient_accumulation_steps,
        learning_rate=probe_rate(objects["model"], objects["optimizer"]),
        wrapped=step.trainer.model_wrapped,
    )
