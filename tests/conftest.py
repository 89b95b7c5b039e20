"""Tiny random models, built from configurations: nothing is downloaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.cost.cost import ParameterCost
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.finetune.step import known_losses
from rankpilot.lora.spec import RankLadder
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from .families import FAMILIES, Family
from .warm_python import WarmPython

with suppress(ImportError):
    # Optimum-quanto needs setuptools, which takes the place of the standard library's distutils. It fails to do so in a
    # process that has already loaded that one, as other libraries do in the middle of the tests.
    import_module("setuptools")

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# Deadlines measure the machine; derandomized runs fail for a change of the code alone.
settings.register_profile("rankpilot", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "rankpilot"))

if not torch.accelerator.is_available():
    # Torch would note the stack of each call, to seed devices that are not there: a sixth of the time of small tests.
    for _device in (torch.cuda, torch.xpu, torch.mtia):
        vars(_device)["manual_seed_all"] = lambda seed: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's blocks are the longest test: first, so that they do not run on when all else is done."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def pytest_collection_finish() -> None:
    """Keep what the libraries have made out of all garbage collections to come: each would take a third of a second."""
    gc.collect()
    gc.freeze()


Batch = dict[str, torch.Tensor]
MakeModel = Callable[..., PeftModel]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What a module's imports and those of the modules before have made is out of garbage collections as well."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products that are the same bit for bit, and no waiting for other threads on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _folder_of_loggers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each learner of Stable-Baselines3 makes a folder for its log, here and not among the temporary files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("loggers")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _folder_of_recorded_steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests record is kept for this session, and not in the user's cache."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankpilot.cost.forecast.memory_of.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs fresh Python programs that need not load the large libraries."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture
def reloads(warm_python: WarmPython) -> Iterator[list[dict[str, Any]]]:
    """What plain PEFT, in a process without rankpilot, gives of each adapter that a fine-tune saves."""
    from .finetune.reloading import reloaded

    with reloaded(warm_python) as found:
        yield found


@pytest.fixture(scope="session")
def llama_config() -> LlamaConfig:
    """Two layers with grouped queries: k and v are narrower than q."""
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="sdpa", bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bert_config() -> BertConfig:
    """Three layers with dropout and a classifier on top."""
    return BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip


def fill_b(model: torch.nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Give every B values, as training would: PEFT starts it at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_llama(llama_config: LlamaConfig) -> MakeModel:
    """Builds a fresh Llama with adapters; always the same weights."""

    def make(*, filled: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PeftModel:
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
        model = get_peft_model(LlamaForCausalLM(llama_config), LoraConfig(**settings)).to(dtype)
        if filled:
            fill_b(model)
        return model

    return make


@pytest.fixture
def make_bert(bert_config: BertConfig) -> MakeModel:
    """Builds a fresh BERT classifier with adapters; always the same weights."""

    def make(*, filled: bool = True, seed: int = 0, **options: Any) -> PeftModel:
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "key", "value", "dense"]}
        settings |= {"exclude_modules": ["bert.pooler.dense"], "modules_to_save": ["classifier"]} | options
        model = get_peft_model(BertForSequenceClassification(bert_config), LoraConfig(**settings))
        if filled:
            fill_b(model)
        return model

    return make


@pytest.fixture
def make_tokens() -> Callable[..., torch.Tensor]:
    """Token ids of shape (rows, length)."""

    def make(rows: int = 4, length: int = 8, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def llama_batch(make_tokens: Callable[..., torch.Tensor]) -> Batch:
    """A batch of four rows for a causal language model."""
    tokens = make_tokens()
    return {"input_ids": tokens, "labels": tokens}


@pytest.fixture
def bert_batch(make_tokens: Callable[..., torch.Tensor]) -> Batch:
    """A batch of four rows for a classifier."""
    tokens = make_tokens()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(len(tokens)) % 3}


@pytest.fixture(scope="session")
def make_observation() -> Callable[..., Observation]:
    """A random state of a run with any number of modules in layers of four; parameters are the budget."""

    def make(modules: int = 8, seed: int = 0, **problem: Any) -> Observation:
        generator = np.random.default_rng(seed)
        ranks = generator.choice([0, 1, 2, 4, 8], size=modules)
        cost = ParameterCost(generator.integers(50, 150, size=(1, modules)).astype(np.float64))
        options = {"ranks": ranks, "max_ranks": np.full(modules, 32), "blocks": np.arange(modules) // 4, "cost": cost}
        options |= {"limit": float(6 * cost.per_rank.sum()), "ladder": RankLadder()} | problem
        features = generator.normal(size=(modules, len(MODULE_FEATURES)))
        run = generator.uniform(0, 1, size=len(RUN_FEATURES))
        return Observation(
            modules=np.clip(features, -3, 3).astype(np.float32),
            run=run.astype(np.float32),
            problem=AllocationProblem(**options),
            names=tuple(f"layers.{m // 4}.m{m % 4}" for m in range(modules)),
        )

    return make


OTHERS_STAND_FOR = ("gpt2-rslora", "gpt2-lora-bias")
"""Families whose adapters are those of another one, on a base that other rows have."""


@pytest.fixture(
    params=[
        pytest.param(row, marks=pytest.mark.long if row.name in OTHERS_STAND_FOR else (), id=row.name)
        for row in FAMILIES
    ]
)
def family(request: pytest.FixtureRequest) -> Family:
    """Every row of the matrix in turn."""
    row: Family = request.param
    return row


@pytest.fixture
def named_family() -> Callable[[str], Family]:
    """One row of the matrix by name."""
    rows = {family.name: family for family in FAMILIES}
    return lambda name: rows[name]


@pytest.fixture
def observing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of a test only look on, as rankpilot cannot know."""
    known = known_losses._OURS | {__name__.partition(".")[0]}
    monkeypatch.setattr("rankpilot.finetune.step.known_losses._OURS", known)
