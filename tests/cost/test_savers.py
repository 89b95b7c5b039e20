"""Exact savers: the same losses and gradients, bit for bit, in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot import Decision, Observation
from rankpilot.cost.cards import find_device_spec
from rankpilot.cost.cost import ByteCost
from rankpilot.cost.forecast.card_use import UNDER
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.cost.record.live_storages import LivePeak
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.savers.exact import SAVERS, ExactSavers
from rankpilot.cost.savers.later_logits import LaterLogits
from rankpilot.cost.savers.prices import ACTIVATIONS, CACHE, COPIES, TILES
from rankpilot.cost.step_config import StepConfig
from rankpilot.lora.adapters import signal_buffer_bytes
from rankpilot.lora.spec import plain_ranks
from rankpilot.lora.targets import find_target_modules
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from ..cases import first_cases
from .measured import adamw_run

WORDS, LENGTH = 1200, 101
SIZES: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES_OF_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
UNDROPPED = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)),
    # It caps its logits softly.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, head_dim=8, attn_implementation="eager")),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **UNDROPPED, num_attention_heads=4)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**SIZES_OF_VIT, **UNDROPPED, num_attention_heads=4, image_size=32, patch_size=8)
    ),
}
PRECISIONS = {
    "fp32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "bf16 autocast": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
}


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name]().to(dtype), LoraConfig(r=4, target_modules="all-linear", **options))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "labels": torch.arange(4) % 2}
    ids = torch.randint(2, WORDS, (4, LENGTH), generator=generator)
    labels = torch.arange(4) % 2 if name == "bert" else ids.masked_fill(torch.arange(LENGTH) < 5, -100)
    return {"input_ids": ids, "labels": labels}


Result = tuple[torch.Tensor, dict[str, torch.Tensor], int]


def step(model: nn.Module, batch: dict[str, Any], *, autocast: bool = False, scale: float = 1.0) -> Result:
    """The loss of a step, its gradients by name, and the bytes at its peak."""
    model.zero_grad()
    with LivePeak() as live:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(**batch).loss
        (loss * scale).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, live.peak


def assert_same(one: Result, other: Result, tolerance: float = 1e-6) -> None:
    """The same but for what products of fewer rows round otherwise: nothing on some processors, with one thread."""
    assert float(one[0]) == pytest.approx(float(other[0]), rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= tolerance * gradient.norm(), name


FAST = [
    *((name, "fp32") for name in MODELS),
    *(("llama", precision) for precision in PRECISIONS if precision != "fp32"),
]
FAST += [("t5", "autocast"), ("gpt2", "bf16")]


@pytest.mark.parametrize(
    ("name", "precision"),
    first_cases(len(FAST), sorted(product(MODELS, PRECISIONS), key=lambda pair: pair not in FAST)),
)
def test_losses_and_gradients_are_the_same(name: str, precision: str) -> None:
    """Bit for bit with shared copies, activations that run again and no cache; tiles may round otherwise."""
    dtype, autocast = PRECISIONS[precision]
    if name == "vit" and precision == "bf16":
        pytest.skip("its images are fp32")
    plain, saving, batch = adapted(name, dtype), adapted(name, dtype), batch_of(name)
    savers = ExactSavers(saving, [CACHE, COPIES])
    before, shared = (step(model, batch, autocast=autocast) for model in (plain, saving))
    assert_same(before, shared, 0.0)
    savers.take([CACHE, COPIES, ACTIVATIONS])
    again = step(saving, batch, autocast=autocast)
    assert_same(before, again, 0.0)
    assert again[2] <= shared[2]
    if name == "gpt2":
        assert again[2] < 0.95 * shared[2]
    savers.take(SAVERS)
    after = step(saving, batch, autocast=autocast)
    assert_same(before, after, 1e-6 if precision == "fp32" else 0.01)
    assert after[2] <= before[2]
    if name in ("llama", "qwen2", "gemma2", "gpt2"):
        assert after[2] < 0.8 * before[2]


@pytest.mark.parametrize("scale", first_cases(2, [1 / 3, 4.0, 1.0]))
@pytest.mark.parametrize("items", [None, 77, torch.tensor(77)])
def test_any_scale_of_the_loss_gives_the_same_gradients(scale: float, items: Any) -> None:
    """As accumulation and loss scalers have; the second step expects what came in the first."""
    further = {} if items is None else {"num_items_in_batch": items}
    plain, saving, batch = adapted("llama"), adapted("llama"), batch_of("llama") | further
    ExactSavers(saving)
    before = step(plain, batch, scale=scale)
    for _ in range(2):
        assert_same(before, step(saving, batch, scale=scale))


def test_the_same_graph_can_run_backward_twice() -> None:
    model = adapted("llama")
    ExactSavers(model)
    loss = model(**batch_of("llama")).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, trained, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)


# Logits that are made later -----------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[PeftModel, PeftModel]:
    """The same model twice; the second one makes its logits later."""
    plain, saving = adapted("gemma2"), adapted("gemma2")
    ExactSavers(saving, [TILES])
    return plain, saving


READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda logits: logits + 0,
    "float": lambda logits: logits.float() * 2,
    "argmax": lambda logits: logits.argmax(-1),
    "last token": lambda logits: logits[:, -1, :],
    "a column": lambda logits: logits[..., 3],
    "some columns": lambda logits: logits[:, 1:, 5:9],
    "new axis": lambda logits: logits[None],
    "rows": lambda logits: logits[:, :-1].reshape(-1, WORDS),
    "other rows": lambda logits: logits.view(2, -1, WORDS),
    "no rows": lambda logits: logits.reshape(-1),
    "numpy": lambda logits: torch.from_numpy(logits.detach().numpy()),
    "list": lambda logits: torch.tensor(logits[0, 0].tolist()),
    "stacked": lambda logits: torch.stack([logits, logits]),
    "log softmax": lambda logits: torch.log_softmax(logits, -1),
    "gathered": lambda logits: logits.gather(-1, torch.zeros(4, LENGTH, 1, dtype=torch.long)),
    "iterated": lambda logits: torch.stack([torch.logsumexp(row, -1) for row in logits]),
}


@pytest.mark.parametrize("name", list(READS))
def test_who_reads_the_logits_gets_them(pair: tuple[PeftModel, PeftModel], name: str) -> None:
    ids = batch_of("llama")["input_ids"]
    plain, saving = (model(input_ids=ids).logits for model in pair)
    assert isinstance(saving, LaterLogits)
    assert (saving.shape, saving.dtype, saving.device, saving.requires_grad) == (
        plain.shape,
        plain.dtype,
        plain.device,
        True,
    )
    expected, found = READS[name](plain), READS[name](saving)
    assert torch.equal(expected, found if not isinstance(found, LaterLogits) else found + 0)


def test_what_is_read_has_its_graph(pair: tuple[PeftModel, PeftModel]) -> None:
    ids = batch_of("llama")["input_ids"]
    for model in pair:
        model.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
    for one, other in zip(*(model.parameters() for model in pair), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)


def own_loss(logits: torch.Tensor, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """As many write it."""
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, WORDS), ids[:, 1:].reshape(-1), **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"weight": torch.ones(WORDS)}])
def test_a_loss_of_the_users_own(pair: tuple[PeftModel, PeftModel], options: dict[str, Any]) -> None:
    ids, results = batch_of("llama")["input_ids"], []
    for model in pair:
        model.zero_grad()
        with LivePeak() as live:
            loss = own_loss(model(input_ids=ids).logits, ids, **options)
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, live.peak))
    assert_same(*results)
    in_tiles = options.keys() <= {"reduction"}
    assert (results[1][2] < 0.8 * results[0][2]) is in_tiles


class KernelsLoss(torch.autograd.Function):
    """A mean loss as kernels compute it (Liger's, flash-attention's): its gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values, index = torch.log_softmax(logits.detach(), 1), (torch.arange(len(target)), target)
        gradient = values.exp()
        gradient[index] -= 1
        logits.detach().copy_(gradient / len(target))
        ctx.save_for_backward(logits)
        return -values[index].mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0].detach() * gradient, None


def test_a_loss_of_kernels(pair: tuple[PeftModel, PeftModel]) -> None:
    """Autograd's functions take logits without a word to Python; what they find and give back is right all the same."""
    ids, results = batch_of("llama")["input_ids"], []
    for model in pair:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        loss: Any = KernelsLoss.apply(logits[:, :-1].reshape(-1, WORDS), ids[:, 1:].reshape(-1))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_same(*results)


def test_generation_and_evaluation(pair: tuple[PeftModel, PeftModel]) -> None:
    ids = batch_of("llama")["input_ids"][:, :6]
    texts = [model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in pair]
    assert torch.equal(*texts)
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss for model in pair]
    assert torch.equal(*losses)


def test_heads_that_train_or_are_adapted_make_their_logits_at_once() -> None:
    for options in ({"modules_to_save": ["lm_head"]}, {"layers_to_transform": None, "target_modules": ["lm_head"]}):
        torch.manual_seed(0)
        model = get_peft_model(MODELS["llama"](), LoraConfig(r=4, **{"target_modules": ["q_proj"]} | options))
        ExactSavers(model)
        assert not isinstance(model(input_ids=batch_of("llama")["input_ids"]).logits, LaterLogits)


# Copies of inputs ----------------------------------------------------------------------------------------------------


def test_layers_that_drop_inputs_and_variants_copy_for_themselves() -> None:
    for options, shares in (({}, True), ({"lora_dropout": 0.1}, False), ({"use_dora": True}, False)):
        model = adapted("llama", torch.bfloat16, **options)
        ExactSavers(model, [COPIES])
        assert any("_cast_input_dtype" in vars(module) for module in model.modules()) is shares


def test_an_input_that_is_changed_is_copied_again() -> None:
    from rankpilot.cost.savers.input_copies import cast_once

    inputs = torch.ones(2, 3, dtype=torch.bfloat16)
    first, again = cast_once(inputs, torch.float32), cast_once(inputs, torch.float32)
    assert first is again
    inputs.add_(1)
    changed = cast_once(inputs, torch.float32)
    assert changed is not None
    assert changed.tolist() == [[2.0] * 3] * 2
    assert cast_once(None, torch.float32) is None
    assert cast_once(changed, torch.float32) is changed


# Selective checkpointing ----------------------------------------------------------------------------------------------


def wide_llama() -> PeftModel:
    """A Llama whose gates take most of the bytes."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 160, "num_hidden_layers": 3}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()


def nothing(cost: ByteCost) -> float:
    """What the least plan takes."""
    return 0.0


def test_activations_run_again_before_whole_layers() -> None:
    model, ids = wide_llama(), torch.arange(160).reshape(8, 20) % 64
    run = adamw_run(model, {"input_ids": ids, "labels": ids})
    savers, checkpointing, ranks = ExactSavers(model), LayerCheckpointing(model), np.full(len(run.targets), 4)
    plain = plain_ranks(run.targets)
    free = savers.price(run.calibrated, plain, each=False)
    bytes_of = free.saved[-1].step_bytes
    assert savers.within(bytes_of, free, run.calibrated, plain, nothing) is free
    assert savers.within(bytes_of - 1, free, run.calibrated, plain, lambda cost: bytes_of) is free, "no plan fits"
    found = savers.within(bytes_of - 1, free, run.calibrated, plain, nothing)
    assert savers.names[-1] == found.saved[-1].name == ACTIVATIONS
    assert found.saved[-1].step_bytes < 0.8 * bytes_of
    names = checkpointing.layers
    for count in (0, 1, len(names)):
        checkpointing.take(names)
        checkpointing.take(names[:count])
        predicted = found.memory.with_checkpointed(names[:count]).peak(ranks)
        assert 0 <= predicted / run.peak(ranks) - 1 <= (0.006 if count else 0), "but for the margin of second runs"


def test_activations_do_not_run_again_where_that_saves_nothing() -> None:
    """A rectifier holds its result alone, which the next adapter holds as well."""
    model, batch = adapted("t5"), batch_of("t5")
    run, savers = adamw_run(model, batch), ExactSavers(model, [COPIES])
    plain = plain_ranks(run.targets)
    free = savers.price(run.calibrated, plain)
    assert savers.within(0.0, free, run.calibrated, plain, nothing) is free
    assert ACTIVATIONS not in savers.names


def test_a_result_that_is_changed_is_held_itself() -> None:
    """Whatever a model does to it, what reads it has its numbers and its gradient."""
    model = wide_llama()
    act, gate, other = next(iter(model.base_model.model.model.layers)).mlp.act_fn, torch.randn(3, 4), torch.randn(3, 4)
    gate.requires_grad_(True)
    gradients = []
    for names in ((), (ACTIVATIONS,)):
        savers = ExactSavers(model, names)
        result = act(gate)
        product = other * result if names else result * other
        changed = (result * 1).mul_(2.0) * result[:, :1] + product
        changed.mul_(3.0)
        gradients.append(torch.autograd.grad(changed.sum(), gate)[0])
        savers.put_back()
    assert torch.equal(*gradients)


# On and off ----------------------------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> list[set[str]]:
    """What savers write into modules."""
    return [{"forward", "_cast_input_dtype", "_loss_function"} & set(vars(module)) for module in model.modules()]


def test_all_is_put_back(make_llama: Any) -> None:
    model = make_llama()
    model.config.use_cache = True
    before = attributes(model)
    savers = ExactSavers(model)
    assert savers.names == tuple(SAVERS)
    assert not model.config.use_cache
    savers.take([CACHE])
    assert savers.names == (CACHE,)
    savers.put_back()
    assert attributes(model) == before
    assert model.config.use_cache


def test_savers_that_a_model_cannot_have_are_off() -> None:
    """It has no logits of words, no second precision and no cache: none lowers its peak."""
    model, batch = adapted("vit"), batch_of("vit")
    before, told = attributes(model), list[str]()
    rows: Any = [{name: values[row] for name, values in batch.items()} for row in range(4)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    run = rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=1)
    pilot = rankpilot.RankPilot("top-down", "100%", gradient_checkpointing=False, tell=told.append)
    pilot.begin(run)
    assert attributes(model) == before
    assert not any("exact savers" in line for line in told)
    pilot.finish()


def test_a_compiled_model_keeps_its_own_loss_and_casts(make_llama: Any) -> None:
    assert ExactSavers(make_llama(), compiled=True).names == (CACHE,)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_has_them_while_it_lasts(wanted: bool) -> None:
    model = adapted("llama")
    before, told = attributes(model), list[str]()
    batch = batch_of("llama")
    loader: Any = torch.utils.data.DataLoader(
        [{"input_ids": row, "labels": row} for row in batch["input_ids"]], batch_size=2
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    pilot = rankpilot.RankPilot("top-down", "100%", exact_savers=wanted, tell=told.append)
    pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=4))
    assert isinstance(model(input_ids=batch["input_ids"]).logits, LaterLogits) is wanted
    assert any(line.startswith("A step of this LoRA takes ") and "With exact savers" in line for line in told) is wanted
    pilot.finish()
    assert attributes(model) == before


class RankFour:
    """The policy that gives all modules rank 4."""

    name = "rank four"

    def decide(self, observation: Observation) -> Decision:
        ranks = np.full(len(observation.names), 4)
        return Decision(ranks, np.zeros(len(ranks)), exact=True)


def test_a_run_does_what_its_configuration_told() -> None:
    """Inside the bytes of what fits a card, the same runs again, and takes as many bytes; then all is put back."""
    asked = StepConfig(batch_size=4, max_length=256, gradient_checkpointing=True)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).train()
    signals = signal_buffer_bytes(find_target_modules(model))

    def in_a_run(step: ConfiguredStep | None) -> ConfiguredStep:
        assert step is not None
        states = replace(step.memory.states, signals=signals)
        return replace(step, memory=replace(step.memory, states=states))

    step = from_config(config, asked, LoadedAs(device="cpu"), counted=True)
    free, lean = in_a_run(step), in_a_run(step.leaner())
    auto = replace(asked, gradient_checkpointing="auto")
    wide = Outlook(lean, 4, auto, card=find_device_spec("24GiB"))
    totals = [wide.choice(2, 4, layers).use for layers in ((), wide.checkpointable)]
    half = sum(use.total_bytes for use in totals if use) / 2
    card = find_device_spec(f"{half / (1 - UNDER['none']) / 2**20:.0f}MiB")
    told = Outlook(replace(free, leaner=lambda: lean), 4, auto, card=card)
    assert told.step is lean
    assert told.as_asked is not None
    assert len(told.as_asked.checkpointed) == 1
    loader: Any = torch.utils.data.DataLoader(
        [{"input_ids": row, "labels": row} for row in torch.ones(4, 256).long()], 4
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before, lines = attributes(model), list[str]()
    budget = f"{told.as_asked.step_bytes + 1024:.0f}B step"  # costs are whole bytes
    pilot = rankpilot.RankPilot(RankFour(), budget, tell=lines.append)
    pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=4))
    state = pilot.state_dict()
    assert state["savers"][-1] == ACTIVATIONS
    assert state["checkpointed"] == list(told.as_asked.checkpointed)
    assert np.array_equal(pilot.applier.ranks, told.as_asked.ranks)
    memory = pilot._piloted.guard.plan.now.memory
    assert memory is not None
    assert memory.peak(pilot.applier.ranks) == told.as_asked.step_bytes
    assert any(each.endswith("losses. Selective checkpointing is on, at some cost in time.") for each in lines)
    pilot.finish()
    assert attributes(model) == before
