"""Short fine-tunes for `rankpilot bench scaling`: one rank, one scaling and one learning rate on chosen modules."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..data.corpora import load_corpus, sample_windows
from ..data.labelled import LABELS, load_labelled
from ..data.models import load_model, load_tokenizer
from ..env.proxies.bases import PROXY_BASES, load_base_model
from ..lora.ladder import REFERENCE_RANK
from ..lora.resize import reset_adapters
from ..lora.targets import TargetModule, find_target_modules

Placement = Literal["all", "top half", "top quarter", "attention", "mlp"]

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm, the Trainer's default."""

_MLP = re.compile(r"mlp|intermediate|layer\.\d+\.output|fc")


@dataclass(frozen=True)
class Subject:
    """A model and what it learns.

    Attributes:
        model: a packaged model, or the name of a proxy base.
        layers: keep so many of its lower layers; None for all.
        data: labelled texts (a classification), or a corpus (language modelling).
        steps: optimiser steps of a run.
        rows: rows of a batch.
        length: tokens of a row.
        held_out: rows that a run is judged on.
        rate: a learning rate to begin the search with.
        ranks: the ranks of its cells.
        placements: its placements beside all modules.
    """

    model: str
    layers: int | None
    data: str
    steps: int
    rows: int
    length: int
    held_out: int
    rate: float
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    placements: tuple[Placement, ...] = ("top half", "top quarter", "attention", "mlp")

    @property
    def classifies(self) -> bool:
        """Whether it names the class of a text."""
        return self.data in LABELS


@dataclass(frozen=True)
class Setting:
    """How a run is trained, beside the learning rate.

    Attributes:
        rank: of every adapter.
        scaling: the factor in front of B A.
        placement: which modules are adapted.
        stretch: so many times the steps of the subject.
        weight_decay: AdamW's.
        dropout: on the adapters' inputs.
    """

    rank: int = REFERENCE_RANK
    scaling: float = 2.0
    placement: Placement = "all"
    stretch: int = 1
    weight_decay: float = 0.0
    dropout: float = 0.0


def chosen(targets: list[tuple[str, int]], placement: Placement) -> list[str]:
    """The modules of a placement.

    Args:
        targets: name and layer of each linear module inside a layer.
        placement: which ones; of the top quarter of few layers, one layer at least.
    """
    layers = 1 + max(layer for _, layer in targets)
    if placement in ("attention", "mlp"):
        return [name for name, _ in targets if bool(_MLP.search(_inside(name))) == (placement == "mlp")]
    share = {"all": 1.0, "top half": 0.5, "top quarter": 0.25}[placement]
    lowest = layers - max(1, round(share * layers))
    return [name for name, layer in targets if layer >= lowest]


def _inside(name: str) -> str:
    """The name from the layer on; BERT's `attention.output` is attention."""
    return re.sub(r"attention\.output", "attention.o", name)


@lru_cache(maxsize=2)
def _base(subject: Subject) -> tuple[Any, Any]:
    """The model of a subject, frozen and without dropout, and its tokenizer, None for a proxy base."""
    if subject.model not in PROXY_BASES:
        tokenizer = load_tokenizer(subject.model)
        labels = LABELS[subject.data] if subject.classifies else ()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the new head
            task: Any = "classification" if subject.classifies else "causal-lm"
            model: Any = load_model(subject.model, task, labels, tokenizer).float()
    else:
        tokenizer, model = None, load_base_model(subject.model)
    if subject.layers is not None:
        holder = next(m for m in model.modules() if isinstance(getattr(m, "layer", None), nn.ModuleList))
        holder.layer = holder.layer[: subject.layers]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model, tokenizer


@lru_cache(maxsize=1)
def _adapted(
    subject: Subject, placement: Placement, dropout: float
) -> tuple[PeftModel, list[TargetModule], dict[str, torch.Tensor]]:
    """The model with adapters on the modules of a placement, and the initial values of what trains beside them."""
    model, _ = _base(subject)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = {name: re.search(r"\.(\d+)\.", name) for name in linear}
    names = chosen([(name, int(found.group(1))) for name, found in layers.items() if found], placement)
    config = LoraConfig(r=REFERENCE_RANK, target_modules=names, lora_dropout=dropout)
    adapted = get_peft_model(model, config)
    head: dict[str, torch.Tensor] = {}
    if subject.classifies:
        for name, parameter in adapted.named_parameters():
            if ".classifier." in name:
                parameter.requires_grad_(True)
                head[name] = parameter.detach().clone()
    return adapted.train(), find_target_modules(adapted), head


def _release(model: PeftModel) -> None:
    """Take the adapters off again, so that the next placement begins with the plain model."""
    model.unload()
    base: Any = model.get_base_model()
    if hasattr(base, "peft_config"):
        del base.peft_config
    _adapted.cache_clear()


Batch = dict[str, torch.Tensor]


@lru_cache(maxsize=8)
def _batches(subject: Subject, seed: int, steps: int) -> tuple[list[Batch], list[Batch]]:
    """Batches to train on, and those that a run is judged on, which do not depend on the seed."""
    _, tokenizer = _base(subject)
    rows, length = subject.rows, subject.length
    parts = load_labelled(subject.data) if subject.classifies else load_corpus(subject.data)
    made = []
    for part, count, draws in zip(parts, (steps * rows, subject.held_out), (seed + 1, 0), strict=True):
        generator = np.random.default_rng([draws, count])
        batch = _classes(part, count, length, tokenizer, generator) if subject.classifies else None
        if batch is None:
            batch = _windows(part, count, length, tokenizer, generator)
            batch["labels"] = batch["input_ids"]
        made.append(
            [{key: value[start : start + rows] for key, value in batch.items()} for start in range(0, count, rows)]
        )
    return made[0], made[1]


def _classes(part: Any, count: int, length: int, tokenizer: Any, generator: np.random.Generator) -> Batch:
    picked = [part[index] for index in generator.integers(0, len(part), size=count)]
    texts = [text.decode("utf-8", "ignore") for text, _ in picked]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    kept = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    return {**kept, "labels": torch.tensor([number for _, number in picked])}


def _windows(part: Any, count: int, length: int, tokenizer: Any, generator: np.random.Generator) -> Batch:
    if tokenizer is None:
        return {"input_ids": sample_windows(part, count, length, generator)}
    start = int(generator.integers(0, max(1, len(part) - 400_000)))
    text = part[start : start + 400_000].tobytes().decode("utf-8", "ignore")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    starts = torch.from_numpy(generator.integers(0, len(tokens) - length, size=count))
    return {"input_ids": tokens[starts[:, None] + torch.arange(length)]}


def log_loss(subject: Subject, setting: Setting, rate: float, seed: int) -> float:
    """Train one run, and return the logarithm of its held-out loss; infinity if it diverges.

    Args:
        subject: model and data.
        setting: rank, scaling and placement.
        rate: peak of a linear decay.
        seed: of batches and adapters.
    """
    steps = subject.steps * setting.stretch
    train, held_out = _batches(subject, seed, steps)
    model, targets, head = _kept(subject, setting)
    reset_adapters(targets, setting.rank, seed)
    for target in targets:
        target.layer.scaling[target.adapter] = setting.scaling
    for name, parameter in model.named_parameters():
        if name in head:
            parameter.data.copy_(head[name])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=setting.weight_decay)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for step, batch in enumerate(train):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            loss = model(**batch).loss
            if not math.isfinite(float(loss.detach())):
                return math.inf
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        found = float(np.mean([float(model(**batch).loss) for batch in held_out]))
    model.train()
    return math.log(found) if math.isfinite(found) else math.inf


_last: list[tuple[Subject, Placement, float]] = []


def _kept(subject: Subject, setting: Setting) -> tuple[PeftModel, list[TargetModule], dict[str, torch.Tensor]]:
    """The adapted model, which stays until another placement is asked for."""
    wanted = (subject, setting.placement, setting.dropout)
    if _last and _last[0] != wanted:
        _release(_adapted(*_last.pop())[0])
    if not _last:
        _last.append(wanted)
    return _adapted(*wanted)


def share_of(subject: Subject, placement: Placement) -> float:
    """The share of a model's linear modules that a placement adapts."""
    counts = [len(_kept(subject, Setting(placement=each))[1]) for each in ("all", placement)]
    return counts[1] / counts[0]
