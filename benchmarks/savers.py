"""The same losses in fewer bytes and seconds: exact savers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.text import make_table
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.record.live_storages import LivePeak
from rankpilot.cost.savers.exact import SAVERS, ExactSavers
from rankpilot.cost.savers.prices import ACTIVATIONS, ROUTED
from rankpilot.data.models import load_model, load_tokenizer
from rankpilot.lora.targets import find_target_modules
from rich.console import Console
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from .harness import Figures, estimate_figures, interleave, usual_ratio

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        model: a packaged language model.
        rows: of a batch.
        length: tokens of a row.
        rounds: steps of each kind, which take turns.
        bf16: compute under bf16 autocast.
        experts: of a layer of which adapters run PEFT's way and on routed rows; 0 leaves that out.
        json: the file for the figures.
    """

    model: str = MODEL
    rows: int = 4
    length: int = 96
    rounds: int = 7
    bf16: bool = False
    experts: int = 64
    json: Path | None = None


def benchmark(options: Options, console: Console) -> Figures:
    """Measure steps of plain LoRA with each saver more, and steps of a mixture of experts."""
    torch.set_num_threads(1)
    figures = _steps(options, console)
    if options.experts:
        figures |= _experts(options, console)
    return figures


def _model(options: Options) -> Any:
    """Plain LoRA: rank 8 on all linear layers."""
    torch.manual_seed(0)
    base = load_model(options.model, "causal-lm", (), load_tokenizer(options.model)).float()
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=kinds)).train()


def _batch(options: Options) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40_000, (options.rows, options.length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def _loss(model: Any, batch: dict[str, torch.Tensor], options: Options) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16) if options.bf16 else nullcontext():
        loss: torch.Tensor = model(**batch).loss
    return loss


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], options: Options) -> None:
    loss = _loss(model, batch, options)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _steps(options: Options, console: Console) -> Figures:
    model = _model(options)
    optimizer, batch, targets = _optimizer(model), _batch(options), find_target_modules(model)
    _step(model, optimizer, batch, options)
    every = [*SAVERS, ACTIVATIONS]
    ranks, names, measured, work = np.full(len(targets), 8), ["plain LoRA", *every], {}, {}
    for number, name in enumerate(names):
        savers = ExactSavers(model, every[:number])
        with LivePeak() as live:
            _step(model, optimizer, batch, options)
        held = sum(2 * p.nbytes + p.nbytes for p in model.parameters() if p.requires_grad)  # weights and moments
        loss: Callable[[Any], torch.Tensor] = lambda given: _loss(model, given, options)  # noqa: E731
        predicted = calibrate(model, targets, batch, optimizer, loss=loss, signal_bytes=False).peak(ranks)
        measured[name] = live.peak + held, predicted
        savers.put_back()

        def timed(_: int, number: int = number) -> None:
            savers = ExactSavers(model, every[:number])
            _step(model, optimizer, batch, options)
            savers.put_back()

        work[name] = timed
    seconds = interleave(work, options.rounds, torch.device("cpu"), clock=time.process_time)
    plain, _ = measured["plain LoRA"]
    columns = ("step", "bytes at the peak, MiB", "of plain LoRA", "predicted over measured", "time of plain LoRA")
    table = make_table(
        f"{options.model}, {options.rows} x {options.length} tokens, rank 8 on all linear layers", columns
    )
    figures: Figures = {}
    for number, name in enumerate(names):
        (peak, predicted), ratio = measured[name], usual_ratio(seconds[name], seconds["plain LoRA"])
        table.add_row(
            f"+ {name}" if number else name,
            f"{peak / 2**20:.1f}",
            f"{peak / plain:.3f}",
            f"{predicted / peak:.4f}",
            f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        )
        key = name.replace(" ", "_")
        figures |= {f"{key}.bytes": peak, f"{key}.predicted_bytes": float(predicted)}
        figures |= estimate_figures(f"{key}.time", ratio)
    console.print(table)
    return figures


def _experts(options: Options, console: Console) -> Figures:
    """Steps of a small mixture with adapters on all experts: as PEFT computes them, and on routed rows."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=options.experts,
        num_experts_per_tok=min(8, options.experts),
        use_cache=False,
    )
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], target_parameters=stacks)
    model = get_peft_model(Qwen3MoeForCausalLM(config), lora).train()
    optimizer, ids = _optimizer(model), torch.randint(0, 128, (4, 256), generator=torch.Generator().manual_seed(0))
    batch, peaks, work = {"input_ids": ids, "labels": ids}, {}, {}
    _step(model, optimizer, batch, options)
    for name in ("PEFT", ROUTED):
        chosen = [ROUTED] if name == ROUTED else []

        def timed(_: int, chosen: list[str] = chosen) -> None:
            savers = ExactSavers(model, chosen)
            _step(model, optimizer, batch, options)
            savers.put_back()

        with LivePeak() as live:
            timed(0)
        peaks[name], work[name] = live.peak, timed
    seconds = interleave(work, options.rounds, torch.device("cpu"), clock=time.process_time)
    ratio = usual_ratio(seconds[ROUTED], seconds["PEFT"])
    table = make_table(f"{options.experts} experts a layer, rank 16, 1,024 tokens", ("step", "bytes, MiB", "time"))
    table.add_row("PEFT", f"{peaks['PEFT'] / 2**20:.1f}", "1")
    table.add_row(ROUTED, f"{peaks[ROUTED] / 2**20:.1f}", f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    console.print(table)
    figures: Figures = {f"experts.{name.replace(' ', '_')}.bytes": peak for name, peak in peaks.items()}
    return figures | estimate_figures("experts.time", ratio)
