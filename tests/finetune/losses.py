"""Losses of all kinds, with the Trainers that train on them: what `loss_matrix` is a matrix of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.loss import loss_utils
from transformers.models.bert.modeling_bert import BertPooler

from . import trainer_kinds as kinds

STEPS, BATCH, CLASSES, WORDS = 8, 16, 4, 64

Tensors = dict[str, Any]
Loss = Callable[[Any, Any, Tensors], torch.Tensor]


# Data -----------------------------------------------------------------------------------------------------------------


def mixed(rng: Any, count: int) -> Any:
    """Lengths of 6 to 30, and 15 % of 80 to 160."""
    return np.where(rng.random(count) < 0.15, rng.integers(80, 161, count), rng.integers(6, 31, count))


def of_one_length(rng: Any, count: int) -> Any:
    """Lengths of 24 but for 3 % of 60 to 120."""
    return np.where(rng.random(count) < 0.03, rng.integers(60, 121, count), 24)


def around_16(rng: Any, count: int, often: float) -> Any:
    """Lengths of batches that are 16 at most `often`, and else 40."""
    most = np.repeat(np.where(rng.random(count // BATCH) < often, 16, 40), BATCH)
    lengths = rng.integers(4, most + 1)
    lengths[::BATCH] = most[::BATCH]
    return lengths


@dataclass(frozen=True)
class Ask:
    """What a Trainer is built of: a folder, the seed of its data, and whether what is special in them is rare."""

    folder: Path
    seed: int
    rare: bool

    def rows(self, lengths: Any = mixed) -> list[Tensors]:
        """Rows of tokens, with a class that the first token tells, a weight, a group and features each."""
        rng, count = np.random.default_rng(100 + self.seed), STEPS * BATCH
        rows = []
        for length in lengths(rng, count):
            ids, special = rng.integers(4, WORDS, length), rng.random() < (0.07 if self.rare else 0.5)
            kind = CLASSES - 1 if special else int(ids[0]) % (CLASSES - 1)
            many = 64 if self.rare else 4
            row = {"input_ids": ids, "labels": kind, "weight": 30.0 if special else 1.0, "special": special}
            features = rng.normal(size=(16, 8)).astype(np.float32)
            rows.append(row | {"group": int(rng.integers(many)), "features": features, "spans": rng.integers(0, 6, 2)})
        return rows


def collated(rows: list[Tensors], *, left: bool = False, names: Sequence[str] = (), **labels: Any) -> Tensors:
    """A batch with padding, the columns of these names, and labels made of a row by functions."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: Any, fill: int = 0, to: int = length) -> Any:
        pad = np.full(to - len(values), fill)
        return np.concatenate([pad, values] if left else [values, pad])

    ids = np.stack([padded(row["input_ids"]) for row in rows])
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids > 0).long()}
    for name in names:
        batch[name] = torch.tensor(np.array([row[name] for row in rows]))
    for name, make in labels.items():
        made = [np.asarray(make(row)) for row in rows]
        if made[0].ndim and made[0].dtype.kind == "i":
            made = [padded(one, -100, max(map(len, made))) for one in made]
        batch[name] = torch.tensor(np.stack(made))
    return batch


by_class = partial(collated, names=("labels",))
everything = partial(collated, names=("labels", "weight", "special", "group"))
of_tokens = partial(collated, labels=lambda row: row["input_ids"])


# Models and Trainers --------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 0}
CAUSAL: Tensors = SIZES | {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DRY_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}


def bert(kind: Any = BertForSequenceClassification, head: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = kind(BertConfig(**SIZES | DRY | {"num_labels": CLASSES} | options))
    if head is not None:
        model.classifier = head
    return model


def llama(kind: Any = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**CAUSAL | options))


def trainer(ask: Ask, model: Any, collate: Any, kind: Any = Trainer, lengths: Any = None, **options: Any) -> Any:
    """A Trainer of a model with adapters, on rows of these lengths; `by_length`, long ones may be rare."""
    lengths = lengths or (of_one_length if options.pop("by_length", False) and ask.rare else mixed)
    more = {name: options.pop(name) for name in ("compute_loss_func", "callbacks") if name in options}
    heads = [name for name in ("classifier", "qa_outputs", "score") if hasattr(model, name)]
    targets = options.pop("targets", "all-linear")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=heads or None)
    lora.exclude_modules = rf".*({'|'.join(heads)})(\..*)?" if heads else None
    rows = ask.rows(lengths)
    args = TrainingArguments(str(ask.folder), **settings(ask) | options)
    adapted = get_peft_model(model, lora)
    return kind(adapted, args, train_dataset=rows, eval_dataset=rows[:BATCH], data_collator=collate, **more)


def settings(ask: Ask) -> Tensors:
    own = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 0.05, "optim": "sgd"}
    own |= {"lr_scheduler_type": "constant", "logging_steps": 1, "logging_nan_inf_filter": False, "seed": ask.seed}
    own |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 1.0}
    return own | {"remove_unused_columns": False, "dataloader_pin_memory": False, "per_device_eval_batch_size": BATCH}


def own_loss(loss: Loss, ask: Ask, *, collate: Any = everything, model: Any = bert, **options: Any) -> Any:
    """A Trainer whose `compute_loss` is a function of it, the model and the batch."""

    class OwnLoss(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            found = loss(self, model, inputs)
            return (found, {"logits": scores(model, inputs)}) if return_outputs else found

    return trainer(ask, model(), collate, options.pop("kind", OwnLoss), **options)


def scores(model: Any, batch: Tensors) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


# Losses in which rows meet --------------------------------------------------------------------------------------------


def each_row(logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def class_weights(trainer: Any, model: Any, batch: Tensors) -> torch.Tensor:
    return weighted(scores(model, batch), batch["labels"])


def weighted(logits: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    return functional.cross_entropy(getattr(logits, "logits", logits), labels, torch.tensor([1.0, 1.0, 1.0, 12.0]))


# Trainers that are something else than their loss ---------------------------------------------------------------------


def after_backward(change: Callable[[list[nn.Parameter]], object]) -> type[Trainer]:
    """A kind of Trainer that changes gradients after its backward pass."""

    class Changes(Trainer):  # type: ignore[misc]
        def training_step(self, *inputs: Any, **options: Any) -> Any:
            loss = super().training_step(*inputs, **options)
            change(list(self.model.parameters()))
            return loss

    return Changes


def clamp(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.clamp_(-2e-3, 2e-3)


CHANGES: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "clamps": clamp,
    "clips-norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05),
    "clips-value": lambda parameters: nn.utils.clip_grad_value_(parameters, 2e-3),
}


class Predicts(Trainer):  # type: ignore[misc]
    """Evaluates with class weights."""

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        with torch.no_grad():
            return class_weights(self, model, inputs), None, None


class Harmless(Trainer):  # type: ignore[misc]
    """Overrides what is no matter of the loss."""

    def log(self, *logs: Any, **options: Any) -> None:
        super().log(*logs, **options)


class Centered(nn.Module):
    """A head that subtracts a running mean, which its forward pass updates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZES["hidden_size"], CLASSES)
        self.register_buffer("mean", torch.zeros(CLASSES))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(hidden)
        if self.training:
            self.mean.mul_(0.7).add_(out.detach().mean(0), alpha=0.3)
        return 4 * (out - self.mean)


class Featured(BertForSequenceClassification):  # type: ignore[misc]
    """Reads features of 16 frames beside its text."""

    def forward(self, features: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        seen = (features * torch.linspace(1, 3, features.shape[1])[None, :, None]).sum(1)[:, :CLASSES]
        return {"loss": functional.cross_entropy(found.logits * (1 + seen.tanh()), labels), "logits": found.logits}


def clamped(ask: Ask) -> Any:
    """Hooks on parameters that clamp their gradients."""
    found = trainer(ask, bert(), by_class)
    for parameter in found.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient.clamp(-2e-3, 2e-3))
    return found


def hooked(ask: Ask, *, backward: bool) -> Any:
    """A hook on a module that takes the mean of the batch away, or scales its gradients to one size."""
    model = bert()
    if backward:
        model.bert.pooler.register_full_backward_hook(lambda m, into, out: (into[0] / (into[0].norm() + 1e-9),))
    else:
        model.bert.pooler.register_forward_hook(lambda m, inputs, out: out - 0.8 * out.mean(0))
    return trainer(ask, model, by_class)


class OwnWeights(TorchFunctionMode):
    """Class weights in each cross-entropy of torch."""

    def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function is functional.cross_entropy:
            return function(*given[:2], torch.tensor([1.0, 1.0, 1.0, 12.0]))
        return function(*given, **(named or {}))


def replaced(ask: Ask, undo: ExitStack, where: str) -> Any:
    """Class weights that are put in place of something of an object."""
    calls = where in ("loss_function", "mapping")  # as BERT does not
    found = trainer(ask, llama(LlamaForSequenceClassification, num_labels=CLASSES) if calls else bert(), by_class)
    base = found.model.get_base_model()
    if where == "loss_function":
        base.loss_function = lambda labels, pooled_logits, config, **_: weighted(pooled_logits, labels)
    elif where == "mapping":
        name = "ForSequenceClassification"
        own = {name: lambda labels, pooled_logits, config, **_: weighted(pooled_logits, labels)}
        undo.enter_context(patch.dict(loss_utils.LOSS_MAPPING, own))
    elif where == "cross_entropy":
        real = functional.cross_entropy
        own_weights = torch.tensor([1.0, 1.0, 1.0, 12.0])
        undo.enter_context(patch.object(functional, "cross_entropy", lambda x, y, *a, **b: real(x, y, own_weights)))
    elif where == "mode":
        undo.enter_context(OwnWeights())
    elif where == "hook_on_all":
        taken = nn.modules.module.register_module_forward_hook(
            lambda m, inputs, out: out - 0.8 * out.mean(0) if isinstance(m, BertPooler) else None
        )
        undo.callback(taken.remove)
    elif where == "backward":
        backward = found.accelerator.backward
        found.accelerator.backward = lambda loss, **own: backward(loss.square(), **own)
    elif where == "compute_loss":
        found.compute_loss = lambda model, inputs, *_, **__: class_weights(found, model, inputs)
    else:
        forward = base.forward

        def weighs(labels: Any = None, **inputs: Any) -> Any:
            out = forward(**inputs)
            return {"loss": weighted(out.logits, labels), "logits": out.logits}

        base.forward = weighs
    return found


def trl_of(make: Any, ask: Ask, **options: Any) -> Any:
    """A Trainer of TRL, on texts some of which are long."""
    kinds.word_tokenizer()
    times = np.where(np.random.default_rng(ask.seed).random(len(kinds.TEXTS)) < 0.2, 8, 1)
    own = settings(ask) | {"per_device_train_batch_size": 8, "learning_rate": 0.3, "max_length": 256, "bf16": False}
    del own["remove_unused_columns"]
    with patch.object(kinds, "TEXTS", [text * count for text, count in zip(kinds.TEXTS, times, strict=True)]):
        return make(ask.folder, **own | options)


# Kinds of models and batches ----------------------------------------------------------------------------------------


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))


def bart() -> Any:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIDE.items()}
    sizes = {"vocab_size": WORDS, "d_model": 64, "max_position_embeddings": 256, "init_std": 0.1, **sides}
    return BartForConditionalGeneration(BartConfig(**sizes, dropout=0.0, pad_token_id=0, forced_eos_token_id=None))


BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


def mixtral() -> Any:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**CAUSAL | experts, router_aux_loss_coef=1.0))


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2 | DRY_GPT2))


def phi3() -> Any:
    """A rope whose frequencies depend on whether the longest row is longer than 40."""
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, **factors}
    own = {"rope_parameters": rope, "original_max_position_embeddings": 40}
    return Phi3ForCausalLM(Phi3Config(**CAUSAL | own))


def dynamic() -> Any:
    """A rope whose frequencies depend on the longest row where it is longer than 32."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return llama(max_position_embeddings=32, rope_parameters=rope)


def some_class(row: Tensors) -> int:
    """A class that no loss counts where a row is special."""
    return -100 if row["special"] else row["input_ids"][0] % CLASSES


def seldom_labels(row: Tensors) -> Any:
    """Labels of a third of the tokens, and of none where a row is special."""
    counted = (np.arange(len(row["input_ids"])) % 3 == 0) & (not row["special"])
    return np.where(counted, row["input_ids"], -100)


def spans(end: int, row: Tensors) -> Any:
    """An answer's end, which lies far behind the row where that is special."""
    return row["spans"][end] + (50 if row["special"] else 0)


answers = partial(collated, start_positions=partial(spans, 0), end_positions=partial(spans, 1))
labelled = partial(collated, labels=seldom_labels)
tags = partial(collated, labels=lambda row: row["input_ids"] % CLASSES)
numbers = partial(collated, labels=lambda row: np.float32(row["labels"] / 2))
several = partial(collated, labels=lambda row: (row["input_ids"][:CLASSES] % 2).astype(np.float32))
answered = partial(collated, labels=lambda row: row["input_ids"][: 3 + len(row["input_ids"]) // 4])
framed = partial(collated, names=("labels", "features"))
unmasked = lambda rows: {name: value for name, value in by_class(rows).items() if name != "attention_mask"}  # noqa: E731


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(SIZES["hidden_size"]), nn.Linear(SIZES["hidden_size"], CLASSES))


def framed_in(build: Callable[..., Any], ask: Ask, **options: Any) -> Any:
    """A Trainer of texts with features of 16 frames, which have 16 tokens in some batches."""
    lengths = partial(around_16, often=0.3 if ask.rare else 0.9)
    return build(ask, collate=framed, lengths=lengths, train_sampling_strategy="sequential", **options)


def featured(ask: Ask, collate: Any, **options: Any) -> Any:
    return trainer(ask, bert(Featured), collate, **options)
