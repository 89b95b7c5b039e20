"""`python -m benchmarks published`: predictions from configurations, beside peaks that others measured on GPUs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import write_json
from rankpilot.common.text import make_table
from rankpilot.cost.cards import find_device_spec
from rankpilot.cost.cost import moment_costs
from rankpilot.cost.forecast.card_use import CardUse, card_use
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs, Shards
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.forecast.published import find_configuration
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from rankpilot.lora.peft_config import prepare_quantised
from rich.console import Console
from transformers.loss.loss_utils import LOSS_MAPPING

from . import published_page
from .harness import Figures, with_progress
from .published_contexts import contexts, longest
from .published_pictures import picture_rows, predicted_mib
from .published_rollouts import compare_rollouts
from .published_runs import compare_runs

FOLDER = Path(__file__).with_name("published_peaks")
MIB = 2**20

SHORT_NAMES = {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b"}
"""Models whose ids are not those of the table."""

LENGTHS = range(500, 901)
"""Among which the unpublished length of PEFT's longest batch is fitted."""


@dataclass(frozen=True)
class T4Row:
    """One step on a T4; bytes in MiB.

    Attributes:
        model: a Hugging Face id.
        attention: eager or sdpa.
        quantization: none or nf4.
        rows: of the batch.
        length: tokens of each.
        rank: of the adapters on q, k, v and o.
        measured: the peak of what was allocated.
        resident: what was allocated before the step.
        reserved: the most that torch's allocator held.
    """

    model: str
    attention: str
    quantization: str
    rows: int
    length: int
    rank: int
    measured: float
    resident: float
    reserved: float

    @property
    def name(self) -> str:
        """Model and setting, for people."""
        return f"{self.model.rpartition('/')[2]} {self.attention} {self.quantization} {self.rows} x {self.length}"


@dataclass(frozen=True)
class Compared:
    """A predicted and a published peak, in MiB.

    Attributes:
        name: of the run.
        predicted: the frozen model, the step and cuBLAS.
        measured: as published.
        left: what loading left allocated beside the weights, which no configuration tells; 0 if it is not published.
    """

    name: str
    predicted: float
    measured: float
    left: float = 0.0

    @property
    def error(self) -> float:
        """Relative; above 0 where the prediction is too high."""
        return self.predicted / self.measured - 1

    @property
    def error_with_left(self) -> float:
        """The error once what loading left is counted."""
        return (self.predicted + max(self.left, 0.0)) / self.measured - 1


def t4_rows() -> list[T4Row]:
    """All published steps on a T4; steps of one model and setting follow each other."""
    with (FOLDER / "t4_peaks.csv").open() as file:
        rows = [
            T4Row(
                model=row["model"],
                attention=row["attention"],
                quantization=row["quantization"],
                rows=int(row["rows"]),
                length=int(row["length"]),
                rank=int(row["rank"]),
                measured=float(row["measured_mib"]),
                resident=float(row["resident_mib"]),
                reserved=float(row["reserved_mib"]),
            )
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: (row.model, row.attention, row.quantization))


def compare_t4(row: T4Row) -> Compared:
    """Predict a step on a T4."""
    step = t4_step(row.model, row.attention, row.quantization)
    predicted = total_mib(step, BatchShape(row.rows, row.length), row.rank)
    weights = float(step.memory.states.weights.sum()) * row.rank
    return Compared(row.name, predicted, row.measured, row.resident - (step.model.frozen_bytes + weights) / MIB)


@cache
def t4_step(model: str, attention: str, quantization: Any) -> ConfiguredStep:
    """The training step of a setting."""
    config = find_configuration(SHORT_NAMES.get(model, model))
    config._attn_implementation = attention
    step = StepConfig(
        batch_size=4,
        max_length=2048,
        target_modules="q_proj,k_proj,v_proj,o_proj",
        quantization=quantization,
        gradient_checkpointing=True,
        exact_savers=False,
    )
    return from_config(
        config,
        step,
        LoadedAs(
            dtype=torch.float16,
            attention="efficient",
            double_quantization=False,
            input_gradients=True,
            keeps_output=True,
        ),
    )


@cache
def peft_step(targets: tuple[str, ...], dora: bool) -> ConfiguredStep:
    """The training step of a run of PEFT's benchmark."""
    step = StepConfig(
        batch_size=4,
        max_length=LENGTHS.stop,
        target_modules=",".join(targets),
        gradient_checkpointing=False,
        exact_savers=False,
    )
    loaded = LoadedAs(padded=True, keeps_output=True, adapter={"use_dora": True} if dora else {})
    return from_config("llama-3.2-3b", step, loaded)


def total_mib(step: ConfiguredStep, shape: BatchShape, rank: int) -> float:
    """MiB on the card with one rank on all target modules."""
    ranks = np.full(len(step.targets), rank)
    peak = float(moment_costs(step.memory.cost(shape), ranks).max())
    return (peak + step.model.frozen_bytes + step.model.workspace_bytes) / MIB


def summary(errors: Iterable[float]) -> tuple[float, float, float]:
    """Mean size, largest size and lowest value of errors, in per cent."""
    values = 100 * np.array(list(errors))
    return float(np.abs(values).mean()), float(np.abs(values).max()), float(values.min())


def quick_rows(rows: Sequence[T4Row]) -> list[T4Row]:
    """The first step of each setting of the smallest models."""
    small = [row for row in rows if "135M" in row.model or "TinyLlama" in row.model]
    return list({(row.model, row.attention, row.quantization): row for row in small[::-1]}.values())


CARD_MIB = 14_000
"""The part of a T4's memory for which verdicts are compared."""

SMALLER_CARDS_MIB = range(2048, CARD_MIB, 1024)
"""Smaller cards, on which some of the steps do not fit."""


CLEAR = 0.03
"""The share of a card from which published figures leave no doubt."""


@dataclass(frozen=True)
class Reserved:
    """A predicted and a published step on a T4.

    Attributes:
        row: as published.
        use: of the card, as predicted.
    """

    row: T4Row
    use: CardUse

    @property
    def compared(self) -> Compared:
        """Reserved bytes, without the context."""
        return Compared(self.row.name, self.use.reserved_bytes / MIB, self.row.reserved)

    @property
    def kind(self) -> str:
        """The setting on which the error depends, such as "sdpa none"."""
        return f"{self.row.attention} {self.row.quantization}"

    def verdict_is_right(self, card_mib: float) -> bool:
        """Whether the verdict for a card of this size is the one that the published figures give."""
        device = replace(self.use.device, memory_bytes=int(card_mib * MIB))
        measured = replace(
            self.use,
            device=device,
            step_bytes=int(self.row.measured * MIB) - self.use.base_bytes,
            reserve_bytes=int((self.row.reserved - self.row.measured) * MIB),
            margin_bytes=0,
        )
        return _outcome(replace(self.use, device=device)) == _outcome(measured)

    def is_clear(self, card_mib: float) -> bool:
        """Whether the published figures leave no doubt about a card of this size."""
        context = self.use.context_bytes / MIB
        taken = (self.row.reserved + context, self.row.measured + context)
        return all(abs(size / card_mib - 1) >= CLEAR for size in taken)


def _outcome(use: CardUse) -> tuple[bool, bool]:
    """Whether all fits, and whether it does without what the allocator reserves."""
    return use.spare_bytes >= 0, use.spare_bytes + use.reserve_bytes >= 0


def reserve_on_t4(row: T4Row) -> Reserved:
    """Predict what a step on a T4 takes; torch's AdamW with its defaults copies all adapters for a while."""
    step = t4_step(row.model, row.attention, row.quantization)
    states = replace(step.memory.states, scratch=step.memory.states.weights)
    memory = replace(step.memory, states=states)
    ranks = np.full(len(step.targets), row.rank)
    shape = BatchShape(row.rows, row.length)
    return Reserved(row, card_use(memory, ranks, step.model.frozen, find_device_spec("T4"), shape=shape))


def right_verdicts(rows: Sequence[Reserved], *, clear: bool = False) -> tuple[int, int]:
    """Right verdicts, and all verdicts, over `SMALLER_CARDS_MIB`.

    Args:
        rows: the steps.
        clear: only those of cards from which the published figures, with and without what is reserved, are a share of
            `CLEAR` or more away.
    """
    pairs = [(row, size) for row in rows for size in SMALLER_CARDS_MIB if not clear or row.is_clear(size)]
    return sum(row.verdict_is_right(size) for row, size in pairs), len(pairs)


def reserve_of_peft() -> tuple[int, list[Compared]]:
    """Predict the runs of PEFT's benchmark, with the length of their longest batch, which is fitted on the first."""
    rows = json.loads((FOLDER / "peft_llama32_3b.json").read_text())["rows"]

    def predicted(row: dict[str, Any], length: int) -> float:
        step = peft_step(tuple(row["target_modules"]), row.get("use_dora", False))
        ranks = np.full(len(step.targets), row["r"])
        use = card_use(step.memory, ranks, step.model.frozen, find_device_spec("L40S"), shape=BatchShape(4, length))
        return use.reserved_bytes / MIB

    length = min(LENGTHS, key=lambda length: abs(predicted(rows[0], length) - rows[0]["reserved_mib"]))
    return length, [Compared(row["name"], predicted(row, length), row["reserved_mib"]) for row in rows]


@dataclass(frozen=True)
class A100Row:
    """One run on A100s of 80 GB, rows of 4,096 tokens; bytes of one card in MiB.

    Attributes:
        model: a Hugging Face id.
        gpus: one, or several that share all weights under FSDP.
        quantization: none or nf4.
        rows: of the batch.
        measured: the peak of what was allocated.
        in_use: of the card as `nvidia-smi` tells, CUDA context included.
    """

    model: str
    gpus: int
    quantization: str
    rows: int
    measured: float
    in_use: float

    @property
    def name(self) -> str:
        """Model and setting, for people."""
        on = f" on {self.gpus} GPUs" if self.gpus > 1 else ""
        return f"{self.model.rpartition('/')[2]} {self.quantization} {self.rows} x {A100_LENGTH}{on}"


A100_LENGTH, A100_RANK = 4096, 16

A100_MODELS = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b-v0.1",
    "NousResearch/Llama-2-70b-hf": "llama-3.1-70b",
}
"""Configurations of the models."""


def a100_rows() -> list[A100Row]:
    """All published runs on an A100."""
    with (FOLDER / "a100_peaks.csv").open() as file:
        return [
            A100Row(
                model=row["model"],
                gpus=int(row["gpus"]),
                quantization=row["quant"] or "none",
                rows=int(row["batch"]),
                measured=1024 * float(row["peak_gib_alloc"]),
                in_use=1024 * float(row["peak_gib_reserved"]),
            )
            for row in csv.DictReader(file)
        ]


def compare_a100(row: A100Row, *, then: bool = True) -> tuple[Compared, Compared]:
    """Predict what a run allocates, and what it takes of the card.

    Args:
        row: as published.
        then: as the libraries of 2024 ran it; else as today's do.
    """
    step = a100_step(row.model, row.quantization, row.gpus, then)
    ranks, shape = np.full(len(step.targets), A100_RANK), BatchShape(row.rows, A100_LENGTH)
    use = card_use(step.memory, ranks, step.model.frozen, find_device_spec("A100 80GB"), shape=shape)
    in_use = (use.reserved_bytes + use.context_bytes) / MIB
    allocated = Compared(row.name, total_mib(step, shape, A100_RANK), row.measured)
    return allocated, Compared(row.name, in_use, row.in_use)


@cache
def a100_step(model: str, quantization: Any, gpus: int, then: bool) -> ConfiguredStep:
    """The training step of a setting, on one card.

    TRL prepares no quantised model that is sharded, and expert weights were linear layers, which load in four bits.
    """
    config = find_configuration(A100_MODELS[model])
    if model.endswith("Llama-2-70b-hf"):
        config.vocab_size, config.max_position_embeddings = 32_000, 4096  # all else is as in Llama 3.1
    config.sliding_window = None  # as long as the rows, so that flash attention needs no mask
    step = StepConfig(
        batch_size=8,
        max_length=A100_LENGTH,
        target_modules="q_proj,k_proj,v_proj,o_proj",
        quantization=quantization,
        gradient_checkpointing=True,
        exact_savers=False,
        bf16=True,
        prepare_kbit=gpus == 1 or quantization == "none",
    )
    loaded = LoadedAs(dtype=torch.bfloat16, experts="axolotl", adapter={"lora_dropout": 0.1})
    with libraries_of_2024() if then else nullcontext():
        return Shards(gpus, "fsdp2" if gpus > 1 else "ddp").of(from_config(config, step, loaded))


@contextmanager
def libraries_of_2024() -> Iterator[None]:
    """Let steps run as transformers 4.46 to 4.49 and TRL 0.11 ran them.

    The loss copied all logits but the last in fp32, while those in half precision were still there; and TRL cast
    embeddings and output layer back to bf16 after PEFT had prepared a model in four bits.
    """

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        whole = logits.float()  # kept until the loss is there, as theirs was
        shifted = whole[..., :-1, :].contiguous().view(-1, vocab_size)
        return torch.nn.functional.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))

    def prepared(model: Any) -> None:
        prepare_quantised(model)
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.to(torch.bfloat16)

    name = "rankpilot.cost.record.quantised.prepare_quantised"
    with patch.dict(LOSS_MAPPING, ForCausalLM=loss), patch(name, prepared):
        yield


TIMED = ("llama-3.1-8b", "llama-3.1-70b")

_TIMED_CODE = """
import json, resource, sys, time
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.step_config import StepConfig
step = StepConfig(batch_size=4, max_length=2048, gradient_checkpointing=True)
before = time.process_time()
from_config(sys.argv[1], step).memory.cost()
print(json.dumps([time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


@dataclass(frozen=True)
class Options:
    """Predict published peaks of LoRA fine-tunes from configurations alone, without a GPU.

    The peaks are of 43 steps on a Tesla T4 (fitcheck-llm, MIT licence), of PEFT's benchmark of Llama-3.2-3B on an
    L40S, where the length of the longest batch is fitted on the first run, and of runs of Mistral-7B, Mixtral-8x7B and
    Llama-2-70B on one A100 and on two (fms-acceleration, Apache-2.0). Beside them: the longest rows that others trained
    on cards of 8 to 80 GB (Unsloth's page of benchmarks). Two more models are timed: CPU seconds and resident memory of
    a fresh process.

    Attributes:
        quick: under a minute: a few small models.
        json: also write the figures to this file, as flat JSON with names like "t4.mean_percent".
        pack: put all rows into the repository's file, of which `python -m benchmarks pages` makes a page.
    """

    quick: bool = False
    json: Path | None = None
    pack: bool = False


def benchmark(options: Options, console: Console) -> Figures:
    """Predict, print the tables, and return all figures.

    Raises:
        ConfigError: a file of a few rows is asked for.
    """
    if options.quick and options.pack:
        raise ConfigError("--pack stores all rows: leave out --quick.")
    t4 = quick_rows(t4_rows()) if options.quick else t4_rows()
    on_t4 = [compare_t4(row) for row in with_progress(t4, "steps on a T4")]
    figures = _report("t4", "Steps on a T4, MiB allocated", on_t4, console)
    _, _, under = summary(run.error_with_left for run in on_t4)
    console.print(f"With what loading left, none is under by more than {max(-under, 0):.2f} %.", highlight=False)
    figures["t4.under_with_left_percent"] = under
    reserved = [reserve_on_t4(row) for row in t4]
    figures |= _report_reserve(reserved, console)
    if not options.quick:
        length, on_l40s = reserve_of_peft()
        title = f"PEFT's Llama-3.2-3B on an L40S, MiB reserved; {length} tokens were fitted on the first"
        figures |= _report("peft_reserved", title, on_l40s, console) | {"peft_reserved.fitted_tokens": length}
        on_one = [row for row in a100_rows() if row.gpus == 1]
        a100 = [compare_a100(row) for row in on_one]
        sharded = [compare_a100(row) for row in a100_rows() if row.gpus > 1]
        today = [compare_a100(row, then=False)[0] for row in on_one]
        figures |= _report("a100", "Mistral-7B on an A100, MiB allocated", [one for one, _ in a100], console)
        figures |= _report("a100_in_use", "The same, MiB of the card in use", [two for _, two in a100], console)
        title = "On two A100s under FSDP, MiB allocated"
        figures |= _report("a100_sharded", title, [one for one, _ in sharded], console)
        figures |= _report("a100_sharded_in_use", "The same, MiB in use", [two for _, two in sharded], console)
        figures |= _report("a100_today", "The same, MiB allocated by today's libraries", today, console)
        on_cards = [Compared(each.name, longest(each), each.tokens) for each in with_progress(contexts(), "contexts")]
        trained = [each for each in on_cards if each.measured]
        figures |= _report("contexts", "The longest row on a card, tokens", trained, console)
        pictures = {
            "pictures": [each for each in picture_rows() if each.meter == "allocated"],
            "pictures_in_use": [each for each in picture_rows() if each.meter != "allocated"],
        }
        seen = {
            group: [Compared(each.name, predicted_mib(each), each.measured) for each in with_progress(runs, group)]
            for group, runs in pictures.items()
        }
        for group, runs in seen.items():
            figures |= _report(group, f"Rows with pictures, MiB ({group})", runs, console)
        figures |= compare_runs(console) | compare_rollouts(console)
    if options.pack:
        rows = [*_stored("t4", on_t4), *_stored_reserves(reserved), *_stored(f"l40s_reserved {length}", on_l40s)]
        rows += [*_stored("a100", [one for one, _ in a100]), *_stored("a100_in_use", [two for _, two in a100])]
        rows += [*_stored("a100_sharded", [one for one, _ in sharded])]
        rows += [*_stored("a100_sharded_in_use", [two for _, two in sharded])]
        rows += [*_stored("a100_today", today), *_stored("contexts", on_cards)]
        rows += [row for group, runs in seen.items() for row in _stored(group, runs)]
        write_json(published_page.ROWS, rows)
    for model in TIMED[:1] if options.quick else TIMED:
        seconds, gib = timed(model)
        console.print(f"{model}: {seconds:.1f} s of CPU, {gib:.2f} GiB resident", highlight=False)
        figures |= {f"time.{model}.cpu_s": seconds, f"time.{model}.resident_gib": gib}
    return figures


def _stored(group: str, runs: Sequence[Compared]) -> list[published_page.StoredRow]:
    return [
        {"group": group, "name": run.name, "predicted": round(run.predicted, 1), "measured": run.measured}
        for run in runs
    ]


def _stored_reserves(runs: Sequence[Reserved]) -> list[published_page.StoredRow]:
    """The same of reserves on a T4, each with its right verdicts and all, and those of clear cases."""
    rows = []
    for run in runs:
        (row,) = _stored(f"t4_reserved {run.row.quantization}", [run.compared])
        row["verdicts"] = [*right_verdicts([run]), *right_verdicts([run], clear=True)]
        rows.append(row)
    return rows


def _report(key: str, title: str, runs: Sequence[Compared], console: Console) -> Figures:
    lines = [(run.name, f"{run.predicted:.0f}", f"{run.measured:.0f}", f"{100 * run.error:+.2f}") for run in runs]
    console.print(make_table(title, ("run", "predicted", "measured", "error, %"), lines))
    mean, worst, under = summary(run.error for run in runs)
    console.print(f"mean {mean:.2f} %, worst {worst:.2f} %, lowest {under:+.2f} %", highlight=False)
    return {f"{key}.mean_percent": mean, f"{key}.worst_percent": worst, f"{key}.under_percent": under}


def _report_reserve(runs: list[Reserved], console: Console) -> Figures:
    """What the allocator reserves, by kind of attention and weights, and verdicts."""
    figures: Figures = {}
    for kind in sorted({run.kind for run in runs}):
        of_kind = [run.compared for run in runs if run.kind == kind]
        figures |= _report(f"t4_reserved.{kind.replace(' ', '_')}", f"MiB reserved: {kind}", of_kind, console)
    right = sum(run.verdict_is_right(CARD_MIB) for run in runs)
    (on_smaller, of), (clear, of_clear) = right_verdicts(runs), right_verdicts(runs, clear=True)
    console.print(
        f"verdicts for {CARD_MIB:,} MiB: {right} of {len(runs)} right; for smaller cards {on_smaller} of {of}, "
        f"{clear} of the {of_clear} whose figures are {CLEAR:.0%} or more from the card",
        highlight=False,
    )
    shares = {"t4_verdicts.smaller_right_share": on_smaller / of, "t4_verdicts.clear_right_share": clear / of_clear}
    return figures | {"t4_verdicts.wrong": len(runs) - right} | shares


def timed(model: str) -> tuple[float, float]:
    """CPU seconds of a prediction in a fresh process, without the imports, and GiB that it holds at most."""
    command = [sys.executable, "-c", _TIMED_CODE, model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gib = json.loads(done.stdout.splitlines()[-1])
    return seconds, gib
