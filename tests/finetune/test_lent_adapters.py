"""What `allocate` lends a bare model and takes back, and models that it must not touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from rankpilot import allocate
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.errors import ConfigError, RankPilotError, UnsupportedError
from rankpilot.finetune.allocate import lent_adapters, task_type
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    default_data_collator,
)

TEXTS = [[i * j % 64 for i in range(20)] for j in range(40)]
OPTIONS: dict[str, Any] = {
    "budget": "80%",
    "policy": "signal-mean",
    "schedule": DecisionSchedule(probe_steps=3),
    "total_steps": 12,
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


WHISPER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def batches(rows: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(rows, 4, collate_fn=default_data_collator)  # type: ignore[arg-type]


def texts() -> DataLoader[Any]:
    return batches([{"input_ids": ids, "labels": ids} for ids in TEXTS])


class Wrapped(nn.Module):
    """A model inside of somebody's own module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize(
    "adapt",
    [
        lambda model: peft.inject_adapter_in_model(LORA, model, adapter_name="mine"),
        lambda model: get_peft_model(model, LORA).get_base_model(),
        lambda model: Wrapped(get_peft_model(model, LORA)),
        lambda model: get_peft_model(model, LORA, mixed=True),
    ],
    ids=["injected", "base model", "wrapped", "mixed"],
)
def test_adapters_of_the_user_are_not_taken_away(
    llama_config: LlamaConfig, adapt: Callable[[nn.Module], nn.Module]
) -> None:
    model = adapt(LlamaForCausalLM(llama_config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert any("lora_A" in name for name in before)
    with pytest.raises(UnsupportedError, match=r"holds adapters already.*Pass the PeftModel"):
        allocate(model, texts(), **OPTIONS)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model_keeps_its_adapters(llama_config: LlamaConfig) -> None:
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = torch.compile(get_peft_model(LlamaForCausalLM(llama_config), lora), backend="eager")
    names = list(model.state_dict())
    assert allocate(model, texts(), **OPTIONS).rank_pattern
    assert list(model.state_dict()) == names


def test_new_heads_train_whole() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    rows = [{"pixel_values": torch.rand(3, 16, 16), "labels": number % 3} for number in range(40)]
    found = allocate(ViTForImageClassification(config), batches(rows), **OPTIONS)
    assert found.modules_to_save == ["classifier"]
    again = get_peft_model(ViTForImageClassification(config), found)
    trained = [name for name, p in again.named_parameters() if p.requires_grad and "classifier" in name]
    assert trained
    assert not any("lora" in name for name in trained)


def test_heads_beside_encoders_of_other_names() -> None:
    """The base model is no module of the name that these classes tell."""
    audio = WhisperConfig(**WHISPER, num_labels=3, max_source_positions=8, num_mel_bins=4)
    with lent_adapters(WhisperForAudioClassification(audio)) as adapted:
        assert adapted.peft_config["default"].modules_to_save == ["projector", "classifier"]
        assert any("encoder" in name and "lora_A" in name for name, _ in adapted.named_parameters())


def test_a_users_own_class_of_such_a_name(llama_config: LlamaConfig) -> None:
    class TextClassification(Wrapped):
        """It is no model of transformers."""

    assert allocate(TextClassification(LlamaForCausalLM(llama_config)), texts(), **OPTIONS).rank_pattern


def test_the_model_has_the_very_modules_that_it_had(bert_config: BertConfig) -> None:
    model = BertForSequenceClassification(bert_config)
    model.classifier.bias.requires_grad_(False)
    modules, trains = list(model.modules()), {name: p.requires_grad for name, p in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": number % 3} for number, ids in enumerate(TEXTS)]
    assert allocate(model, batches(rows), **OPTIONS).rank_pattern
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


def test_a_head_of_several_choices(bert_config: Any) -> None:
    with lent_adapters(BertForMultipleChoice(bert_config)) as adapted:
        assert adapted.peft_config["default"].modules_to_save == ["classifier"]


def test_the_task_of_a_model_that_generates() -> None:
    assert task_type(WhisperForConditionalGeneration(WhisperConfig(**WHISPER))) is None
    assert task_type(T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2))) == (
        TaskType.SEQ_2_SEQ_LM
    )
    with torch.device("meta"):
        config = Gemma3ForConditionalGeneration.config_class()
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
        assert task_type(Gemma3ForConditionalGeneration(config)) == TaskType.CAUSAL_LM


@pytest.mark.parametrize("kind", ["mamba", "no linear layer"])
def test_a_model_that_peft_cannot_adapt_is_as_it_was(kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    model: nn.Module = MambaForCausalLM(MambaConfig(**sizes)) if kind == "mamba" else nn.Sequential(nn.ReLU())
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"Cannot adapt '(MambaForCausalLM|Sequential)' with target_modules"):
        allocate(model, texts(), **OPTIONS)
    assert issubclass(ConfigError, RankPilotError)
    assert list(model.state_dict()) == before
    assert not hasattr(model, "peft_config")
