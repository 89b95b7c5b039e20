"""A loop of one's own in two processes, which stops and goes on from `save_checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rankpilot
import torch
import torch.distributed as dist
from rankpilot import RankPilot, TrainingRun
from rankpilot.lora.targets import find_target_modules
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaConfig

from .several import in_processes
from .test_pilot import SCHEDULE, STEPS, STRIDES, adapted

CUT = 5
"""After the second decision."""

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False
)


class Rows(TensorDataset):
    """Dictionaries, as a model takes them."""

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        (tokens,) = super().__getitem__(index)
        return {"input_ids": tokens, "labels": tokens}


def train(folder: Path, first: int, end: int) -> dict[str, Any]:
    """Steps `first` to `end` in this process; from a checkpoint unless they begin at 0, and with one at the end."""
    dist.init_process_group("gloo")
    base = adapted(CONFIG).train()
    model = DistributedDataParallel(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = Rows(STRIDES)
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))
    run = TrainingRun.of_loader(model, optimizer, loader, total_steps=STEPS)
    pilot = RankPilot("signal-mean", "40%", log=folder / "log", schedule=SCHEDULE, measure_every=1)
    if first:
        assert rankpilot.load_checkpoint(pilot, run, folder / "checkpoint") == first
    else:
        pilot.begin(run)
    losses = []
    for number, batch in enumerate(list(loader)[first:end], first):
        pilot.before_step(batch)
        loss = model(**batch).loss
        loss.backward()
        pilot.before_optimizer_step(loss)
        optimizer.step()
        optimizer.zero_grad()
        pilot.after_step()
        losses.append(float(loss.detach()))
        if number + 1 == CUT:
            rankpilot.save_checkpoint(pilot, run, folder / "checkpoint")
    dist.destroy_process_group()
    weights = {name: value.detach().numpy().copy() for name, value in base.named_parameters()}
    return {"losses": losses, "ranks": [target.rank for target in find_target_modules(base)], "weights": weights}


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    whole = in_processes(2, train, tmp_path, 0, STEPS)
    assert 0 in whole[0]["ranks"]
    again = in_processes(2, train, tmp_path, CUT, STEPS)
    for process, before in zip(again, whole, strict=True):
        assert len(process["losses"]) == STEPS - CUT
        assert process["losses"] == before["losses"][CUT:]
        assert process["ranks"] == whole[0]["ranks"]
        assert all((process["weights"][name] == value).all() for name, value in whole[0]["weights"].items())
    assert again[0]["losses"] != again[1]["losses"], "each process has a part of the data"
