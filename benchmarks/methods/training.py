"""The models of the methods benchmark, and the one loop that trains them under each method."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from rankpilot.common.arrays import IntArray
from rankpilot.common.devices import find_energy_counter
from rankpilot.cost.recording import Batch
from rankpilot.data.models import load_model
from rankpilot.data.task import KINDS
from rankpilot.env.bases import load_base_model, with_weights
from rankpilot.env.proxy_task import POSITIONS, ProxyBase
from rankpilot.finetune.run import TrainingRun
from rankpilot.lora.peft_config import fresh_adapters
from rankpilot.lora.spec import REFERENCE_RANK
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .rows import plan_text
from .tasks import MethodTask
from .texts import PACKAGED, TaskData, load_data, reads_bytes, tokenizer_of

WARMUP = 0.1
"""Share of the steps in which the learning rate rises along a line; from then on it falls along one, to 0."""

CLIP = 1.0
"""The largest norm of a step's gradient."""

CURVE_ROWS = 64
"""Held-out rows of the evaluations on the way."""


class Driver:
    """A method inside the loop: it has made the model, and is told of each step. This one does nothing: ranks stay.

    Attributes:
        model: a PEFT model in training mode.

    Args:
        model: see above.
        plan: the rank of each module.
    """

    model: PeftModel

    def __init__(self, model: PeftModel, plan: IntArray) -> None:
        self.model, self._plan = model, plan

    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def begin(self, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], steps: int) -> None:
        """Training is about to begin."""

    def before_step(self, batch: Batch) -> None:
        """Before the forward pass."""

    def gradients(self, loss: torch.Tensor) -> None:
        """Gradients are there, and clipped."""

    def stepped(self, step: int) -> None:
        """The optimiser has stepped, this many times; gradients are still there."""

    def cleared(self, step: int) -> None:
        """Gradients are gone."""

    def changes(self, step: int) -> bool:
        """Whether ranks may change after this many steps."""
        return False

    def ranks(self) -> IntArray:
        """Current rank of each module, int64 (modules,); of unadapted modules 0."""
        return self._plan

    def buffer_bytes(self) -> int:
        """What the method holds beside weights, gradients and the optimiser's state."""
        return 0

    def finish(self) -> dict[str, Any]:
        """Training is over; returns figures of the method's own, as JSON values."""
        return {}


@dataclass(eq=False)
class _Course:
    """What is written down of a run."""

    curve: list[list[float]] = field(default_factory=list)
    bumps: list[float] = field(default_factory=list)
    moved: int = 0
    steps: list[float] = field(default_factory=list)


def new_loader(task: MethodTask, data: TaskData, seed: int) -> DataLoader[Any]:
    """The batches of a run, the same for each method: whole passes over the rows, each in an order of its own."""
    generator = np.random.default_rng([seed, 7])
    wanted, rows = task.steps * task.rows, len(data.train)
    passes = [generator.permutation(rows) for _ in range(math.ceil(wanted / rows))]
    order = np.concatenate(passes)[:wanted].tolist()
    return DataLoader(data.train, task.rows, sampler=order, collate_fn=data.collate)


def factor_at(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)


def train(task: MethodTask, driver: Driver, rate: float, seed: int, *, tuning: bool) -> dict[str, Any]:
    """Train a method's model, and judge it on held-out rows.

    Args:
        task: what is trained.
        driver: the method.
        rate: the peak of the learning rate.
        seed: of batches and dropout.
        tuning: whether it is judged on the rows for tuning, and not on those of results.

    Returns:
        Figures as JSON values; times are CPU seconds. `loss` is None if the run diverged; `untrained_loss` is the one
        before the first step.
    """
    data = load_data(task)
    judged = data.tuning if tuning else data.held_out
    loader, course = new_loader(task, data, seed), _Course()
    optimizer = torch.optim.AdamW(driver.parameters(), lr=rate, weight_decay=0.0)
    start = time.process_time()
    driver.begin(optimizer, loader, task.steps)
    setup_s = time.process_time() - start
    first, counter = driver.ranks(), find_energy_counter(driver.model.device)
    energy = counter.joules() if counter else 0.0
    sample = judged.select(range(min(CURVE_ROWS, len(judged))))
    course.curve.append([0, 0.0, evaluate(driver.model, sample, data, task)["loss"]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        _steps(task, driver, optimizer, loader, rate, course, sample, data)
    used = counter.joules() - energy if counter else None
    result = evaluate(driver.model, judged, data, task)
    shown = result if len(sample) == len(judged) else evaluate(driver.model, sample, data, task)
    course.curve.append([task.steps, sum(course.steps), shown["loss"]])
    facts = driver.finish()
    diverged = not math.isfinite(result["loss"])
    return {
        "loss": None if diverged else result["loss"],
        "accuracy": None if diverged else result["accuracy"],
        "untrained_loss": course.curve[0][2],
        "curve": [[step, round(s, 3), _finite(loss)] for step, s, loss in course.curve],
        "ranks_first": plan_text(first),
        "ranks": plan_text(driver.ranks()),
        "moved": course.moved,
        "bump": _finite(max(course.bumps, default=0.0)),
        "parameters": sum(p.numel() for name, p in driver.model.named_parameters() if _is_adapter(name, p)),
        "setup_s": round(setup_s, 3),
        "train_s": round(sum(course.steps), 3),
        "step_s": round(float(np.median(course.steps)), 5),
        "energy_j": used,
        **facts,
    }


def _steps(
    task: MethodTask,
    driver: Driver,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    rate: float,
    course: _Course,
    sample: Dataset,
    data: TaskData,
) -> None:
    marks = {round(task.steps * (index + 1) / task.curve) for index in range(task.curve - 1)}
    small = sample.select(range(min(2 * task.rows, len(sample))))
    for step, batch in enumerate(loader):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * factor_at(step, task.steps)
        driver.before_step(batch)
        loss = driver.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
        driver.gradients(loss.detach())
        optimizer.step()
        driver.stepped(step + 1)
        optimizer.zero_grad()
        changes = driver.changes(step + 1)
        spent = time.process_time() - start
        before = (driver.ranks(), evaluate(driver.model, small, data, task)["loss"]) if changes else None
        start = time.process_time()
        driver.cleared(step + 1)
        course.steps.append(spent + time.process_time() - start)
        if before is not None:
            course.moved += int(np.abs(driver.ranks() - before[0]).sum())
            course.bumps.append(evaluate(driver.model, small, data, task)["loss"] - before[1])
        if step + 1 in marks:
            shown = evaluate(driver.model, sample, data, task)["loss"]
            course.curve.append([step + 1, sum(course.steps), shown])


@torch.no_grad()
def evaluate(model: PeftModel, rows: Dataset, data: TaskData, task: MethodTask) -> dict[str, float]:
    """Mean loss and accuracy on some rows, without regularisers of a method; dropout and random state stay as they are.

    Accuracy is the share of classes, or of tokens, that are right; for a number, the share of its variance explained.
    """
    base: Any = model.get_base_model()
    base.eval()
    losses, weights, right = [], [], []
    for first in range(0, len(rows), 2 * task.rows):
        batch = data.collate([rows[index] for index in range(first, min(first + 2 * task.rows, len(rows)))])
        output = base(**batch)
        weight, correct = _judged(output.logits, batch["labels"], task)
        losses.append(float(output.loss) * weight)
        weights.append(weight)
        right.append(correct)
    base.train()
    total = sum(weights)
    return {"loss": sum(losses) / total, "accuracy": sum(right) / total}


def _judged(logits: torch.Tensor, labels: torch.Tensor, task: MethodTask) -> tuple[int, float]:
    """What a batch counts, and how much of that is right."""
    if task.kind == "regression":
        # The labels have a variance of 1.
        return len(labels), float(len(labels) - (logits.squeeze(-1) - labels).square().sum())
    if task.kind == "classification":
        return len(labels), float((logits.argmax(-1) == labels).sum())
    counted = labels[:, 1:] != -100
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & counted
    return int(counted.sum()), float(hits.sum())


def _is_adapter(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and "modules_to_save" not in name


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


WEIGHTS = Path(__file__).parents[1] / "weights"

NEOX = ProxyBase(
    "neox-8x64",
    "gpt_neox",
    8,
    ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
"""A family of its own beside the bases that ship with the package."""

_CUT = {"minilm-l3": 3, "smollm2-15": 15, "smollm2-8": 8}
"""How many of its lower layers are kept, where not all are."""


def new_base(task: MethodTask, labels: tuple[str, ...], seed: int) -> PreTrainedModel:
    """The model without adapters, in training mode.

    Args:
        task: decides the model and its head.
        labels: names of the classes; one for regression, none for texts.
        seed: of a new head.
    """
    if reads_bytes(task.model):
        return _byte_model(task.model).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(PACKAGED[task.model], task.kind, labels, tokenizer_of(task.model))
    if task.model in _CUT:
        _keep_layers(model, _CUT[task.model])
    return model.float().train()


def _byte_model(name: str) -> PreTrainedModel:
    """A proxy base, or the GPT-NeoX of the benchmarks, from which no policy has learned."""
    if name != NEOX.name:
        return load_base_model(name)
    return with_weights(NEOX, load_file(WEIGHTS / NEOX.name / "model.safetensors"))


def _keep_layers(model: PreTrainedModel, count: int) -> None:
    """Keep so many of the lower layers."""
    body: Any = model.base_model
    holder, name = (body.encoder, "layer") if hasattr(body, "encoder") else (body, "layers")
    setattr(holder, name, getattr(holder, name)[:count])
    model.config.num_hidden_layers = count


ALPHA = 16
"""`lora_alpha` of every module, as PEFT has it by default when ranks differ: the scaling is alpha / rank."""


def adapted_model(task: MethodTask, seed: int, ranks: dict[str, int] | None = None, **options: Any) -> PeftModel:
    """The task's model with fresh LoRA adapters, in training mode.

    Args:
        task: decides the model.
        seed: of adapters and head.
        ranks: of the adapted modules, by name; None for the reference rank on all linear ones.
        options: further ones of LoraConfig.
    """
    kind, labels = KINDS[task.kind], load_data(task).labels
    base = new_base(task, labels, seed)
    plan: dict[str, Any] = {"target_modules": "all-linear", "r": REFERENCE_RANK, "lora_alpha": ALPHA}
    if ranks is not None:
        first = next(iter(ranks.values()))
        plan |= {"target_modules": ",".join(ranks), "r": first}
        plan["rank_pattern"] = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != first}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fresh_adapters(base, task.model, kind.peft_type, new_head=kind.has_head, **plan | options).train()


def training_run(task: MethodTask, model: PeftModel, rate: float, seed: int) -> TrainingRun:
    """A run that is about to begin, as a plain loop gives it to rankpilot."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    loader = new_loader(task, load_data(task), seed)
    return TrainingRun.of_loader(model, optimizer, loader, total_steps=task.steps)


def by_name(ranks: IntArray, names: list[str]) -> dict[str, int]:
    """The adapted modules of a plan with their ranks."""
    return {name: int(rank) for name, rank in zip(names, ranks, strict=True) if rank > 0}
