"""Make proxy bases: `python -m tools.pretrain llama-4x64 bert-4x64`.

Bases of 256 and 384 wide, on which rules are judged, take a quarter of an hour each:
`python -m tools.pretrain llama-8x256 gpt2-4x384 --bf16 --steps 3000 --learning-rate 1e-3`.

Pretrains on Python's documentation (byte level) and writes `env/weights/NAME/model.safetensors` in fp16, with a
card of how it came about. The bases of training and validation ship with the package; those of the test split and of
benchmarks are at commit a1dc0e36 (tag evidence-0.3), or made here.
"""

from __future__ import annotations

import math
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import atomic_path, write_json
from rankpilot.data.corpora import load_corpus, sample_windows
from rankpilot.env.bases import BASES_FOLDER, ProxyBase, find_base, load_base_model, new_base_model
from rankpilot.env.task_data import language_inputs, loss_terms, mean_loss
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TIED = ("lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""Weights that are tied to others, and left out of the file."""

SHALLOW = 4
"""Layers of the bases from which deep masked language models start."""


@dataclass(frozen=True)
class PretrainConfig:
    """How proxy bases are pretrained."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Which bases to make."""
    steps: int = 4000
    """Optimiser steps."""
    batch_size: int = 32
    """Windows a step."""
    length: int = 64
    """Bytes a window."""
    learning_rate: float = 3e-3
    """Peak of a cosine schedule with 200 steps of warm-up."""
    corpus: str = "documentation"
    """What they read."""
    bf16: bool = False
    """Multiply matrices in bf16, which is three times faster on processors that have it."""
    causal_share: float = 0.125
    """Share of the steps in which a masked language model first learns to predict the next byte. Without them it stays
    at the frequencies of single bytes for thousands of steps."""
    seed: int = 0
    """Seed of initialisation and batches."""


def pretrain(name: str, config: PretrainConfig) -> Path:
    """Pretrain a base and write it with its card; returns its folder.

    Raises:
        ConfigError: its output weights are not tied to those of its input, which the file alone would hold.
    """
    base = find_base(name)
    if not new_base_model(base).config.tie_word_embeddings:
        raise ConfigError(f"Set tie_word_embeddings in the configuration of {name}: the file has no output weights.")
    train, held_out = load_corpus(config.corpus)
    generator = np.random.default_rng(config.seed)
    started = time.monotonic()
    left = config.steps
    if base.masked and base.depth > SHALLOW:
        model = _doubled(base)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = _decoder(base) if base.masked else new_base_model(base)
        if base.masked:
            first = round(config.steps * config.causal_share)
            _train(model, base, config, first, train, generator, causal=True)
            decoder, model, left = model, new_base_model(base), left - first
            model.load_state_dict(decoder.state_dict())
    _train(model, base, config, left, train, generator)
    with torch.no_grad():
        loss = _loss(model.eval(), base, held_out, 512, config.length, np.random.default_rng(config.seed + 1))
    return _write(base, model, config, float(loss), time.monotonic() - started)


def _decoder(base: ProxyBase) -> PreTrainedModel:
    """Return an untrained masked language model as a decoder, with the same names of parameters."""
    config = AutoConfig.for_model(base.family, **base.config, is_decoder=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _doubled(base: ProxyBase) -> PreTrainedModel:
    """A deep base whose layers are those of the shallow one of its width, twice (Gong et al., 2019).

    Started anew, BERT of 8 layers stays at the frequencies of single bytes.
    """
    shallow = load_base_model(base.name.replace(f"{base.family}-{base.depth}", f"{base.family}-{SHALLOW}"))
    weights = shallow.state_dict()
    for name in list(weights):
        layer = re.search(r"\.layer\.(\d+)\.", name)
        if layer:
            above = f".layer.{int(layer[1]) + SHALLOW}."
            weights[name.replace(layer[0], above)] = weights[name].clone()
    model = new_base_model(base)
    model.load_state_dict(weights)
    return model


def _loss(
    model: torch.nn.Module,
    base: ProxyBase,
    data: NDArray[np.uint8],
    rows: int,
    length: int,
    generator: np.random.Generator,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Loss of a batch of random windows, in nats a predicted byte."""
    windows = sample_windows(data, rows, length, generator)
    if causal:
        loss: torch.Tensor = model(input_ids=windows, labels=windows, use_cache=False).loss
        return loss
    inputs, labels = language_inputs(base, windows, generator)
    return mean_loss(loss_terms(model(input_ids=inputs).logits, labels), labels)[0]


def _train(
    model: torch.nn.Module,
    base: ProxyBase,
    config: PretrainConfig,
    steps: int,
    data: NDArray[np.uint8],
    generator: np.random.Generator,
    *,
    causal: bool = False,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in track(range(steps), f"{base.name}, next byte" if causal else base.name):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = _loss(model, base, data, config.batch_size, config.length, generator, causal=causal)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def _write(base: ProxyBase, model: torch.nn.Module, config: PretrainConfig, loss: float, wall_s: float) -> Path:
    from safetensors.torch import save_file

    weights = {name: value.half().contiguous() for name, value in model.state_dict().items() if name not in TIED}
    folder = BASES_FOLDER / base.name
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    card = {
        "family": base.family,
        "architecture": base.config,
        "pretraining": {**asdict(config), "names": [base.name]},
        "held_out_loss_nats_per_byte": round(loss, 4),
        "wall_s": round(wall_s),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(folder / "card.json", card)
    return folder


if __name__ == "__main__":
    settings = tyro.cli(PretrainConfig, description=__doc__)
    for chosen in settings.names:
        pretrain(chosen, settings)
