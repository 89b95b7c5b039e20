"""One fine-tune in one or several processes, with a script of ranks, and what is to be known of each process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.decide.observation import RUN_FEATURES, Observation
from rankpilot.decide.policy import Decision, decision_from_plan
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.callback import RankPilotCallback, attach
from rankpilot.finetune.step.replicas import digest_of
from rankpilot.lora.targets import find_target_modules
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from .tiny_runs import arguments

LAYERS, WORDS, LENGTH, ROWS = 4, 64, 16, 8
CYCLE = (0, 4, 8, 12)
"""Ranks of the layers, which go round by one layer at each decision: each time one is dropped and another revived."""


class Round:
    """Gives the layers the ranks of the cycle, one further at each decision."""

    name = "round"

    def decide(self, observation: Observation) -> Decision:
        left = round(DECISIONS * float(observation.run[RUN_FEATURES.index("decisions_left")]))
        number = DECISIONS - 1 - left
        return decision_from_plan(np.array([CYCLE[(block + number) % LAYERS] for block in observation.problem.blocks]))


DECISIONS = 5
SCHEDULE = DecisionSchedule(fractions=(0.0, 0.2, 0.4, 0.6, 0.8), max_step=10, probe_steps=2)


@dataclass(frozen=True)
class Setting:
    """A fine-tune.

    Attributes:
        folder: the Trainer's.
        steps: of the optimiser.
        rows: of a step, over all processes and accumulated batches.
        dtype: of model and adapters.
        policy: a rule by name; by default `Round`.
        budget: by default just what `Round` takes.
        lora: further settings of the adapters.
        lengths: whether texts have different lengths.
        arguments: further ones of the Trainer.
        handler: what is written into accelerate's settings of DDP.
        callbacks: further ones.
        callback: options of `attach`.
        resume: the checkpoint to go on from.
    """

    folder: Path
    steps: int = 30
    rows: int = ROWS
    dtype: torch.dtype = torch.float32
    policy: str | None = None
    budget: str | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    lengths: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    handler: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callable[[RankPilotCallback], TrainerCallback], ...] = ()
    callback: dict[str, Any] = field(default_factory=dict)
    resume: str | bool | None = None


def texts(lengths: bool) -> Dataset:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(256):
        stride, start = (int(part) for part in generator.integers(1, 7, size=2))
        length = LENGTH // 2 + number % (LENGTH // 2) + 1 if lengths else LENGTH
        ids = [(start + stride * place) % WORDS for place in range(length)]
        rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    masks = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(masks),
    }


def make_model(setting: Setting) -> PeftModel:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    lora = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"} | setting.lora
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**lora)).to(setting.dtype)


def budget_of(model: PeftModel) -> str:
    targets = find_target_modules(model)
    return f"{sum((t.d_in + t.d_out) * CYCLE[t.block % LAYERS] for t in targets)} params"


def states_of(optimizer: Any) -> dict[int, dict[str, Any]]:
    """The tensors that an optimizer keeps of each parameter, by its place."""
    states = optimizer.state_dict()["state"]
    return {at: {name: tensor.clone().numpy() for name, tensor in state.items()} for at, state in states.items()}


class Watch(TrainerCallback):
    """Notes losses, adapters and ranks after each step."""

    def __init__(self, pilot: RankPilotCallback) -> None:
        self.pilot = pilot
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self.digests: dict[int, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]
        if "eval_loss" in logs:
            self.evaluations[state.global_step] = logs["eval_loss"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.pilot.applier is not None
        self.digests[state.global_step] = digest_of(self.pilot.applier.targets)


def train(setting: Setting) -> dict[str, Any]:
    """Train as each of the processes does; returns what is to be compared."""
    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    model = make_model(setting)
    accumulation = setting.arguments.get("gradient_accumulation_steps", 1)
    settings = {"max_steps": setting.steps, "per_device_train_batch_size": setting.rows // count // accumulation}
    settings |= {"learning_rate": 2e-3, "ddp_backend": "gloo" if count > 1 else None, "dataloader_pin_memory": False}
    trainer = Trainer(
        model=model,
        args=arguments(setting.folder, **settings | setting.arguments),
        train_dataset=texts(setting.lengths),
        eval_dataset=texts(setting.lengths).select(range(16)),
        data_collator=collate,
    )
    budget, further = setting.budget or budget_of(model), {"measure_every": 10, "schedule": SCHEDULE}
    pilot = attach(trainer, setting.policy or Round(), budget, **further | setting.callback)
    watch = Watch(pilot)
    for callback in (watch, *(make(pilot) for make in setting.callbacks)):
        trainer.add_callback(callback)
    for name, value in setting.handler.items():
        setattr(trainer.accelerator.ddp_handler, name, value)
    trainer.train(resume_from_checkpoint=setting.resume)
    weights = {name: p.detach().cpu().clone().numpy() for name, p in model.named_parameters() if p.requires_grad}
    weights |= {f"{at} {name}": x for at, each in states_of(trainer.optimizer).items() for name, x in each.items()}
    return {
        "losses": watch.losses,
        "evaluations": watch.evaluations,
        "digests": watch.digests,
        "weights": weights,
        "ranks": [int(rank) for rank in pilot.applier.ranks],  # type: ignore[union-attr]
        "predictions": pilot.predictions,
        "peaks": pilot.peaks,
        "checks": pilot.pilot.checks,
        "limit": pilot.limit,
        "graphs": counters["stats"]["unique_graphs"],
    }
