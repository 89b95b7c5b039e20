"""What a step on one of several cards takes under FSDP2, held against torch's own, in the CPU's allocator.

The process group is torch's fake one, whose collectives do nothing: no other process is needed to see what one holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedModel, Shards
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.training_step import release_inputs, switch_checkpointing
from rankpilot.lora.targets import find_target_modules
from torch import nn
from torch.distributed.fsdp import fully_shard

from ..finetune.several import in_processes
from .measured import allocated_peak

SIZES = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 512, "vocab_size": 3000, "use_cache": False}
FAMILIES: dict[str, t.PreTrainedConfig] = {
    "llama": t.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": t.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": t.Qwen3Config(**SIZES, head_dim=48, tie_word_embeddings=False),
    "gemma2": t.Gemma2Config(**SIZES, head_dim=48),
    "mistral": t.MistralConfig(**SIZES, tie_word_embeddings=False),
    "gpt2": t.GPT2Config(n_embd=192, n_layer=4, n_head=4, vocab_size=3000, use_cache=False),
}


@dataclass(frozen=True)
class Case:
    """A step: its family, cards, batches a step, tokens a row, rank, adapted layers, and whether layers run again."""

    family: str
    cards: int = 4
    batches: int = 1
    length: int = 48
    rank: int = 8
    layers: int = 4
    again: bool = True

    def model(self) -> Any:
        """The PEFT model."""
        torch.manual_seed(0)
        base = t.AutoModelForCausalLM.from_config(FAMILIES[self.family])
        upper = "|".join(map(str, range(4 - self.layers, 4)))
        targets = "all-linear" if self.layers == 4 else rf".*\.({upper})\..*_proj"
        model = get_peft_model(base, LoraConfig(r=self.rank, target_modules=targets)).train()
        switch_checkpointing(base, self.again)
        release_inputs(model)
        return model

    @property
    def ids(self) -> torch.Tensor:
        """Two rows of tokens."""
        return torch.randint(0, 3000, (2, self.length), generator=torch.Generator().manual_seed(1))


def layers_of(base: Any) -> list[nn.Module]:
    return [module for module in base.modules() if isinstance(module, t.modeling_layers.GradientCheckpointingLayer)]


def frozen(module: nn.Module) -> int:
    return sum(each.nbytes for each in module.parameters() if not each.requires_grad)


def measured(case: Case) -> int:
    """The most bytes that tensors of a card take, in a step after the first."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=case.cards, store=FakeStore())
    model = case.model()
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    tied = ends[0].weight is ends[1].weight
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (case.cards,))
    for unit in layers_of(base):
        fully_shard(unit, mesh=mesh)
    if not tied:
        fully_shard(ends[0], mesh=mesh)
    fully_shard(ends if tied else ends[1:], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3, foreach=True)

    def step() -> None:
        for batch in range(case.batches):
            model.set_requires_gradient_sync(batch == case.batches - 1)
            model(input_ids=case.ids, labels=case.ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    local = (getattr(each, "to_local", lambda each=each: each)() for each in [*model.parameters(), *states])
    return allocated_peak(profile) + sum(each.nbytes for each in local)


def predicted(case: Case) -> float:
    """The same by rankpilot, from steps on one card."""
    model = replace(case, again=True, layers=4).model()
    base, targets = model.get_base_model(), find_target_modules(model)
    batch = {"input_ids": case.ids, "labels": case.ids}
    memory = calibrate(model, targets, batch, signal_bytes=False, accumulates=case.batches > 1)
    whole, layers = frozen(base), [frozen(layer) for layer in layers_of(base)]
    loaded = LoadedModel(
        "", (), 1, (whole,), whole - sum(layers), max(layers), products=(0, 192), words=3000, precision="float32"
    )
    step = Shards(case.cards, "fsdp2").of(ConfiguredStep(memory, loaded))
    ranks = np.array([case.rank * (each.block >= 4 - case.layers) for each in targets])
    again = memory.recording.layers if case.again else ()
    return step.memory.with_checkpointed(again).peak(ranks) + step.model.frozen_bytes


CASES = [
    *(Case(family) for family in FAMILIES),
    *(Case(family, again=False, length=128) for family in ("llama", "llama-tied")),
    Case("llama", cards=2, batches=3, rank=16, length=30),
    Case("mistral", layers=2),
    Case("llama-tied", layers=1, again=False),
    Case("llama-tied", cards=8, batches=2, length=100, again=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_takes_what_is_told(case: Case) -> None:
    (real,) = in_processes(1, measured, case)
    assert predicted(case) == pytest.approx(real, rel=0.01)
