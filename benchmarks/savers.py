"""The same losses in fewer bytes and seconds: exact savers, and frozen layers that run once a row."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.text import make_table
from rankpilot.cost.calibration import calibrate
from rankpilot.cost.live_storages import LivePeak
from rankpilot.cost.saver_prices import ACTIVATIONS, ROUTED
from rankpilot.cost.savers import SAVERS, ExactSavers
from rankpilot.data.models import load_model, load_tokenizer
from rankpilot.finetune.frozen_state import FrozenState, layers_in_order, modules_below
from rankpilot.finetune.prefix_cache import PrefixCache, Room
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
        batches: of an epoch of the runs with the cache; 0 leaves them out.
        bf16: compute under bf16 autocast.
        experts: of a layer of which adapters run PEFT's way and on routed rows; 0 leaves that out.
        vocabulary: keep so many tokens of it, as in a model whose head is a small part of the work; 0 keeps all.
        json: the file for the figures.
    """

    model: str = MODEL
    rows: int = 4
    length: int = 96
    rounds: int = 7
    batches: int = 6
    bf16: bool = False
    experts: int = 64
    vocabulary: int = 0
    json: Path | None = None


def benchmark(options: Options, console: Console) -> Figures:
    """Measure steps of plain LoRA with each saver more, and whole runs with and without the cache."""
    torch.set_num_threads(1)
    figures = _steps(options, console)
    if options.batches:
        figures |= _runs(options, console)
    if options.experts:
        figures |= _experts(options, console)
    return figures | _checks(options, console)


def _model(options: Options, share: float, rank: int) -> Any:
    """Plain LoRA of a rank on all linear layers of the top share of the layers."""
    torch.manual_seed(0)
    base = load_model(options.model, "causal-lm", (), load_tokenizer(options.model)).float()
    if options.vocabulary:
        base.resize_token_embeddings(options.vocabulary)
    count = base.config.num_hidden_layers
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [*range(count - round(share * count), count)]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules=kinds, layers_to_transform=layers))
    return model.train()


def _batches(options: Options, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens, size = options.vocabulary or 40_000, (options.rows, options.length)
    rows = [torch.randint(min(1000, tokens // 2), tokens, size, generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def _loss(model: Any, batch: dict[str, torch.Tensor], options: Options) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16) if options.bf16 else nullcontext():
        loss: torch.Tensor = model(**batch).loss
    return loss


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], options: Options) -> float:
    loss = _loss(model, batch, options)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _steps(options: Options, console: Console) -> Figures:
    model = _model(options, 1.0, 8)
    optimizer, (batch,), targets = _optimizer(model), _batches(options, 1), find_target_modules(model)
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


EPOCHS = 3


def _runs(options: Options, console: Console) -> Figures:
    """Three epochs with an evaluation each: plain LoRA, the top half, and the top half with the cache."""
    batches = _batches(options, options.batches)
    table = make_table(
        f"{EPOCHS} epochs of {options.batches} batches, an evaluation after each: CPU seconds over plain LoRA's",
        ("run", "whole run", "a later epoch", "last loss"),
    )
    kinds = {"plain LoRA": (1.0, 8, False), "top half": (0.5, 32, False), "top half, cached": (0.5, 32, True)}
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    last: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        runs = {}
        for name, (share, rank, cached) in kinds.items():
            model = _model(options, share, rank)
            ExactSavers(model, [] if name == "plain LoRA" else [*SAVERS])
            if cached:
                tokens = options.batches * options.rows * options.length
                room = Room.of(Path(folder))
                cache = PrefixCache(model, room, epochs=EPOCHS, tokens=tokens, evaluates=True, tell=console.print)
                cache.ranks_changed()
            runs[name] = model, _optimizer(model)
        for _ in range(EPOCHS):
            for name, (model, optimizer) in runs.items():
                model.train()
                began = time.process_time()
                for batch in batches:
                    last[name] = _step(model, optimizer, batch, options)
                spent[name].append(time.process_time() - began)
            for name, (model, _) in runs.items():
                model.eval()
                began = time.process_time()
                with torch.no_grad():
                    for batch in batches:
                        _loss(model, batch, options)
                spent[name].append(time.process_time() - began)
    figures: Figures = {}
    for name, seconds in spent.items():
        whole, later = sum(seconds) / sum(spent["plain LoRA"]), seconds[4] / spent["plain LoRA"][4]
        table.add_row(name, f"{whole:.3f}", f"{later:.3f}", f"{last[name]:.6f}")
        key = name.replace(" ", "_").replace(",", "")
        figures |= {f"{key}.run": whole, f"{key}.later_epoch": later, f"{key}.loss": last[name]}
    console.print(table)
    return figures


NARROW: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
CHECKED_STEPS = 20


def _checks(options: Options, console: Console) -> Figures:
    """What it takes to look, before a pass, whether frozen layers have changed: CPU time over that of a plain step.

    The lower half of the layers has adapters of rank 0, as after a plan, so that as much is looked at as there can be.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**NARROW, num_hidden_layers=4, vocab_size=1000, use_cache=False)
    narrow = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).train()
    columns = "model", "a look", "of a plain step"
    table, figures = make_table("Before each pass: is all below the lowest adapter as it was?", columns), Figures()
    for name, model in {options.model: _model(options, 1.0, 8), "a Llama of width 64": narrow}.items():
        (body, layers), targets = layers_in_order(model), find_target_modules(model)
        half = len(layers) // 2
        set_ranks(targets, {target.name: 0 for target in targets if target.block < half})
        (batch,), optimizer = _batches(replace(options, vocabulary=1000), 1), _optimizer(model)
        state = FrozenState(modules_below(body, layers[half:]), body.config)
        step_of = partial(_step, model, optimizer, batch, options)
        work = {"step": lambda turn, run=step_of: run(), "look": lambda turn, run=state.change: run()}
        seconds = interleave(work, CHECKED_STEPS, torch.device("cpu"), clock=time.process_time)
        look, step = (float(np.median(seconds[key])) for key in ("look", "step"))
        table.add_row(name, f"{1e6 * look:.0f} us", f"{look / step:.3%}")
        key = name.replace(" ", "_")
        figures |= {f"look.{key}.seconds": look, f"look.{key}.share": look / step}
    console.print(table)
    return figures
