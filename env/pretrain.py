"""Make a proxy base: `python -m rankpilot.env.pretrain llama-4x64`.

Pretrains on Python's documentation (byte level) and writes `env/bases/NAME/model.safetensors` in fp16, with a
card of how it came about. Users never need this: the bases ship with the package.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import track

from ..files import atomic_path, write_json
from .bases import BASES_FOLDER, ProxyBase, find_base, new_base_model
from .corpora import load_corpus, sample_windows


@dataclass(frozen=True)
class PretrainConfig:
    """How a proxy base is pretrained."""

    name: Annotated[str, tyro.conf.Positional]
    """Which base to make."""
    steps: int = 9000
    """Optimiser steps."""
    batch_size: int = 32
    """Windows a step."""
    length: int = 64
    """Bytes a window."""
    learning_rate: float = 3e-3
    """Peak of a cosine schedule with 200 steps of warm-up."""
    corpus: str = "documentation"
    """What it reads."""
    seed: int = 0
    """Seed of initialisation and batches."""


def _batches(config: PretrainConfig, data: NDArray[np.uint8]) -> Iterator[torch.Tensor]:
    generator = np.random.default_rng(config.seed)
    for _ in range(config.steps):
        yield sample_windows(data, config.batch_size, config.length, generator)


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain a base and write it with its card; returns its folder."""
    base = find_base(config.name)
    train, held_out = load_corpus(config.corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = new_base_model(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / config.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    for batch in track(_batches(config, train), f"pretraining {base.name}", total=config.steps):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    generator = np.random.default_rng(config.seed + 1)
    test = sample_windows(held_out, 512, config.length, generator)
    with torch.no_grad():
        loss = float(model.eval()(input_ids=test, labels=test).loss)
    return _write(base, model, config, loss, time.monotonic() - started)


def _write(base: ProxyBase, model: torch.nn.Module, config: PretrainConfig, loss: float, wall_s: float) -> Path:
    from safetensors.torch import save_file

    state = model.state_dict()
    weights = {
        name: value.half().contiguous()
        for name, value in state.items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    folder = BASES_FOLDER / base.name
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    card = {
        "architecture": base.config,
        "pretraining": asdict(config),
        "held_out_loss_nats_per_byte": round(loss, 4),
        "wall_s": round(wall_s),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(folder / "card.json", card)
    return folder


if __name__ == "__main__":
    pretrain(tyro.cli(PretrainConfig, description=__doc__))
