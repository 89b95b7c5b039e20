"""Runs of a Trainer on a tiny Llama, each as a new process would make it, and what they did."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from traceback import walk_stack
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rankpilot.decide.log import DecisionLog
from rankpilot.finetune.callback import attach
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

TOKENS = torch.arange(24).view(2, 12)

PLAIN: dict[str, Any] = {"exact_savers": False, "gradient_checkpointing": False}
"""Options of a pilot under which a step takes what it takes without rankpilot: no exact savers, no layer runs again."""


@pytest.fixture(scope="module")
def llama_config(llama_config: LlamaConfig) -> LlamaConfig:
    """A Llama of one layer, for modules to whose tests its depth does not matter: they import this."""
    config = deepcopy(llama_config)
    config.num_hidden_layers = 1
    return config


def counting(count: int = 40, length: int = 12) -> list[dict[str, list[int]]]:
    """Rows that count in strides."""
    return [{"input_ids": ids, "labels": ids} for ids in ([i * j % 64 for i in range(length)] for j in range(count))]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Four steps of four rows on the processor; checkpoints are saved if they are asked for."""
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "save_strategy": "steps" if "save_steps" in options else "no"}
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(folder), **settings | options)


def new_base(config: LlamaConfig) -> LlamaForCausalLM:
    """The base model of all runs: the same weights at every call."""
    set_seed(0)
    return LlamaForCausalLM(config)


def adapted(config: LlamaConfig, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    """The base model with adapters of rank 8 on all modules."""
    base, autocast = new_base(config).to(dtype), lora.pop("autocast_adapter_dtype", True)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | lora
    return get_peft_model(base, LoraConfig(**settings), autocast_adapter_dtype=autocast)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def take_step(pilot: RankPilot, optimizer: Any, batch: Any, loss: Callable[[Any], torch.Tensor]) -> float:
    """A step of a loop of one's own; returns its loss."""
    pilot.before_step(batch)
    total = torch.zeros(())
    for part, share in pilot.parts(batch):
        value = share * loss(part)
        value.backward()  # type: ignore[no-untyped-call]
        total = total + value.detach()
    pilot.before_optimizer_step(total)
    optimizer.step()
    optimizer.zero_grad()
    pilot.after_step()
    return float(total)


def ranks_of(model: torch.nn.Module) -> dict[str, int]:
    return adapter_ranks(find_target_modules(model))


def is_measured() -> bool:
    """Whether the code that runs is part of a measured step, which is none of the run."""
    return any(frame.f_code is TrainingRun.measured.__code__ for frame, _ in walk_stack(None))


def messages_of(caplog: pytest.LogCaptureFixture, word: str = "") -> list[str]:
    """What rankpilot has logged, as far as a word is in it."""
    return [row.message for row in caplog.records if row.name.startswith("rankpilot") and word in row.message]


class Recorder(TrainerCallback):
    """Keeps losses, ranks, gradient norms and compiled graphs; calls a function of the step at the end of each."""

    def __init__(self, at_step: Callable[[int], object]) -> None:
        self.at_step = at_step
        self.losses: list[float] = []
        self.ranks: list[dict[str, int]] = []
        self.norms: list[dict[str, float]] = []
        self.graphs: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        gradients = {name: p.grad for name, p in objects["model"].named_parameters() if p.grad is not None}
        self.norms.append({name: float(gradient.norm()) for name, gradient in gradients.items()})

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.ranks.append(ranks_of(objects["model"]))
        self.graphs.append(counters["stats"]["unique_graphs"])
        self.at_step(state.global_step)


def save_loop(pilot: RankPilot, run: TrainingRun, path: Path) -> None:
    """Save what a loop of one's own needs to go on, as docs/your-script.md does; all processes call this."""
    state = pilot.state_dict()
    if run.replicas.processes.first:
        adapter = get_peft_model_state_dict(run.model, save_embedding_layers=False)
        torch.save({"adapter": adapter, "optimizer": run.optimizer.state_dict(), "pilot": state}, path)


def load_loop(pilot: RankPilot, run: TrainingRun, path: Path) -> int:
    """Go on from what `save_loop` has saved; return the number of steps done."""
    saved = torch.load(path)
    set_peft_model_state_dict(run.model, saved["adapter"])
    run.optimizer.load_state_dict(saved["optimizer"])
    return pilot.load_state_dict(run, saved["pilot"])


ATTACHED = {"schedule", "measure_every", "bounds", "fresh", "log", "keep_rate", "exact_savers", "parts"}
"""Options of a run that are those of `attach`; the others are the Trainer's."""


class Run:
    """A Trainer with a recorder and a pilot, or without the pilot if there is no budget; see `PLAIN` for `plain`.

    There are no exact savers unless they are asked for: each is measured, which takes as long as all steps. Steps run
    as a whole unless they are wanted in parts: then one row limits the plan.
    """

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        *,
        policy: Any = "signal-mean",
        budget: Any = "80%",
        plain: bool = False,
        data: Any = None,
        lora: dict[str, Any] | None = None,
        trainer: type[Trainer] = Trainer,
        eval_data: Any = None,
        collate: Any = None,
        optimizer: Callable[..., Any] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
        at_step: Callable[[int], object] = lambda step: None,
        prepare: Callable[[Any], object] = lambda model: None,
        **options: Any,
    ) -> None:
        self.folder, self.config, self.model = folder, config, adapted(config, **lora or {})
        prepare(self.model)
        attached: dict[str, Any] = {"exact_savers": False, "parts": "off"}
        attached |= {name: options.pop(name) for name in ATTACHED & options.keys()}
        attached |= PLAIN if plain else {}
        attached["learning_rate"] = options.pop("learning_rate_option", None)  # `learning_rate` is the Trainer's
        self.recorder = Recorder(at_step)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.trainer = trainer(
            model=self.model,
            args=arguments(folder, **options),
            data_collator=collate,
            train_dataset=counting(96) if data is None else data,
            eval_dataset=eval_data,
            optimizers=(optimizer(trainable) if optimizer else None, None),
            callbacks=[*callbacks, self.recorder],
        )
        self.pilot: Any = attach(self.trainer, policy, budget, **attached) if budget else None

    def train(self, resume: int | Path | str | bool | None = None) -> Run:
        """Train, or go on from a checkpoint: that of a step, in a folder, or the last one."""
        checkpoint = self.checkpoint(resume) if type(resume) is int else resume
        self.trainer.train(resume_from_checkpoint=str(checkpoint) if isinstance(checkpoint, Path) else checkpoint)
        return self

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    @property
    def log(self) -> Any:
        return DecisionLog(self.folder / "decisions").to_pandas()

    @property
    def decided(self) -> list[int]:
        """The steps after which ranks were decided or corrected."""
        return [step for step, _ in self.pilot.predictions]

    @property
    def highest(self) -> int:
        """The highest peak that was measured."""
        return max(peak for _, peak in self.pilot.peaks)

    def plain(self, adapter: Path) -> PeftModel:
        """The adapter of a folder in plain PEFT, on the base model."""
        return PeftModel.from_pretrained(new_base(self.config), str(adapter))

    def assert_same_adapter(self, other: Run) -> None:
        there = dict(other.model.named_parameters())
        for name, value in self.model.named_parameters():
            assert torch.equal(value, there[name]), name
