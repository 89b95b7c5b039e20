"""A run under rankpilot trains as the plain run does: what we switch, draw or try changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.common.errors import UnsupportedError
from rankpilot.decide.rules import AsConfigured
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from ..cases import first_cases
from .test_exact_parts import collate
from .tiny_runs import arguments, messages_of

WORDS, STEPS, ROWS, AT = 64, 4, 6, 2
"""Words, optimizer steps, rows of a step, and the steps after which something changes."""

NEAR = 2e-5
"""Of losses and weights: parts add up in another order."""

SIZES: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0}

Inputs = dict[str, torch.Tensor]


def texts() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, WORDS, length).tolist() for length in rng.integers(4, 30, ROWS * STEPS)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def new(lora: dict[str, Any] | None = None, **config: Any) -> PeftModel:
    set_seed(0)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | (lora or {})
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES | config)), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def with_module(kind: Callable[[nn.Module], nn.Module]) -> PeftModel:
    """A model with a module of the user around the MLP of its last layer."""
    model = new()
    layers(model)[-1].mlp = kind(layers(model)[-1].mlp)
    return model


def layers(model: PeftModel) -> Any:
    return model.get_base_model().model.layers


class After(TrainerCallback):
    """Does something to the model after the step `AT`, or before an optimizer step from there on."""

    def __init__(self, change: Callable[..., Any], *, each: bool = False) -> None:
        self.change, self.each = change, each

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == AT and not self.each:
            self.change(objects["model"], objects["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step >= AT and self.each:
            self.change(objects["model"], objects["optimizer"])


# What the user has ----------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """A run of a user.

    Attributes:
        model: makes the model.
        budget: under which no rank has to shrink.
        more: arguments of the Trainer, with a class as `kind`, or those of TrainingArguments as `args`.
        told: a word of a line that must be told; empty if there is nothing to tell.
        whole: True if steps must run whole in the end.
        noted: what the user's own code has seen in the run.
    """

    model: Callable[[], PeftModel] = new
    budget: str = "70%"
    more: dict[str, Any] = field(default_factory=dict)
    told: str = ""
    whole: bool = False
    noted: list[Any] = field(default_factory=list)


def after(change: Callable[..., Any], *, each: bool = False, **options: Any) -> Setting:
    return Setting(**options, more={"callbacks": [After(change, each=each)]})


def of_loss(loss: Callable[[Any, Inputs], torch.Tensor], budget: str = "70%", **options: Any) -> Setting:
    class Own(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            return loss(model, inputs)

    return Setting(budget=budget, more={"kind": Own, **options}, whole=True)


def of_args(**args: Any) -> Setting:
    return Setting(more={"args": args})


def packed_with_a_cache() -> Setting:
    own = {"data_collator": DataCollatorWithFlattening(), "args": {"use_cache": True}}
    return Setting(budget="400%", more=own, told="cache", whole=True)


def cache_of_a_prefix() -> Setting:
    def loss(model: Any, inputs: Inputs) -> torch.Tensor:
        given = model(input_ids=inputs["input_ids"][:, :3], use_cache=True).past_key_values
        rest = {"input_ids": inputs["input_ids"][:, 3:], "labels": inputs["labels"][:, 3:]}
        return model(**rest, cache=given).loss  # type: ignore[no-any-return]

    return of_loss(loss, "400%")


def cache_by_default() -> Setting:
    def loss(model: Any, inputs: Inputs) -> torch.Tensor:
        given = model(input_ids=inputs["input_ids"][:, :3]).past_key_values
        rest = {"input_ids": inputs["input_ids"][:, 3:], "labels": inputs["labels"][:, 3:]}
        return model(**rest, cache=given).loss  # type: ignore[no-any-return]

    return of_loss(loss, "400%", args={"use_cache": True})


class OwnNoise(nn.Module):
    """Draws from a generator that checkpointing does not restore."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.generator = inner, torch.Generator().manual_seed(0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + 0.1 * torch.randn(states.shape, generator=self.generator)  # type: ignore[no-any-return]


class Centered(nn.Module):
    """Subtracts a running mean."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, [0]
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(states) - self.mean
        if self.training and torch.is_grad_enabled():
            self.mean.mul_(0.9).add_(result.detach().mean((0, 1)), alpha=0.1)
        return result


def saliency() -> Setting:
    """A hook reads the gradients of the embeddings, which `enable_input_require_grads` lets have some."""
    seen: list[float] = []

    def made() -> PeftModel:
        model = new()
        model.enable_input_require_grads()

        def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: seen.__setitem__(slice(None), [round(float(gradient.norm()), 5)]))

        model.get_base_model().get_input_embeddings().register_forward_hook(note)
        return model

    return Setting(made, noted=seen, whole=True)


def samples() -> Setting:
    """A callback generates, and reads a loss and logits without a gradient."""
    seen: list[Any] = []

    def read(model: Any, optimizer: Any) -> None:
        ids = torch.arange(2, 8)[None]
        seen.append(model.generate(input_ids=ids, max_new_tokens=6, do_sample=True).tolist())
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        seen.extend([type(output.logits), round(float(output.loss), 3), round(float(output.logits[0, 0, 0]), 3)])

    setting = after(read)
    setting.noted = seen
    return setting


def of_nodes(model: Any, held: list[Any]) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
            node.register_prehook(lambda gradients: (gradients[0].clamp(-1e-3, 1e-3),))
            held.append(node)


def node_hooks() -> Setting:
    held: list[Any] = []
    return after(lambda model, optimizer: of_nodes(model, held), told="whole", whole=True)


def hooks_of(register: str) -> Setting:
    def clamped(value: torch.Tensor) -> torch.Tensor | None:
        if register == "register_hook":
            return value.clamp(-1e-3, 1e-3)
        value.grad.clamp_(-1e-3, 1e-3)  # type: ignore[union-attr]
        return None

    def hook(model: Any, optimizer: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                getattr(parameter, register)(clamped)

    return after(hook, told="whole", whole=True)


def module_hook(where: Callable[[Any], nn.Module], register: str, hook: Callable[..., Any]) -> Setting:
    return after(lambda model, _: getattr(where(model), register)(hook), told="whole", whole=True)


def frozen(word: str, value: bool = False) -> Setting:
    def change(model: Any, optimizer: Any) -> None:
        for name, parameter in model.named_parameters():
            if word in name:
                parameter.requires_grad_(value)

    return after(change)


class Drawing(torch.utils.data.Dataset[Any]):
    """Masks labels by its own generator and by the number of rows read so far."""

    def __init__(self) -> None:
        self.rows, self.generator, self.read = texts(), np.random.default_rng(3), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        row = self.rows[index]
        labels = [each if self.generator.random() < 0.7 else -100 for each in row["labels"]]
        return {"input_ids": row["input_ids"], "labels": [-100] * (self.read % 3) + labels[self.read % 3 :]}


def transformed() -> Setting:
    rng, data = np.random.default_rng(3), Dataset.from_list(texts())

    def masked(batch: Any) -> Any:
        labels = [[each if rng.random() < 0.7 else -100 for each in row] for row in batch["labels"]]
        return {"input_ids": batch["input_ids"], "labels": labels}

    data.set_transform(masked)
    return Setting(more={"train_dataset": data, "args": {"remove_unused_columns": False}})


def masking(draw: Callable[[Any], Any]) -> Setting:
    def masked(rows: list[Any]) -> Any:
        batch = collate(rows)
        return batch | {"labels": batch["labels"].masked_fill(torch.tensor(draw(batch["labels"].shape) < 0.3), -100)}

    return Setting(more={"data_collator": masked})


def noise_of_a_loss() -> Setting:
    rng = np.random.default_rng(3)

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        each = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return each * (1 + rng.random())

    return Setting(more={"compute_loss_func": loss}, whole=True)


def noise_of_a_hook() -> Setting:
    def made() -> PeftModel:
        model, generator = new(), torch.Generator().manual_seed(3)
        norm = model.get_base_model().model.norm
        norm.register_forward_hook(lambda module, inputs, output: output * (1 + torch.rand((), generator=generator)))
        return model

    return Setting(made, whole=True)


def two_groups() -> Setting:
    model = new()
    named = {word: [p for name, p in model.named_parameters() if word in name] for word in ("lora_A", "lora_B")}
    groups = [{"params": named["lora_A"], "lr": 1e-3}, {"params": named["lora_B"], "lr": 1.6e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    optimizer.register_step_pre_hook(lambda own, *_: [p.grad.mul_(0.5) for p in named["lora_B"]] and None)
    return Setting(lambda: model, more={"optimizers": (optimizer, None)})


@torch.no_grad()
def moved(model: Any, optimizer: Any) -> None:
    """Writes weights, frozen and trained, and another rate."""
    for parameter in layers(model)[0].parameters():
        parameter.mul_(1.1)
    for group in optimizer.param_groups:
        group["lr"] *= 3


def noise(model: Any, optimizer: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(0.01 * torch.randn_like(parameter.grad))


SETTINGS: dict[str, Callable[[], Setting]] = {
    "a cache and packed texts": packed_with_a_cache,
    "a cache that is passed": cache_of_a_prefix,
    "a cache by default": cache_by_default,
    "a layer draws its own numbers": lambda: Setting(
        partial(with_module, OwnNoise), "400%", told="checkpointed", whole=True
    ),
    "hooks on gradient nodes": node_hooks,
    "hooks on gradients": partial(hooks_of, "register_hook"),
    "hooks after gradients": partial(hooks_of, "register_post_accumulate_grad_hook"),
    "a layer is frozen": partial(frozen, "layers.0."),
    "a data set draws": lambda: Setting(more={"train_dataset": Drawing()}),
    "a loss draws": noise_of_a_loss,
    "a hook draws": noise_of_a_hook,
    "gradients of embeddings": saliency,
    "samples": samples,
    "A is frozen": partial(frozen, "lora_A"),
    "a norm trains": partial(frozen, "model.norm.", True),
    "a part of a data set draws": lambda: Setting(more={"train_dataset": Subset(Drawing(), range(ROWS * STEPS))}),
    "a transform draws": transformed,
    "a collator draws": lambda: masking(np.random.default_rng(3).random),
    "a running mean": lambda: Setting(partial(with_module, Centered), whole=True),
    "a hook on a layer": lambda: module_hook(lambda m: layers(m)[0], "register_forward_hook", lambda *a: 1.1 * a[2]),
    "a hook before a layer": lambda: module_hook(
        lambda m: layers(m)[0], "register_forward_pre_hook", lambda module, inputs: (1.1 * inputs[0],)
    ),
    "a hook on the head": lambda: module_hook(
        lambda m: m.get_base_model().lm_head, "register_forward_hook", lambda *a: 1.5 * a[2]
    ),
    "a backward hook": lambda: module_hook(
        lambda m: layers(m)[1].mlp,
        "register_full_backward_hook",
        lambda module, inputs, outputs: tuple(each.clamp(-1e-4, 1e-4) for each in inputs),
    ),
    "weights and rates move": lambda: after(moved),
    "noise on gradients": lambda: after(noise, each=True),
    "other attention": lambda: after(lambda model, _: model.get_base_model().set_attn_implementation("eager")),
    "two groups and a hook": two_groups,
    "hidden states": lambda: of_loss(
        lambda model, inputs: model(**inputs, output_hidden_states=True).hidden_states[1].pow(2).mean()
    ),
    "logits": lambda: of_loss(lambda model, inputs: model(**inputs).logits.float().logsumexp(-1).pow(2).mean()),
    "an input head": lambda: Setting(partial(new, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]})),
    "tied weights": lambda: Setting(partial(new, tie_word_embeddings=True)),
    "an adapter of embeddings": lambda: Setting(partial(new, {"target_modules": ["embed_tokens", "q_proj"]})),
    "DoRA": lambda: Setting(partial(new, {"use_dora": True})),
    "NEFTune": lambda: of_args(neftune_noise_alpha=5.0),
    "accumulation": lambda: of_args(gradient_accumulation_steps=2, max_steps=2),
    "smoothing": lambda: of_args(label_smoothing_factor=0.2, max_grad_norm=0.05),
    "the user's checkpointing": lambda: of_args(gradient_checkpointing=True),
    "evaluations": lambda: Setting(more={"args": {"eval_strategy": "steps", "eval_steps": 2}, "eval_dataset": texts()}),
}


@pytest.mark.parametrize("name", first_cases(16, list(SETTINGS)))
def test_a_run_trains_as_the_plain_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rankpilot.cost.streaming.PROCESSOR_LAUNCH", 0.0)  # as many parts as padding asks for
    caplog.set_level("INFO", "rankpilot")
    found: list[tuple[Any, ...]] = []
    for plain in (True, False):
        setting = SETTINGS[name]()
        more, model = dict(setting.more), setting.model()
        kind, args = more.pop("kind", Trainer), more.pop("args", {})
        settings = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "optim": "sgd", "learning_rate": 0.1}
        own = {"data_collator": collate, "train_dataset": texts()} | more
        trainer = kind(model, arguments(tmp_path, **settings | args), **own)
        if not plain:
            rankpilot.attach(trainer, AsConfigured(), setting.budget, keep_rate=True)
        trainer.train()
        history = trainer.state.log_history
        losses = [row[key] for row in history for key in ("loss", "eval_loss") if key in row]
        trains = {each: p.requires_grad for each, p in model.named_parameters()}
        weights = torch.cat([p.detach().flatten() for _, p in model.named_parameters()])
        parts = [row["parts"] for row in history if "parts" in row]
        found.append((losses, trains, weights, setting.noted, parts))
    (losses, trains, weights, noted, _), (other, others, now, seen, parts) = found
    assert other == pytest.approx(losses, abs=NEAR)
    assert torch.allclose(now, weights, rtol=0, atol=NEAR)
    assert (others, seen) == (trains, noted)
    if setting.told:
        assert messages_of(caplog, setting.told)
    assert len(parts) < STEPS if setting.whole or name == "NEFTune" else parts[-1] > 1


def test_packed_texts_see_each_other_in_a_loop_as_without_rankpilot() -> None:
    """The cache of transformers' default configuration is why; what it takes is in the prediction."""
    losses: list[list[float]] = []
    for budget in ("", "400%"):
        model = new()
        trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, pilot = torch.optim.SGD(trains, 0.1), rankpilot.RankPilot(AsConfigured(), budget or "1GiB")
        loader = DataLoader(texts(), batch_size=ROWS, collate_fn=DataCollatorWithFlattening())  # type: ignore[arg-type]
        if budget:
            pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=STEPS, in_parts=True))
        losses.append([])
        for batch in loader:
            if budget:
                pilot.before_step(batch)
            loss = model(**batch).loss
            loss.backward()
            if budget:
                pilot.before_optimizer_step(loss)
            optimizer.step()
            optimizer.zero_grad()
            if budget:
                pilot.after_step()
            losses[-1].append(loss.item())
        assert model.config.use_cache
    assert losses[0] == losses[1]
    (_, predicted, peak), *_ = pilot.checks
    assert 1 <= predicted / peak <= 1.02


def test_a_gradient_node_that_has_hooks_is_refused(tmp_path: Path) -> None:
    """Ranks are tried before training, in which it is lost."""
    model, held = new(), list[Any]()
    of_nodes(model, held)
    trainer = Trainer(model, arguments(tmp_path), data_collator=collate, train_dataset=texts())
    rankpilot.attach(trainer, AsConfigured(), "60%")
    with pytest.raises(UnsupportedError, match="gradient node of"):
        trainer.train()


def test_a_loss_that_takes_gradients_itself_is_refused(tmp_path: Path) -> None:
    class Adversarial(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            states = model.get_base_model().get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
            loss = model(inputs_embeds=states, labels=inputs["labels"]).loss
            (gradient,) = torch.autograd.grad(loss, states)
            return model(inputs_embeds=(states + 0.1 * gradient.sign()).detach(), labels=inputs["labels"]).loss

    trainer = Adversarial(new(), arguments(tmp_path), data_collator=collate, train_dataset=texts())
    rankpilot.attach(trainer, AsConfigured(), "60%")
    with pytest.raises(UnsupportedError, match="computes gradients itself"):
        trainer.train()
