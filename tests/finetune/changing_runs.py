"""Short runs of tiny models in which something changes, plain and with one saver, fresh and gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.savers.exact import ExactSavers
from rankpilot.cost.savers.prices import ACTIVATIONS, COPIES, ROUTED, TILES
from rankpilot.finetune.pilot import RankPilot
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

WORDS, WIDTH, LAYERS, FROZEN = 64, 16, 4, 2
ROWS, AT_ONCE, EPOCHS = 6, 2, 4
STEPS = ROWS // AT_ONCE * EPOCHS
CHANGE, RESUME = 7, 2
"""The steps before which something changes, and a run is gone on with."""

Batch = dict[str, torch.Tensor]
Loss = Callable[[Any, Batch, int], torch.Tensor]

HEADS: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_size": WIDTH}
# A cache lays keys and values out in another way, and products with dropout round with it.
HEADS |= {"use_cache": False}
EXPERTS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**HEADS, vocab_size=WORDS, intermediate_size=32)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**HEADS, **EXPERTS, vocab_size=WORDS, intermediate_size=32, moe_intermediate_size=12)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=2, use_cache=False, **NO_DROPOUT)
    ),
    "bert": lambda: BertForTokenClassification(
        BertConfig(**HEADS, **UNDROPPED, vocab_size=WORDS, intermediate_size=32, num_labels=5)
    ),
}
ADAPTED = {
    "llama": r".*layers\.[23]\..*(q_proj|v_proj|up_proj|down_proj)",
    "qwen3-moe": r".*layers\.[23]\..*(q_proj|v_proj)",
    "gpt2": r".*h\.[23]\..*(c_attn|mlp\.c_fc|mlp\.c_proj)",
    "bert": r".*layer\.[23]\..*(query|value|intermediate\.dense)",
}
EVERYWHERE = {name: pattern.replace("[23]", "[0123]") for name, pattern in ADAPTED.items()}


def layers_of(model: PeftModel) -> Any:
    """The layers of any of the models."""
    base = model.get_base_model()
    body = base.base_model
    return body.h if hasattr(body, "h") else body.encoder.layer if hasattr(body, "encoder") else body.layers


def mlp_of(layer: Any) -> list[nn.Module]:
    """The modules of a layer's MLP that hold weights."""
    inside = [layer.mlp] if hasattr(layer, "mlp") else [layer.intermediate, layer.output]
    if hasattr(inside[0], "experts"):  # whose router returns more than a tensor
        inside = [layer.self_attn.o_proj]
    return [each for one in inside for each in one.modules() if getattr(each, "weight", None) is not None]


def stacks(family: str) -> list[str]:
    """The parameters that hold experts of the upper layers."""
    names = [f"{layer}.mlp.experts.{name}" for layer in (2, 3) for name in ("gate_up_proj", "down_proj")]
    return names if family == "qwen3-moe" else []


def new_model(family: str, dtype: torch.dtype) -> PeftModel:
    """A model whose upper layers have adapters that do something already."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=ADAPTED[family], target_parameters=stacks(family))
    model = get_peft_model(MODELS[family]().to(dtype), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batches(family: str) -> list[list[Batch]]:
    """Batches of each epoch, with padding on the right."""
    generator, found = torch.Generator().manual_seed(1), []
    rows = [torch.randint(2, WORDS, (5 + 2 * i,), generator=generator) for i in range(ROWS)]
    for epoch in range(EPOCHS):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
        chosen = [[rows[i] for i in order[at : at + AT_ONCE]] for at in range(0, ROWS, AT_ONCE)]
        found.append([padded_rows(family, each) for each in chosen])
    return found


def padded_rows(family: str, rows: list[torch.Tensor]) -> Batch:
    """A batch of rows of token ids, with padding on the right."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    labels = (ids % 5 if family == "bert" else ids).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# What changes -----------------------------------------------------------------------------------------------------


def own_loss(model: Any, batch: Batch, step: int) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def other_masks(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """From one step on a token in the middle is masked, and later padding has a loss."""
    if step >= CHANGE:
        batch = {name: value.clone() for name, value in batch.items()}
        batch["attention_mask"][:, 1] = 0
    if step >= CHANGE + 2:
        batch["labels"] = batch["input_ids"] % 5
    return own_loss(model, batch, step)


def two_passes(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """A second pass of one row alone, without its padding."""
    length = int(batch["attention_mask"][0].sum())
    return own_loss(model, batch, step) + own_loss(model, {k: v[:1, :length] for k, v in batch.items()}, step)


def all_logits(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """A z-loss, which reads the logits of padding."""
    output = model(**batch)
    loss: torch.Tensor = output.loss + 0.1 * output.logits.float().logsumexp(-1).pow(2).mean()
    return loss


def all_logits_later(model: Any, batch: Batch, step: int) -> torch.Tensor:
    return (all_logits if step >= CHANGE else own_loss)(model, batch, step)


def hidden_states(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """From one step on, the loss reads what each layer returns."""
    if step < CHANGE:
        return own_loss(model, batch, step)
    output = model(**batch, output_hidden_states=True)
    loss: torch.Tensor = output.loss + 0.1 * torch.stack(output.hidden_states).float().pow(2).mean()
    return loss


def near_the_base(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """The distance to the model without adapters, over all tokens."""
    output = model(**batch)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).logits
    return output.loss + _distance(output.logits, base)


def near_another_adapter(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """The distance to an adapter of all layers, which comes in the middle of the run."""
    if step < CHANGE:
        return own_loss(model, batch, step)
    output = model(**batch)
    model.set_adapter("other")
    with torch.no_grad():
        other = model(**batch).logits
    model.set_adapter("default")
    return output.loss + _distance(output.logits, other)


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    one, other = (functional.log_softmax(each.float(), -1) for each in (one, other))
    return functional.kl_div(one, other, log_target=True, reduction="batchmean")


def embedded(model: Any, batch: Batch, step: int) -> torch.Tensor:
    """Every other step gives embeddings in place of tokens, moved a little."""
    if step % 2:
        return own_loss(model, batch, step)
    states = model.get_base_model().get_input_embeddings()(batch["input_ids"]).detach() + 0.01 * step
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return own_loss(model, {"inputs_embeds": states, **rest}, step)


def unfreeze(model: PeftModel) -> None:
    for module in mlp_of(layers_of(model)[FROZEN - 1]):
        module.requires_grad_(True)


def unfreeze_head(model: PeftModel) -> None:
    base = model.get_base_model()
    (base.get_output_embeddings() or base.classifier).requires_grad_(True)


@torch.no_grad()
def write_weights(model: PeftModel) -> None:
    for parameter in layers_of(model)[0].parameters():
        parameter.mul_(1.5)


def write_data(model: PeftModel) -> None:
    for module in mlp_of(layers_of(model)[0]):
        module.weight.data *= 1.5


def add_hook(model: PeftModel) -> None:
    mlp_of(layers_of(model)[0])[0].register_forward_hook(lambda module, inputs, output: 1.5 * output)


def add_pre_hook(model: PeftModel) -> None:
    model.get_base_model().get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: (inputs[0] + 1) % WORDS
    )


def drop(model: PeftModel) -> None:
    """Let a frozen layer drop numbers at random from now on."""
    layer = layers_of(model)[0]
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    if hasattr(layer, "self_attn"):
        layer.self_attn.attention_dropout = 0.5


def replace_a_module(model: PeftModel) -> None:
    layers = layers_of(model)
    name = "mlp" if hasattr(layers[0], "mlp") else "intermediate"
    other = copy.deepcopy(getattr(layers[1], name))
    for module in other.modules():
        vars(module).pop("forward", None)
    setattr(layers[0], name, other)


def replace_a_forward(model: PeftModel) -> None:
    module = mlp_of(layers_of(model)[0])[0]
    forward = module.forward
    module.forward = lambda inputs: 1.5 * forward(inputs)  # type: ignore[method-assign]


def add_adapter(model: PeftModel) -> None:
    kind = str(model.config.model_type).replace("_", "-")
    torch.manual_seed(7)
    lora = LoraConfig(r=2, target_modules=EVERYWHERE[kind], init_lora_weights=False, target_parameters=stacks(kind))
    model.add_adapter("other", lora)


def attend_otherwise(model: PeftModel) -> None:
    model.get_base_model().set_attn_implementation("eager")


def nothing(model: PeftModel) -> None:
    pass


@dataclass(frozen=True)
class Change:
    """What changes in a run.

    Attributes:
        once: done to the model before the step `CHANGE`.
        loss: of a batch.
        micro: batches of a step.
        evaluates: whether held-out losses are read after each epoch.
    """

    once: Callable[[PeftModel], None] = nothing
    loss: Loss = own_loss
    micro: int = 1
    evaluates: bool = False


CHANGES = {
    "a layer trains": Change(unfreeze),
    "the head trains": Change(unfreeze_head),
    "weights are written": Change(write_weights),
    "weights are written past versions": Change(write_data),
    "a hook": Change(add_hook),
    "a hook of the embeddings": Change(add_pre_hook),
    "dropout": Change(drop),
    "another module": Change(replace_a_module),
    "another forward": Change(replace_a_forward),
    "a second adapter": Change(add_adapter, near_another_adapter),
    "other attention": Change(attend_otherwise),
    "masks and labels": Change(loss=other_masks),
    "two passes": Change(loss=two_passes),
    "z-loss": Change(loss=all_logits),
    "z-loss later": Change(loss=all_logits_later),
    "hidden states": Change(loss=hidden_states),
    "KL to the base": Change(loss=near_the_base),
    "embeddings": Change(loss=embedded),
    "accumulation": Change(micro=2),
    "evaluations": Change(evaluates=True),
}


# Runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run did: losses, gradients and the weights at its end, and the lines that it told."""

    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


Saver = Callable[[PeftModel], Any]


@contextmanager
def _layers(model: PeftModel) -> Iterator[Callable[[], None]]:
    checkpointing = LayerCheckpointing(model)
    yield checkpointing.before_step
    checkpointing.put_back()


def _saver(name: str) -> Saver:
    @contextmanager
    def switched(model: PeftModel) -> Iterator[Callable[[], None]]:
        savers = ExactSavers(model, [name])
        yield lambda: None
        savers.put_back()

    return switched


@contextmanager
def plain(model: PeftModel) -> Iterator[Callable[[], None]]:
    """A run without rankpilot."""
    yield lambda: None


SAVERS: dict[str, Saver] = {
    "tiled loss": _saver(TILES),
    "input copies": _saver(COPIES),
    "routed rows": _saver(ROUTED),
    "selective": _saver(ACTIVATIONS),
    "whole layers": _layers,
}


def train(family: str, dtype: torch.dtype, change: Change, saver: Saver, *, resumed: bool) -> Outcome:
    """Train, as one run, or as one that ends after some steps and another that goes on from its checkpoint."""
    outcome, state, epochs = Outcome(), None, batches(family)
    for start, stop in [(0, RESUME), (RESUME, STEPS)] if resumed else [(0, STEPS)]:
        model = new_model(family, dtype)
        every = [parameter for name, parameter in model.named_parameters()]
        optimizer = torch.optim.SGD(every, lr=0.005, momentum=0.9)
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        with saver(model) as before_step:
            for step in range(start, stop):
                _step(model, optimizer, change, step, before_step, outcome, epochs)
        state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert (
        not [name for name, each in model.named_modules() if "forward" in vars(each)]
        or change.once is replace_a_forward
    )
    outcome.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return outcome


def _step(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    change: Change,
    step: int,
    before_step: Callable[[], None],
    outcome: Outcome,
    epochs: list[list[Batch]],
) -> None:
    def passes(batch: Batch) -> torch.Tensor:
        loss = change.loss(model, batch, step) / change.micro
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    before_step()
    take(model, optimizer, change, step, outcome, epochs, passes)


def take(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    change: Change,
    step: int,
    outcome: Outcome,
    epochs: list[list[Batch]],
    passes: Callable[[Batch], torch.Tensor],
    pilot: RankPilot | None = None,
) -> None:
    """Take a step, after what changes in it.

    Args:
        model: the model.
        optimizer: of all of its parameters.
        change: what changes.
        step: its number.
        outcome: gets losses and gradients.
        epochs: the batches.
        passes: runs a batch forward and backward; returns its loss.
        pilot: hears of the step.
    """
    if step == CHANGE:
        change.once(model)
    torch.manual_seed(step)
    epoch, place = divmod(step, ROWS // AT_ONCE)
    chosen = [epochs[epoch][(place + micro) % len(epochs[epoch])] for micro in range(change.micro)]
    if pilot:
        pilot.before_step(*chosen)
    outcome.losses += map(passes, chosen)
    outcome.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    if pilot:
        pilot.before_optimizer_step(outcome.losses[-1])
    optimizer.step()
    optimizer.zero_grad()
    if pilot:
        pilot.after_step()
    if change.evaluates and place == ROWS // AT_ONCE - 1:
        model.eval()
        with torch.no_grad():
            for batch in epochs[0]:
                output = model(**batch)
                outcome.losses += [output.loss, output.logits.float().sum()]
        model.train()
