"""Static allocations: the plan before training is the first plan of a run, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from rankpilot import RankPilot, TrainingRun, allocate, attach
from rankpilot.agents.policy_file import load_policy
from rankpilot.common.errors import BudgetError, ConfigError, DataError, UnsupportedError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.rules import find_rule
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.allocate import lent_adapters, static_plan, task_type
from rankpilot.lora.targets import find_target_modules
from rankpilot.study.replay import redecide
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    default_data_collator,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .tiny_runs import adapted, arguments, counting, new_base, ranks_of
from .tiny_runs import llama_config as llama_config

ROWS = counting(40, 20)
SCHEDULE = DecisionSchedule(probe_steps=3)
OPTIONS: dict[str, Any] = {"budget": "80%", "policy": "signal-mean", "schedule": SCHEDULE, "exact_savers": False}


def batches(rows: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(rows, 4, collate_fn=default_data_collator)  # type: ignore[arg-type]


def classified() -> DataLoader[Any]:
    """Rows with one of three classes."""
    return batches([{"input_ids": row["input_ids"], "labels": number % 3} for number, row in enumerate(ROWS)])


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    return Trainer(model, arguments(folder, max_steps=6, **options), train_dataset=ROWS)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("budget", ["80%", "3k params"])
def test_the_plan_is_the_first_of_a_run(llama_config: LlamaConfig, tmp_path: Path, budget: str) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    before, attributes, settings = weights(trainer.model), dict(vars(trainer)), vars(trainer.args).copy()
    plan = static_plan(trainer, budget=budget, policy="signal-mean", schedule=SCHEDULE)
    assert vars(trainer) == attributes
    assert vars(trainer.args) == settings
    assert not (tmp_path / "run" / "decisions").exists()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, before[name]), name
    assert trainer.model.peft_config["default"].rank_pattern == {}
    attach(trainer, "signal-mean", budget, schedule=SCHEDULE, parts="off")
    trainer.train()
    first = DecisionLog(tmp_path / "run" / "decisions").to_pandas().iloc[: len(plan.ranks)]
    assert dict(zip(first["module"].tolist(), first["rank_after"].tolist(), strict=True)) == plan.ranks
    assert first["predicted_cost"][0] == plan.cost <= plan.limit == first["limit"][0]


def test_plain_peft_makes_an_adapter_of_the_plan(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    plan = static_plan(trainer, budget="70%", policy="signal-mean", schedule=SCHEDULE)
    assert 0 in plan.ranks.values()
    plan.config.save_pretrained(str(tmp_path / "config"))
    config = LoraConfig.from_pretrained(str(tmp_path / "config"))
    model = get_peft_model(LlamaForCausalLM(llama_config), config)
    targets = find_target_modules(model)
    assert ranks_of(model) == {name: rank for name, rank in plan.ranks.items() if rank}
    assert all(target.scaling == 16 / target.rank for target in targets)
    assert not config.alpha_pattern, "one alpha for all"
    assert plan.line().endswith(f"mean rank {sum(plan.ranks.values()) / len(plan.ranks):.1f}")


def test_target_modules_that_are_not_there_are_told(
    llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(llama_config, target_modules=["q_proj", "v_proj", "query"])
    for count in (1, 2):
        assert allocate(model, batches(ROWS), **OPTIONS | {"budget": "100%"}).rank_pattern
        told = [
            row for row in caplog.records if row.levelname == "WARNING" and "target_modules names query," in row.message
        ]
        assert len(told) == count


def test_a_tied_pair_keeps_its_rank_in_a_plan(llama_config: LlamaConfig) -> None:
    config = deepcopy(llama_config)
    config.tie_word_embeddings = True
    lora = {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "ensure_weight_tying": True, "r": 4}
    plan = allocate(adapted(config, **lora), batches(ROWS), **OPTIONS | {"budget": "95%"})
    model = get_peft_model(new_base(config), plan)
    base = model.get_base_model()
    pair = base.model.embed_tokens.lora_embedding_A["default"], base.lm_head.lora_B["default"].weight
    assert pair[0].data_ptr() == pair[1].data_ptr()
    assert pair[0].shape[0] == 4
    assert all(target.rank for target in find_target_modules(model))


def test_a_plan_trains_the_biases_that_its_user_wanted(llama_config: LlamaConfig) -> None:
    config = deepcopy(llama_config)
    config.attention_bias = True
    model = adapted(config, bias="lora_only")
    plan = allocate(model, batches(ROWS), **OPTIONS)
    assert len(plan.rank_pattern) < len(find_target_modules(model))
    assert plan.bias == model.peft_config["default"].bias == "lora_only"


def test_a_name_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"a loaded model .*; got 'gpt2'\. .*the command `rankpilot plan`"):
        allocate("gpt2", batches(ROWS))  # type: ignore[arg-type]


def test_data_beside_a_trainer_is_refused(llama_config: LlamaConfig, tmp_path: Path) -> None:
    """Such as a policy that its user gave in the place of the data."""
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"A Trainer has its own data, .*; got 'signal-mean'\. .*policy=\.\.\."):
        allocate(trainer, "signal-mean")  # type: ignore[arg-type]


def test_a_model_and_a_loader(llama_config: LlamaConfig) -> None:
    loader = batches(ROWS)
    base = new_base(llama_config)
    names = list(base.state_dict())
    base.eval()
    base.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    random_state = torch.get_rng_state()
    config = allocate(base, loader, learning_rate=1e-2, **OPTIONS)
    assert list(base.state_dict()) == names, "the base model has no adapter afterwards"
    assert not hasattr(base, "peft_config")
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert {True, False} == set(before.values())
    assert not any(module.training for module in base.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    model = adapted(llama_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pilot = RankPilot("signal-mean", "80%", schedule=SCHEDULE, exact_savers=False)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=1000))
    assert config.rank_pattern == model.peft_config["default"].rank_pattern
    with pytest.raises(ConfigError, match="pass a DataLoader as `data`, or a Trainer"):
        allocate(base)
    with pytest.raises(ConfigError, match=r"must be a torch\.utils\.data\.DataLoader, .*; got list"):
        allocate(base, [ROWS[0]], policy="signal-mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="The training set is empty"):
        allocate(base, DataLoader([], batch_size=4), policy="signal-mean")  # type: ignore[arg-type]


def test_a_budget_that_nothing_fits_changes_nothing(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run", neftune_noise_alpha=5.0)
    before = weights(trainer.model)
    hooks = len(trainer.model.get_input_embeddings()._forward_hooks)
    with pytest.raises(BudgetError, match="smallest that works"):
        allocate(trainer, budget="10KiB step", policy="signal-mean", schedule=SCHEDULE)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
    assert len(trainer.model.get_input_embeddings()._forward_hooks) == hooks


def test_a_trainers_layers_and_inputs_are_as_they_were(llama_config: LlamaConfig, tmp_path: Path) -> None:
    """A Trainer switches checkpointing on when it begins, and rankpilot lets inputs require no gradients."""
    config = deepcopy(llama_config)
    config.num_hidden_layers = 2
    model = adapted(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    layers[0].gradient_checkpointing = False
    trainer = trainer_of(model, tmp_path / "run", gradient_checkpointing=True)
    model.config.use_cache = True
    allocate(trainer, gradient_checkpointing="auto", **OPTIONS)
    assert hooks
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks
    assert [layer.gradient_checkpointing for layer in layers] == [False] + [True] * (len(layers) - 1)
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert model.config.use_cache


def test_what_was_frozen_stays_frozen(llama_config: LlamaConfig, tmp_path: Path) -> None:
    model = adapted(llama_config, target_modules=["q_proj", "down_proj"], use_dora=True)
    for target in find_target_modules(model):
        target.layer.lora_magnitude_vector.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    allocate(trainer_of(model, tmp_path / "run"), **OPTIONS)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_models_inputs_are_as_they_were(llama_config: LlamaConfig) -> None:
    model = adapted(llama_config)
    model.enable_input_require_grads()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    allocate(model, batches(ROWS), **OPTIONS)
    assert hooks
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks


def test_a_logged_plan_is_made_again_bit_for_bit(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    plan = static_plan(trainer, budget="70%", log=tmp_path / "log")
    logged = DecisionLog(tmp_path / "log").logged(0)
    assert dict(zip(logged.observation.names, logged.rank_after.tolist(), strict=True)) == plan.ranks
    again = redecide(logged, load_policy("default"))
    assert again.differences == ()
    assert again.ranks.tolist() == [*plan.ranks.values()]
    assert "choice" in redecide(logged, find_rule("uniform")).differences


def test_decisions_of_a_run_are_made_again_bit_for_bit(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    attach(trainer, "signal-mean", budget="70%", schedule=SCHEDULE)
    trainer.train()
    log = DecisionLog(tmp_path / "run" / "decisions")
    assert len(log) >= 4
    for number in range(len(log)):
        logged = log.logged(number)
        if not logged.correction:
            assert redecide(logged, find_rule("signal-mean")).differences == ()
    assert set(log.to_pandas()["policy"].tolist()) == {"signal-mean"}


def test_a_new_head_trains_under_the_configuration(bert_config: BertConfig) -> None:
    """PEFT freezes it where the configuration tells no task."""
    model = BertForSequenceClassification(bert_config)
    config = allocate(model, classified(), **OPTIONS)
    assert config.task_type == "SEQ_CLS"
    again = get_peft_model(BertForSequenceClassification(bert_config), config)
    assert any("classifier" in name for name, p in again.named_parameters() if p.requires_grad)


# What is lent to a bare model, and models that it must not touch ------------------------------------------------------

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


WHISPER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


class Wrapped(nn.Module):
    """A model inside of somebody's own module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return {"loss": self.inner(**batch).loss}  # as a dictionary, like some models


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
    with pytest.raises(UnsupportedError, match=r"already has adapters.*Pass the PeftModel"):
        allocate(model, batches(ROWS), **OPTIONS)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model_keeps_its_adapters(llama_config: LlamaConfig) -> None:
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = torch.compile(get_peft_model(LlamaForCausalLM(llama_config), lora), backend="eager")
    names = list(model.state_dict())
    assert allocate(model, batches(ROWS), **OPTIONS).rank_pattern
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

    assert allocate(TextClassification(LlamaForCausalLM(llama_config)), batches(ROWS), **OPTIONS).rank_pattern


def test_the_model_has_the_very_modules_that_it_had(bert_config: BertConfig) -> None:
    model = BertForSequenceClassification(bert_config)
    model.classifier.bias.requires_grad_(False)
    modules, trains = list(model.modules()), {name: p.requires_grad for name, p in model.named_parameters()}
    assert allocate(model, classified(), **OPTIONS).rank_pattern
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


def test_a_model_that_peft_cannot_adapt_is_as_it_was() -> None:
    model = nn.Sequential(nn.ReLU())
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"Cannot adapt 'Sequential' with target_modules"):
        allocate(model, batches(ROWS), **OPTIONS)
    assert list(model.state_dict()) == before
    assert not hasattr(model, "peft_config")
