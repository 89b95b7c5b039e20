"""Inputs of checkpointed layers in main memory: the same bits, the predicted bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.cost import training_step
from rankpilot.cost.model import INPUTS_ON_DEVICE
from rankpilot.cost.record.calibration import measure_memory
from rankpilot.cost.record.live_storages import LiveStorages
from rankpilot.cost.savers.offload import Copies, OffloadedInputs, offload_inputs
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

LAYERS, ROWS, LENGTH, WIDTH = 7, 2, 16, 64
BATCH = {"input_ids": torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 32}
BATCH["labels"] = BATCH["input_ids"]


class Outside(Copies):
    """Main memory that is no storage of torch, so that what is on the device can be counted on a CPU."""

    def to_main(self, tensor: torch.Tensor) -> tuple[Any, Any]:
        return tensor.numpy().copy(), None

    def to_device(self, there: Any) -> tuple[torch.Tensor, Any]:
        return torch.from_numpy(there).clone(), None


def made(*, reentrant: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2))
    training_step.switch_checkpointing(model.get_base_model(), True, reentrant=reentrant)
    if reentrant:
        model.get_base_model().enable_input_require_grads()
    model.config.use_cache = False
    return model.train()


def gradients(model: nn.Module, *, twice: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(1 + twice):
        loss = model(**BATCH).loss
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("copies", [Copies, Outside])
def test_losses_and_gradients_have_the_same_bits(copies: type[Copies], reentrant: bool) -> None:
    plain = gradients(made(reentrant=reentrant), twice=True)
    model = made(reentrant=reentrant)
    undo = offload_inputs(model, OffloadedInputs(copies()))
    found = gradients(model, twice=True)
    assert len(found) == len(plain) > LAYERS
    assert all(map(torch.equal, found, plain))
    undo()
    model.zero_grad()
    assert all(map(torch.equal, gradients(model, twice=True), plain))


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes that are live after a forward pass, and at the peak of the step."""
    sizes: dict[int, int] = {}
    most = 0

    def created(serial: int, size: int) -> None:
        nonlocal most
        sizes[serial] = size
        most = max(most, sum(sizes.values()))

    with LiveStorages(created, lambda serial: sizes.pop(serial, 0)):
        loss = model(**BATCH).loss
        after = sum(sizes.values())
        loss.backward()
    return after, most


def test_all_but_the_nearest_inputs_leave_the_device() -> None:
    plain, offloaded = made(), made()
    offload_inputs(offloaded, OffloadedInputs(Outside()))
    size = ROWS * LENGTH * WIDTH * 4
    before, after = held(plain), held(offloaded)
    assert before[0] - after[0] == (LAYERS - INPUTS_ON_DEVICE) * size
    assert before[1] - after[1] >= 1


def test_the_peak_falls_by_what_is_predicted() -> None:
    plain, offloaded = made(), made()
    step = training_step.TrainingStep(plain, training_step.model_loss(plain), None)
    targets = find_target_modules(plain)
    memory = measure_memory(step, targets, BATCH, signals=False)
    less = measure_memory(replace(step, offloads=True), targets, BATCH, signals=False)
    ranks = np.full(len(targets), 2)
    offload_inputs(offloaded, OffloadedInputs(Outside()))
    predicted = (memory.peak(ranks) - less.peak(ranks)) / (1 + memory.margin)
    assert predicted == pytest.approx(held(plain)[1] - held(offloaded)[1], abs=2)


def test_a_run_offloads_and_puts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = made(), list[str]()
    rows = [{name: value[0] for name, value in BATCH.items()}] * 8
    loader = DataLoader(rows, 2, collate_fn=default_data_collator)  # type: ignore[arg-type]
    monkeypatch.setattr("rankpilot.finetune.run_savers.can_offload", lambda _: True)
    run = TrainingRun.of_loader(model, torch.optim.AdamW(model.parameters()), loader, total_steps=4)
    pilot = RankPilot("uniform", budget="100%", offload=True, tell=told.append)
    layers = [module for module in model.modules() if training_step.CHECKPOINT in vars(module)]

    def kinds() -> set[str]:
        return {type(vars(layer)[training_step.CHECKPOINT]).__name__ for layer in layers}

    before = kinds()
    pilot.begin(run)
    assert "_Offloading" in kinds()
    assert run.step.offloads
    pilot.finish()
    assert kinds() == before


def test_inputs_go_with_their_graph() -> None:
    inputs = OffloadedInputs(Outside())
    model = made()
    offload_inputs(model, inputs)
    gradients(model)
    assert len(inputs._known) <= INPUTS_ON_DEVICE
    assert np.isfinite(float(gradients(model)[0]))
