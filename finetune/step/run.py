"""A fine-tune about to begin (model, optimizer, loss and data), and the participants of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ...common.errors import ConfigError, UnsupportedError, shown
from ...cost.batch_shape import Batch, map_tensors, shape_of, tensors_of
from ...cost.record.model_states import trained_outside
from ...cost.record.recorder import AGREE
from ...cost.training_step import LossFunction, TrainingStep, checked_loss, model_loss, release_inputs
from ...data.batches import Collate, count_predictions, first_example, largest_batch, small_batches
from ...lora.optimizer_state import check_optimizer
from ...lora.peft_config import make_resizable
from ...lora.resize import held_nodes
from ...lora.targets import TargetModule, check_trains, check_unmerged, find_target_modules, unwrap
from .batch_rows import Cuts
from .known_losses import cuts_left, foreign_objects, unknown_model
from .put_back import gradients_put_back, training_mode, undisturbed
from .replicas import Replicas, check_one_device

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_RATE = 1e-3
"""Learning rate of the probe if the optimizer chooses its own."""

LOOKED_AT = 16
"""Examples inspected to find which axes of a batch hold tokens."""

FIRST_ROWS = 16
"""Rows read before a run; see `TrainingRun.read_first_rows`."""

FirstRows = tuple[float, list[tuple[int, int]]]
"""A loss before training, and `count_predictions` of each batch."""

LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Settings of transformers models that drop layers at random in training."""


class Participant:
    """Base class for participants of a run, notified of its events in the order of `PilotedRun.participants`.

    Subclasses override the events they need; the others do nothing.
    """

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Begin with the run, or continue in a resumed run.

        Args:
            state: the checkpointed state of the whole run, with the keys of `state`; None in a new run.
        """

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Handle the beginning of an optimizer step.

        Args:
            step: the number of optimizer steps done.
            batches: the batches of the step.
        """

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Handle the complete gradients of a step.

        Args:
            step: the number of optimizer steps done before it.
            loss: the mean loss of the step.
        """

    def after_step(self, step: int) -> None:
        """Handle the end of a step; `step` counts the optimizer steps done, including this one."""

    def ranks_changed(self) -> None:
        """Handle a change of ranks."""

    def state(self) -> dict[str, Any]:
        """Return the state for `begin`, as tensors and JSON values, under keys unique to this participant."""
        return {}

    def end(self) -> None:
        """Restore model, optimizer and hooks; a second call does nothing."""


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A fine-tune about to begin.

    The inputs of the model require no gradients from then on; see `release_inputs`.

    Attributes:
        model: the PEFT model, on its device.
        optimizer: the optimizer of the run.
        loss: the loss of a batch, computed as in the loop.
        dataset: the training set.
        collate: makes a batch of its examples.
        rows: examples per batch.
        total_steps: optimizer steps of the run.
        accumulation: batches per optimizer step.
        learning_rate: learning rate of the probe.
        folder: folder of the run's files; defaults to the one for temporary files.
        evaluations: number of evaluations, if known.
        in_parts: True if the loop runs its batches through `RankPilot.parts`, like a Trainer's.
        generates: True if the loop generates its data during training, so there is none before the first step.
        whole: why batches nevertheless run whole, for people; empty if nothing prevents parts.
        part_loss: loss of a part of a batch, as it counts in that of the whole batch, the second argument; None for
            `loss` of the part.
        foreign: returns why the loss is not one of transformers or TRL, for people; empty if it is.
        wrapped: the model as called by the loop, including wrappers such as DistributedDataParallel; defaults to
            `model`, which may itself be wrapped.
        scheduler: sets the rates of the optimizer; None if unknown, as in a loop.
        replicas: its copies in the processes of the run. `model` is the one of this process, unwrapped.

    Raises:
        UnsupportedError: ranks cannot change inside a wrapper; see `check_wrappers`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: LossFunction
    dataset: Any
    collate: Collate
    rows: int
    total_steps: int
    accumulation: int
    learning_rate: float
    folder: Path | None = None
    evaluations: int | None = None
    in_parts: bool = False
    generates: bool = False
    whole: str = ""
    part_loss: Callable[[Batch, Batch], torch.Tensor] | None = None
    foreign: Callable[[], str] = str
    wrapped: nn.Module = None  # type: ignore[assignment]
    scheduler: Any = None
    replicas: Replicas = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wrapped", self.model if self.wrapped is None else self.wrapped)
        object.__setattr__(self, "replicas", Replicas.of(self.wrapped))
        object.__setattr__(self, "model", self.replicas.inside(self.model))
        object.__setattr__(self, "loss", checked_loss(self.loss))
        release_inputs(self.model)

    @classmethod
    def of_loader(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader[Any],
        *,
        total_steps: int,
        loss: LossFunction | None = None,
        accumulation: int = 1,
        learning_rate: float | None = None,
        in_parts: bool = False,
    ) -> TrainingRun:
        """Return the run of a plain loop over a DataLoader.

        Args:
            model: the PEFT model, on its device; with several processes, inside DistributedDataParallel.
            optimizer: the optimizer of the run.
            loader: makes the batches.
            total_steps: optimizer steps of the run.
            loss: the loss of a batch, computed as in the loop; defaults to the loss returned by the model.
            accumulation: batches per optimizer step.
            learning_rate: learning rate of the probe; see `probe_rate` for the default.
            in_parts: True if the loop runs its batches through `RankPilot.parts`.

        Raises:
            ConfigError: the loader is no DataLoader, or its batches have no fixed number of examples.
            UnsupportedError: the model has no adapter of a known kind.
        """
        for name, count in (("total_steps", total_steps), ("accumulation", accumulation)):
            if type(count) is not int or count < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {count!r}.")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module; got {shown(model)}.")
        if not hasattr(optimizer, "param_groups"):
            raise ConfigError(f"optimizer must be a torch.optim.Optimizer; got {shown(optimizer)}.")
        dataset, collate, rows = data_of(loader)
        make_resizable(model, find_target_modules(model))  # so that it loads what an earlier run has saved
        rate = probe_rate(model, optimizer) if learning_rate is None else learning_rate
        foreign = "the loss is custom" if loss else ""
        if not callable(loss := loss or model_loss(model)):
            raise ConfigError(f"loss must be a function from a batch to a scalar tensor; got {shown(loss)}.")
        return cls(
            model,
            optimizer,
            loss,
            dataset,
            collate,
            rows,
            total_steps,
            accumulation,
            float(rate),
            in_parts=in_parts,
            foreign=lambda: foreign,
        )

    def unknown(self) -> str:
        """Return why the loss is not known to be a sum over rows or tokens, for people; empty if it is."""
        longest = partial(self.measured, lambda: shape_of(self.largest_batch()).length)
        return self.foreign() or unknown_model(self.model, longest)

    @cached_property
    def cuts(self) -> Cuts:
        """Parts of a batch that may be cut, inferred from batches of single examples."""

        def seen() -> Cuts:
            batches = small_batches(self.dataset, self._collate, LOOKED_AT, min(2, self.rows), 0)
            return Cuts.seen_in(batches, left=cuts_left(self.model))

        return self.measured(seen)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def largest_batch(self) -> Batch:
        """Return the largest batch possible in training, on the device.

        Raises:
            DataError: the training set is empty.
            UnsupportedError: its batches hold no tensors.
        """
        return self.on_device(largest_batch(self.dataset, self._collate, self.rows))

    def small_batches(self, steps: int, rows: int, seed: int) -> Iterator[Batch]:
        """Yield batches of a few examples, on the device; see `data.batches.small_batches`."""
        return map(self.on_device, small_batches(self.dataset, self._collate, steps, rows, seed))

    @cached_property
    def step(self) -> TrainingStep:
        """The step that is measured."""
        with self._undisturbed():
            rows = shape_of(self._collate([first_example(self.dataset)] * self.rows)).rows
        each = rows // self.rows if rows % self.rows == 0 else 1
        replicas = self.replicas
        return TrainingStep(
            self.model,
            self.loss,
            self.optimizer,
            max(each, 1),
            accumulates=self.accumulation > 1 or replicas.gradients_stay,
            bucket_copies=replicas.bucket_copies(several=self.accumulation > 1),
            message_bytes=replicas.message_bytes,
        )

    @property
    def step_in_parts(self) -> TrainingStep:
        """The step as several passes, each alongside the gradients of the earlier ones."""
        return replace(self.step, accumulates=True, bucket_copies=self.replicas.bucket_copies(several=True))

    def warn(self, text: str, *values: object) -> None:
        """Log a warning in the first process only, since all processes reach the same conclusion."""
        if self.replicas.processes.first:
            logger.warning(text, *values)

    def keep_gradients(self) -> None:
        """From now on, measure steps as in a loop that keeps its gradients."""
        vars(self)["step"] = self.step_in_parts

    @property
    def tells_positions(self) -> bool:
        """True if batches hold the positions of their tokens."""
        return "position_ids" in self._names

    @property
    def learns_preferences(self) -> bool:
        """True if batches have named entries but no labels, as in losses that compare answers (DPO, KTO, rewards)."""
        return bool(self._names) and "labels" not in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        """Names of the entries of a batch; empty if they are unnamed."""
        batch = self.measured(lambda: self._collate([first_example(self.dataset)] * self.rows))
        return (
            frozenset(name for name in batch if batch[name] is not None) if isinstance(batch, Mapping) else frozenset()
        )

    def measured(self, work: Callable[[], T]) -> T:
        """Run a function that runs steps, in the first process only; all get its result or its error.

        Training is unaffected: random numbers and the mode of the model are restored.
        """

        def alone() -> T:
            outside = trained_outside(self.model, self.optimizer)
            with (
                self._undisturbed(),
                training_mode(self.model),
                gradients_put_back(outside),
                self.replicas.apart(),
            ):
                return work()

        if self.replicas.sharded:  # all processes take part in each pass
            agree = AGREE.set(self.replicas.processes.on_first)
            try:
                found = alone()
            finally:
                AGREE.reset(agree)
            return self.replicas.processes.on_first(lambda: found)
        return self.replicas.processes.on_first(alone)

    def _undisturbed(self) -> AbstractContextManager[None]:
        own = (each for _, each in foreign_objects(self.model))
        return undisturbed(self.collate, self.dataset, self.loss, *own)

    def read_first_rows(self, seed: int) -> FirstRows:
        """Return the mean loss of `FIRST_ROWS` rows in batches of two, NaN if none, and their `count_predictions`.

        Args:
            seed: seed of the choice of rows.
        """

        def read() -> FirstRows:
            batches = list(self.small_batches(FIRST_ROWS // 2, 2, seed))
            losses = [loss for loss in (float(self.loss(batch).detach()) for batch in batches) if not math.isnan(loss)]
            return float(np.mean(losses)) if losses else math.nan, [count_predictions(batch) for batch in batches]

        return self.measured(read)

    def on_device(self, batch: Batch) -> Batch:
        """Move a batch to the model's device."""
        return map_tensors(batch, lambda tensor: tensor.to(self.device))

    def _collate(self, examples: list[Any]) -> Batch:
        batch = self.collate(examples)
        if not tensors_of(batch):
            raise UnsupportedError(
                f"The data loader's batches ({type(batch).__name__}) contain no tensors: this run generates its "
                "data during training, as in reinforcement learning, so its steps cannot be measured beforehand. "
                "Plan the ranks with `rankpilot.allocate` on similar data, and train with the LoraConfig it "
                "returns."
            )
        return batch


def check_run(run: TrainingRun, targets: Sequence[TargetModule]) -> None:
    """Reject a run that cannot be trained.

    Args:
        run: the run.
        targets: the target modules of its model.

    Raises:
        UnsupportedError: the adapters are on several devices, the optimizer is not supported, the model drops layers at
            random, an adapter is merged into its layer, a gradient node has hooks, or several processes run without
            sharing gradients.
        ConfigError: it has no steps, or some adapters are not in the optimizer.
    """
    run.replicas.check()
    check_one_device(run.model)
    check_optimizer(run.optimizer)
    _check_all_layers_run(run)
    if run.total_steps < 1:
        raise ConfigError(f"A run needs at least one step; got {run.total_steps}. Raise max_steps.")
    check_unmerged(targets)
    if held := held_nodes(dict(run.model.named_parameters())):
        raise UnsupportedError(
            f"An object holds the gradient node of {held[0]}, as after `register_prehook`. Hooks on it would be lost "
            "where ranks are tried: register them on the parameter (`Tensor.register_hook`), and drop the node."
        )
    if not any(parameter.requires_grad for parameter in run.model.parameters()):
        check_trains(targets)
    _check_optimized(run, targets)


def _check_all_layers_run(run: TrainingRun) -> None:
    """Raise UnsupportedError if the model drops layers at random, which makes the memory of a step unpredictable."""
    config = getattr(unwrap(run.model), "config", None)
    for name in LAYER_DROPS:
        share = getattr(config, name, 0)
        if isinstance(share, float) and share > 0:
            raise UnsupportedError(
                f"The model drops layers at random (config.{name} is {share:g}), so the memory of a step is not "
                f"known in advance, and a step may use no adapter at all. Set model.config.{name} = 0."
            )


def _check_optimized(run: TrainingRun, targets: Sequence[TargetModule]) -> None:
    """Raise ConfigError if a trainable adapter is in no group of the optimizer: it would get rank for nothing."""
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    left = [
        target
        for target in targets
        if any((p.requires_grad or not target.rank) and id(p) not in held for p in target.parameters.values())
    ]
    if left:
        text = (
            f"{len(left)} of {len(targets)} adapters are not in the optimizer and would not be trained, such "
            f"as that of {left[0].name}. Create the optimizer after the adapters, from all parameters that "
            "require gradients; remove modules without adapters from `target_modules`."
        )
        if any(not target.rank for target in left):
            text += (
                " An earlier run left some at rank 0, where parameters require no gradients: create the "
                "optimizer from `[p for name, p in model.named_parameters() if p.requires_grad or 'lora_' in "
                "name]`."
            )
        raise ConfigError(text)


def group_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the initial or warmed-up learning rate of the schedule in each group; 0 if it is unknown."""
    names = "max_lr", "initial_lr", "lr"  # max_lr: OneCycleLR
    return [float(next(filter(None, map(group.get, names)), None) or 0.0) for group in optimizer.param_groups]


def adapter_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return the initial or warmed-up learning rates of the schedule, by index of the groups that hold adapters.

    A rate is 0 if the optimizer chooses its own (Adafactor), or if a schedule starts at 0 without recording its peak.
    If no group holds adapters, the rate is that of the first one.
    """
    adapters = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    held = [at for at, group in enumerate(optimizer.param_groups) if any(id(p) in adapters for p in group["params"])]
    rates = group_rates(optimizer)
    return {at: rates[at] for at in held or [0]}


def own_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the adapters: that of the first group that holds some and has a rate; else 0."""
    return next((rate for rate in adapter_rates(model, optimizer).values() if rate), 0.0)


def probe_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the probe: that of the adapters, or `PROBE_RATE` if it is 0."""
    return own_rate(model, optimizer) or PROBE_RATE


def data_of(loader: Any, rows: int | None = None) -> tuple[Any, Collate, int]:
    """Return the data set of a DataLoader, its collator, and its batch size in examples.

    Args:
        loader: makes the batches.
        rows: examples per batch, if the loader does not define them.

    Raises:
        ConfigError: it is no DataLoader, or its batches have no fixed number of examples.
    """
    if not all(hasattr(loader, name) for name in ("dataset", "collate_fn", "batch_sampler")):
        raise ConfigError(
            "The data of a run must be a torch.utils.data.DataLoader, which provides data set, batch size "
            f"and collator; got {type(loader).__name__}."
        )
    sampler = loader.batch_sampler
    if sampler is None and loader.batch_size is None:  # the examples of the data set are batches
        return loader.dataset, _ReadyBatches(loader.collate_fn), 1
    inner = getattr(sampler, "batch_sampler", None)  # as in accelerate's skip_first_batches
    sizes = loader.batch_size, getattr(sampler, "batch_size", None), getattr(inner, "batch_size", None), rows
    size = next((size for size in sizes if isinstance(size, int)), None)
    if size is None:
        raise ConfigError(
            f"The batch size of the DataLoader is unknown: its batch_sampler ({type(sampler).__name__}) has "
            "no `batch_size`. Set that attribute to the most rows of a batch."
        )
    if getattr(sampler, "split_batches", False):  # accelerate gives each process its part of a batch
        size = -(-size // sampler.num_processes)
    return loader.dataset, loader.collate_fn, size


@dataclass(frozen=True)
class _ReadyBatches:
    """Collates batches of one example, itself a batch, for a loader without a batch size."""

    collate: Collate

    def __call__(self, batches: list[Any]) -> Batch:
        return self.collate(batches[0])
