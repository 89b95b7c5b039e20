"""The base in main memory: losses and gradients equal bit for bit, two layers on the device, nothing ever lost."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.common.errors import ConfigError, UnsupportedError
from rankpilot.cost.savers import streamed_base
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.savers.exact import ExactSavers
from rankpilot.cost.savers.streamed_base import StreamedBase, stream_base, streamable_layers, streaming_of
from rankpilot.cost.training_step import switch_checkpointing
from torch import nn

CPU, LAYERS = torch.device("cpu"), 4

_TEXT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
_LLAMA: dict[str, Any] = _TEXT | {"intermediate_size": 48, "num_key_value_heads": 2}

FAMILIES: dict[str, t.PreTrainedConfig] = {
    "llama": t.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "qwen3": t.Qwen3Config(**_LLAMA, head_dim=8),
    "gemma2": t.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=8),
    "mixtral": t.MixtralConfig(**_LLAMA, num_local_experts=4, output_router_logits=True),
    "gpt2": t.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=LAYERS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gpt-neox": t.GPTNeoXConfig(**_TEXT, intermediate_size=48),
    "bert": t.BertConfig(**_TEXT, intermediate_size=48, is_decoder=True),
    "t5": t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
}
MODES = ("plain", "selective", "layers", "reentrant", "accumulation", "evaluation between")


@pytest.fixture(autouse=True)
def _all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream the weights of tiny layers too."""
    monkeypatch.setattr(streamed_base, "LEAST_BYTES", 1)


def adapted(config: t.PreTrainedConfig) -> PeftModel:
    torch.manual_seed(0)
    kind = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
    targets: Any = "all-linear"
    model = get_peft_model(kind.from_config(copy.deepcopy(config)), LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def streamed(model: nn.Module) -> StreamedBase:
    return StreamedBase(model, [*streamable_layers(model).values()], CPU)


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def check_whole(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), name


def train(model: PeftModel, mode: str = "plain", *, autocast: bool = False, steps: int = 3) -> list[float]:
    """Losses of some steps, and the sum of all gradients; the adapters are left as they are trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    savers = ExactSavers(model) if mode == "selective" else None
    if savers:
        savers.take(savers.names)
    if mode in ("layers", "reentrant"):
        switch_checkpointing(model.get_base_model(), True, reentrant=mode == "reentrant")
        model.get_base_model().enable_input_require_grads()
    told = []
    for step in range(steps):
        for micro in range(2 if mode == "accumulation" else 1):
            torch.manual_seed(10 * step + micro)
            ids = torch.randint(0, 64, (2, 12))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            told.append(float(loss.detach()))
        told += [float(p.grad.double().sum()) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        if mode == "evaluation between":
            with torch.no_grad():
                told.append(float(model.eval()(input_ids=ids, labels=ids).loss))
            model.train()
    if savers:
        savers.put_back()
    return told


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_equal_bit_for_bit(family: str, mode: str) -> None:
    for autocast in (False, True):
        plain, other = adapted(FAMILIES[family]), adapted(FAMILIES[family])
        before, streaming = frozen(other), streamed(other)
        assert train(plain, mode, autocast=autocast) == train(other, mode, autocast=autocast)
        check_whole(other, before)
        streaming.put_back()
        check_whole(other, before)
        for one, two in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
        assert train(plain) == train(other)  # in plain code


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_four_bits_with_their_scales(tmp_path: Path, reentrant: bool | None) -> None:
    pytest.importorskip("bitsandbytes")
    config = t.LlamaConfig(**_LLAMA | {"hidden_size": 64, "intermediate_size": 128})
    t.LlamaForCausalLM(config).save_pretrained(tmp_path)
    four_bit = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def loaded() -> PeftModel:
        torch.manual_seed(0)
        base = t.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit)
        return get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).train()

    plain, other = loaded(), loaded()
    mode = "plain" if reentrant is None else "reentrant" if reentrant else "layers"
    streaming = streamed(other)
    layer = streaming.layers[0].module
    assert streaming.layers[0].bytes > sum(p.nbytes for p in layer.parameters() if not p.requires_grad)  # with scales
    assert train(plain, mode) == train(other, mode)
    streaming.put_back()
    assert train(plain, mode) == train(other, mode)


@pytest.fixture
def llama() -> PeftModel:
    return adapted(FAMILIES["llama"])


def test_two_layers_at_most_are_on_the_device(llama: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    streaming, most = streamed(llama), list[int]()
    visit = StreamedBase.visit

    def watched(self: StreamedBase, *arguments: Any) -> None:
        visit(self, *arguments)
        most.append(self.device_bytes)
        used = sum(each._here.untyped_storage().nbytes() for layer in self.layers for each in layer.weights)
        assert used == self.device_bytes

    monkeypatch.setattr(StreamedBase, "visit", watched)
    train(llama, steps=1)
    layer = streaming.layers[0].bytes
    assert max(most) == 2 * layer
    assert streaming.main_memory_bytes - streaming.away_bytes == 2 * layer
    assert streaming.copied_bytes == 2 * (LAYERS - 1) * layer + layer


def test_layers_that_stay(llama: PeftModel) -> None:
    plain, streaming = adapted(FAMILIES["llama"]), streamed(llama)
    gone = [layer for index, layer in enumerate(streaming.layers) if index == LAYERS - 1]
    streaming.keep(3)
    assert [layer in streaming.layers for layer in gone] == [False]
    assert not any("_apply" in vars(module) for module in gone[0].module.modules()), "it moves as before"
    assert len(streaming.layers) == 3
    assert train(plain) == train(llama)
    streaming.keep(0)
    assert train(plain) == train(llama)
    assert streaming.device_bytes == 0


def test_whoever_reads_weights_finds_them(llama: PeftModel, tmp_path: Path) -> None:
    plain, streaming = adapted(FAMILIES["llama"]), streamed(llama)
    train(plain, steps=1)
    train(llama, steps=1)
    states = plain.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in llama.state_dict().items())
    llama.get_base_model().save_pretrained(tmp_path)
    ids = torch.ones(1, 3, dtype=torch.long)
    made = [model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False) for model in (plain, llama)]
    assert torch.equal(*made)
    merged = [model.merge_and_unload()(input_ids=ids).logits for model in (plain, llama)]
    assert torch.equal(*merged)
    assert streaming_of(llama) is streaming


def test_moves_leave_weights_in_main_memory(llama: PeftModel) -> None:
    before, streaming = frozen(llama), streamed(llama)
    places = {id(weight.tensor): weight._there.data_ptr() for layer in streaming.layers for weight in layer.weights}
    llama.to("cpu").cpu()
    away = [weight for layer in streaming.layers[2:] for weight in layer.weights]
    assert all(weight.tensor.data_ptr() == places[id(weight.tensor)] for weight in away)
    check_whole(llama, before)
    with pytest.raises(ConfigError, match=r"dtype torch\.float32 cannot change"):
        llama.double()
    check_whole(llama, before)
    streaming.put_back()
    assert llama.double().dtype == torch.float64


class Stop(BaseException):
    """Ctrl-C, or a signal, at any moment."""


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]) -> None:
    """Raise an error at one of the events of streaming, counted over all of them."""
    count = 0

    def around(name: str) -> None:
        original = getattr(streamed_base.StreamedWeight, name)

        def method(self: Any) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise error
            original(self)
            count += 1
            if count == at:
                raise error

        monkeypatch.setattr(streamed_base.StreamedWeight, name, method)

    for name in ("come", "arrive", "leave"):
        around(name)


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("error", [Stop, torch.OutOfMemoryError])
def test_nothing_is_lost_wherever_a_step_ends(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], count: int
) -> None:
    draws, ended = random.Random(0), 0
    plain = adapted(FAMILIES["llama"])
    states, before = copy.deepcopy(plain.state_dict()), frozen(plain)
    expected = train(plain, steps=2)
    for number in range(count):
        model = adapted(FAMILIES["llama"])
        streaming = streamed(model)
        with monkeypatch.context() as patch:
            interrupt(patch, draws.randrange(1, 400), error)
            try:
                train(model, draws.choice(MODES[:1] + MODES[2:]), steps=1)
            except error:
                ended += 1
        check_whole(model, before)
        model.zero_grad()
        model.get_base_model().gradient_checkpointing_disable()
        if number % 2:
            streaming.put_back()
            check_whole(model, before)
        model.load_state_dict(states)
        assert train(model.train(), steps=2) == expected
    assert ended > count // 2


def test_an_error_while_it_begins_leaves_the_model_as_it_was(llama: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = frozen(llama)
    for at in (1, 7, 20):
        with monkeypatch.context() as patch:
            interrupt(patch, at, Stop)
            with pytest.raises(Stop):
                streamed(llama)
        check_whole(llama, before)
        assert streaming_of(llama) is None
    assert train(llama) == train(adapted(FAMILIES["llama"]))


def test_what_cannot_be_streamed(llama: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="add adapters first"):
        stream_base(t.LlamaForCausalLM(FAMILIES["llama"]), "cpu")
    with pytest.raises(UnsupportedError, match="no layers"):
        stream_base(nn.Linear(2, 2), "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match='device="cpu"'):
            stream_base(llama)
    llama.lm_head.weight.ds_id = 0
    with pytest.raises(UnsupportedError, match=r"^The base cannot be streamed: ZeRO-3 already moves its weights\.$"):
        stream_base(llama, "cpu")
    del llama.lm_head.weight.ds_id
    stream_base(llama, "cpu")
    with pytest.raises(UnsupportedError, match="streams its base already"):
        stream_base(llama, "cpu")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Free", (), {"available": 10}))
    with pytest.raises(UnsupportedError, match="10 B are available"):
        stream_base(adapted(FAMILIES["gpt2"]), "cpu")


def test_a_model_that_nobody_uses_any_more_is_freed() -> None:
    model = adapted(FAMILIES["llama"])
    streamed(model)
    train(model, steps=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_layers_are_chosen_and_streamed_at_once(llama: PeftModel) -> None:
    plain, layers = adapted(FAMILIES["llama"]), LayerCheckpointing(llama)
    streaming = streamed(llama)
    layers.take([*streamable_layers(llama)][1:3])
    layers.before_step()
    assert train(plain) == train(llama)
    layers.put_back()
    streaming.put_back()
    assert train(plain) == train(llama)
