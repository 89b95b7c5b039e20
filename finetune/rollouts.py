"""Trainers that generate their data during training, such as TRL's GRPOTrainer and RLOOTrainer.

The model answers prompts (the rollout), its answers are scored, and training steps on them follow. Only the training
steps compute gradients, so the budget covers their memory. Its maximum is known in advance: the longest prompt, and an
answer of the maximum length. Batches here concatenate the tokens of prompt and answer, so rows and length define their
shape. Where GRPO's loss is a sum over answers or their tokens, a step runs in parts.

Ranks and learning rate are fixed. Where gradients moved ranks under GRPO at equal budgets, the reward fell below that
of uniform ranks (arXiv 2605.07366), and before the first rollout there is no loss to plan with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..common.errors import UnsupportedError
from ..cost.batch_shape import MASK, Batch
from ..data.batches import MOST_EXAMPLES
from ..decide.policy import Policy
from ..decide.rules import AsConfigured
from .options import PilotOptions

TOKENS, ROW = "input_ids", "row"

PLAN_FIRST = "Plan the ranks with `rankpilot.allocate` on similar data, and train with the LoraConfig it returns."

_DECIDING = ("bounds", "schedule", "fresh", "learning_rate", "control", "goal", "tolerance")
"""Options that would change ranks or rate."""


def makes_rollouts(trainer: Trainer) -> bool:
    """True if a Trainer generates its data during training, in a known way."""
    own = hasattr(trainer, "_generate_and_score_completions") and hasattr(trainer, "_buffered_inputs")
    return own and hasattr(trainer.args, "num_generations")  # excluding distillation, whose steps read a teacher


def left_alone(
    trainer: Trainer, policy: str | Path | Policy | None, options: PilotOptions
) -> tuple[Policy, PilotOptions]:
    """Return the policy and the options of a run on rollouts: ranks and rate are those configured.

    Raises:
        UnsupportedError: an option would decide ranks or rate.
    """
    default = PilotOptions()
    given = [] if policy is None or isinstance(policy, AsConfigured) else ["policy"]
    given += [name for name in _DECIDING if getattr(options, name) != getattr(default, name)]
    if given:
        raise UnsupportedError(
            f"{type(trainer).__name__} generates its data during training, so ranks and learning rate are not "
            f"changed: leave out {', '.join(given)}. {PLAN_FIRST}"
        )
    return AsConfigured(), replace(options, keep_rate=True)


def refuse_to_plan(trainer: Trainer) -> None:
    """Raise UnsupportedError if a Trainer generates its data: there is no loss to plan with."""
    if makes_rollouts(trainer):
        raise UnsupportedError(
            f"{type(trainer).__name__} generates its data during training, so no plan can be made from it. {PLAN_FIRST}"
        )


def refuse_answers(trainer: Trainer, *_: Any, **__: Any) -> None:
    """Raise UnsupportedError in place of answers generated within a training step (TRL's GKDTrainer)."""
    raise UnsupportedError(
        f"{type(trainer).__name__} generates its data in its training step, so the step's memory cannot "
        f"be measured beforehand. {PLAN_FIRST}"
    )


_SUMS = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
"""Losses of TRL's GRPOTrainer that are a mean over answers, or a sum over tokens divided by a number in the inputs."""


def meeting_answers(trainer: Any) -> str:
    """Return why answers may affect each other in a loss of rollouts, for people; empty if they do not."""
    if getattr(trainer, "loss_type", None) not in _SUMS:
        named = getattr(trainer, "loss_type", type(trainer).__name__)
        return f"the loss of {named} is not known to be a sum over answers"
    if trainer.top_entropy_quantile < 1:
        return "top_entropy_quantile compares the tokens of all answers"
    if trainer._entropy_bonus_enabled:
        return "the entropy bonus is a mean over the tokens of all answers"
    return "metrics are exchanged in each pass" if trainer.accelerator.num_processes > 1 else ""


@dataclass(frozen=True)
class Answers:
    """The answers of one training step, which may run in parts.

    Attributes:
        trainer: the Trainer that generated them.
        inputs: what its step takes, by name.
        step: its count of training steps before this one.
        logged: number of figures logged before the step, by name.
    """

    trainer: Any
    inputs: Mapping[str, Any]
    step: int
    logged: Mapping[str, int]

    @classmethod
    def generated(cls, trainer: Any, model: Any, prompts: Any) -> Answers:
        """Generate the answers of the next step as the Trainer's own step would begin."""
        began, step = time.perf_counter(), trainer._step
        model.train()
        if callable(train := getattr(trainer.optimizer, "train", None)):
            train()
        made = trainer._prepare_inputs(prompts)
        trainer._current_train_step_time += time.perf_counter() - began
        return cls(trainer, made, step, {name: len(values) for name, values in trainer._metrics["train"].items()})

    @property
    def batch(self) -> Batch:
        """The batch for `RankPilot.parts`, with the number of each row; it costs a part's bytes, and takes few."""
        batch, size = _side_by_side(self.inputs), self.inputs["completion_ids"].shape
        figures = sum(torch.is_tensor(value) and value.shape == size for value in self.inputs.values()) - 2
        # Bytes a token: a mask is int64 in the step, and figures are fp32.
        rest = torch.zeros(1, dtype=torch.uint8).expand(*batch[MASK].shape, 7 + 4 * figures)
        return {**batch, ROW: torch.arange(len(batch[MASK])), "beside": rest}

    def of_part(self, part: Batch) -> dict[str, Any]:
        """Return the inputs of the step for a part of `batch`, without padding that its rows share."""
        width, size = part[TOKENS].shape[1], self.inputs["completion_ids"].shape[1]
        rows = part[ROW].to(self.inputs["completion_ids"].device)
        ends = self.inputs["completion_mask"][rows].any(dim=0).nonzero()
        answer = max(int(ends.max()) + 1 if len(ends) else 0, width - self.inputs["prompt_ids"].shape[1])
        prompt, answer = width - answer, min(max(answer, 2), size)  # TRL takes one column for a figure per answer

        def chosen(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != len(self.inputs["advantages"]):
                return value
            if name.startswith("prompt"):
                return value[rows, value.shape[1] - prompt :]
            return value[rows, :answer] if value.dim() == 2 and value.shape[1] == size else value[rows]

        return {name: chosen(name, value) for name, value in self.inputs.items()}

    @contextmanager
    def counted_once(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Yield a function to call with the inputs of each part: the Trainer counts one step, and logs its figures.

        Those of an attempt that ran out of memory are dropped.
        """
        trainer, counts = self.trainer, list[tuple[float, int]]()
        metrics = trainer._metrics["train"]

        def begin(inputs: Mapping[str, Any]) -> None:
            trainer._step = self.step
            counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            counts.append((float(counted.sum()), len(counted)))

        for name in filter(_is_of_loss, metrics):
            del metrics[name][self.logged.get(name, 0) :]
        yield begin
        for name in filter(_is_of_loss, metrics):
            start = self.logged.get(name, 0)
            if len(parts := metrics[name][start:]) == len(counts):
                metrics[name][start:] = [self._of_all(name, parts, counts)]

    def _of_all(self, name: str, parts: list[float], counts: list[tuple[float, int]]) -> float:
        """Return a logged figure of a step from those of its parts, as `GRPOTrainer._compute_loss` has it.

        Args:
            name: its name.
            parts: its values.
            counts: tokens that count, and answers, of each part.
        """
        if combined := _COMBINED.get(name.rpartition("_")[2]):
            known = [value for value in parts if not math.isnan(value)]
            return combined(known) if known else math.nan
        of_answers = self.trainer.importance_sampling_level == "sequence" and "clip" in name
        weights = [answers if of_answers or "phi" in name else tokens for tokens, answers in counts]
        return sum(value * weight for value, weight in zip(parts, weights, strict=True)) / max(sum(weights), 1.0)


def _is_of_loss(name: str) -> bool:
    """True if a figure is logged by the loss, and not where answers are generated."""
    return name.startswith(("kl", "entropy", "clip_ratio/", "cispo_clip_ratio", "vespo/", "step_time"))


_COMBINED: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max, "time": sum}
"""How figures of parts combine, by the end of their names; others are means over tokens or answers."""


class Rollouts:
    """The batches of a Trainer's training phase: the largest ones before training, and the actual ones.

    Args:
        trainer: see `makes_rollouts`.

    Attributes:
        rows: rows per batch.
        dataset: the examples of one batch, with the longest prompts and answers.

    Raises:
        UnsupportedError: prompts hold images or come from environments, or answers have no maximum length.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, args = trainer, trainer.args
        kind = type(trainer).__name__
        columns = getattr(trainer.train_dataset, "column_names", None) or ()
        if {"image", "images"} & {*columns} or getattr(trainer, "environment_factories", None):
            raise UnsupportedError(
                f"{kind} with images or environments: the memory of its steps is unknown. {PLAN_FIRST}"
            )
        if not args.max_completion_length:
            raise UnsupportedError(f"{kind} has no limit on completions: set max_completion_length, such as 256.")
        self.rows: int = args.per_device_train_batch_size
        multiple = getattr(args, "pad_to_multiple_of", None) or 1
        longest = _longest_prompts(trainer, self.rows)
        answer = _rounded(args.max_completion_length, multiple)
        self._fill, prompt = int(trainer._tokenizer.pad_token_id), _rounded(len(longest[0]), multiple)
        self._length, self._share, self._least = prompt + answer, answer / (prompt + answer), min(answer, 2)
        whole = ([*ids, *[self._fill] * answer] for ids in longest)
        self.dataset: list[dict[str, list[int]]] = [{TOKENS: ids, MASK: [1] * len(ids)} for ids in whole]
        self._of_tokens = _made_for_each_token(trainer)

    def collate(self, examples: Sequence[Mapping[str, list[int]]]) -> Batch:
        """Collate examples, padded on the left, int64 (rows, tokens)."""
        length = self._length
        tokens = torch.full((len(examples), length), self._fill)
        mask = torch.zeros_like(tokens)
        for row, example in enumerate(examples):
            ids = example[TOKENS]
            tokens[row, length - len(ids) :], mask[row, length - len(ids) :] = torch.tensor(ids), 1
        return {TOKENS: tokens, MASK: mask}

    def inputs(self, batch: Batch, whole: Batch) -> dict[str, torch.Tensor]:
        """Return the inputs of the training step for a batch in the form of this class; scores are all one.

        Args:
            batch: the batch.
            whole: the batch of which it is a part, with answers of the same length.
        """
        tokens, mask = batch[TOKENS], batch[MASK]
        (rows, length), size = tokens.shape, whole[TOKENS].shape[1]
        answer = min(max(round(self._share * size), self._least), size - 1)
        cut = length - answer
        scores = torch.ones(rows, device=tokens.device)
        each = dict.fromkeys(self._of_tokens, torch.zeros((rows, length - cut), device=tokens.device))
        return {
            "prompt_ids": tokens[:, :cut],
            "prompt_mask": mask[:, :cut],
            "completion_ids": tokens[:, cut:],
            "completion_mask": mask[:, cut:],
            "advantages": scores,
            "num_items_in_batch": whole[MASK][:, size - answer :].sum(),
            "old_logps": torch.zeros_like(scores),
            **each,
        }

    def of_this_step(self) -> list[Batch]:
        """Return the batches of the current optimizer step, once the first of them has its answers."""
        trainer: Any = self._trainer
        made = trainer._buffered_inputs
        count = trainer.current_gradient_accumulation_steps
        return [_side_by_side(made[(trainer._step + place) % len(made)]) for place in range(count)]


def _side_by_side(inputs: Mapping[str, torch.Tensor]) -> Batch:
    """Return the shape of prompts and answers, as tokens that take no memory, and their mask, bool (rows, tokens)."""
    mask = torch.cat([inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()], dim=1)
    return {TOKENS: inputs["prompt_ids"].new_zeros(1).expand(mask.shape), MASK: mask}


def _made_for_each_token(trainer: Any) -> list[str]:
    """Return the names of values per answer token, float32 (rows, tokens), computed before the training steps."""
    args = trainer.args
    corrects = bool(getattr(args, "use_vllm", False) and getattr(args, "vllm_importance_sampling_correction", False))
    again = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
    made = {
        "old_per_token_logps": again or corrects,
        "importance_sampling_ratio": corrects,
        "ref_per_token_logps": args.beta != 0,
    }
    return [name for name, needed in made.items() if needed]


def _longest_prompts(trainer: Any, count: int) -> list[list[int]]:
    """Return the token ids of the longest prompts, longest first; some repeat if there are too few."""
    dataset = trainer.train_dataset
    apart = -(-len(dataset) // MOST_EXAMPLES) if hasattr(dataset, "__len__") else 1
    prompts = [row["prompt"] for row in islice(dataset, 0, apart * MOST_EXAMPLES, apart)]
    longest = sorted(trainer._tokenize_prompts(prompts)[0], key=len, reverse=True)
    return [list(longest[place % len(longest)]) for place in range(count)]


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
