"""Records the steps of models that are known by name, for the files that ship with the package."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, get_args

import tyro
from rankpilot.common.errors import RankPilotError
from rankpilot.common.files import atomic_path
from rankpilot.cost.forecast.configured_step import LoadedAs
from rankpilot.cost.forecast.known_models import published_models
from rankpilot.cost.forecast.memory_of import AskedStep, shipped
from rankpilot.cost.forecast.step_file import packed, unpacked
from rankpilot.cost.forecast.stored_step import StepFile, StoredStep, versions
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.prices import ACTIVATIONS, free_savers, price_savers
from rankpilot.cost.step_config import OptimizerName, Quantization, StepConfig
from rankpilot.cost.step_time import MASK_ALIGNMENT
from rankpilot.lora.spec import plain_ranks
from rich.console import Console

FIRST = (
    *("llama-3.1-8b", "qwen3-8b", "qwen2.5-7b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.3", "gemma-3-4b"),
    *("qwen3-4b", "qwen3-0.6b", "phi-4", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-14b", "qwen3-14b", "qwen3-32b"),
    *("gemma-3-1b", "gemma-3-12b", "gemma-3-27b", "llama-3.3-70b", "qwen3-1.7b", "gpt-oss-20b", "smollm2-135m"),
)
"""The models that people tune most come first."""

OF_YAMLS = tuple(name for name in FIRST if not name.startswith("gemma"))
"""Of which the steps of other trainers ship as well; a recording of Gemma 3 takes minutes."""

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4")

TRL = LoadedAs(dtype="bf16", loss="chunked")
"""What TRL's SFTTrainer makes of a model in bf16; it trains quantised ones without preparing them."""

LLAMA_FACTORY = LoadedAs(dtype="bf16", reentrant=True)

LENGTHS = (512, 1024, 2048, 4096)
"""Lengths whose answers the files hold where each takes a recording of its own; else any length follows from a few."""


@dataclass(frozen=True)
class Options:
    """Record the steps of models that are known by name; those that are there, of these libraries, are left out.

    Attributes:
        models: short names; by default all, those first that people tune most.
        minutes: no model is begun after so many.
        again: record those that are there as well.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    minutes: float = 60.0
    again: bool = False


def steps(source: StoredStep, settings: StepConfig) -> Iterator[StepConfig]:
    """The steps whose answers a file holds, and from which all others follow: on both sides of windows and of masks."""
    model = source.model
    aligned = [window + -window % MASK_ALIGNMENT for window in model.windows]
    lengths = LENGTHS if model.keeps_state else (512, *model.windows, *aligned)
    lengths += () if model.keeps_state else tuple(length + by for length in aligned for by in (-MASK_ALIGNMENT, 1))
    most = model.positions or max(lengths)
    for length in dict.fromkeys(min(max(length, 2), most) for length in lengths):
        for rows in (2, 1) if model.keeps_state else (2, 16):  # of which other savers may lower the peak
            yield replace(settings, batch_size=rows, max_length=length)
    for optimizer in get_args(OptimizerName):
        yield replace(settings, batch_size=2, max_length=min(lengths[0], most), optimizer=optimizer)


def of_trl(name: str, quantization: Quantization, loaded: LoadedAs = TRL) -> AskedStep:
    """The step of a model whose trainer does not prepare it, as TRL's SFTTrainer."""
    return AskedStep(name, replace(USUAL[quantization], prepare_kbit=quantization == "none"), loaded)


USUAL = {each: StepConfig(bf16=True, quantization=each) for each in QUANTIZATIONS}


def asked_steps(name: str) -> Iterator[AskedStep]:
    """The steps of a model that ship: with the usual settings, and for `OF_YAMLS` those of other trainers."""
    yield from (AskedStep(name, each) for each in USUAL.values())
    if name in OF_YAMLS:
        yield from (of_trl(name, quantization) for quantization in QUANTIZATIONS)
        yield of_trl(name, "nf4", LoadedAs(dtype="bf16"))
        yield from _of_yamls(name)


def _of_yamls(name: str) -> Iterator[AskedStep]:
    """What the usual yamls of TRL and LLaMA-Factory ask for: without exact savers, and with them for `rankpilot:`."""
    dropout = {"lora_dropout": 0.05}
    for quantization in QUANTIZATIONS:
        for loaded in (replace(TRL, adapter=dropout), LLAMA_FACTORY):
            yield _plain(of_trl(name, quantization, loaded))
    for adapter in ({}, dropout):
        yield _plain(of_trl(name, "nf4", replace(TRL, adapter=adapter, double_quantization=False)))


def _plain(asked: AskedStep) -> AskedStep:
    return replace(asked, settings=replace(asked.settings, exact_savers=False))


@cache
def known_keys() -> frozenset[str]:
    """The key of each step that may ship."""
    return frozenset(asked.key for name in published_models() for asked in asked_steps(name))


def record(asked: AskedStep) -> Path:
    """Record a step, and write it into its file, beside those that are there; steps that nothing asks for go."""
    settings, path = asked.settings, shipped(asked.model)
    source = StoredStep(StepFile(asked.key), asked.recorder, None)
    for step in steps(source, settings):
        source.configured(step).leaner()
        if not step.exact_savers:
            record_run(source, step)
        if asked.loaded == TRL:  # of which yamls and the page ask
            source.configured(replace(step, exact_savers=False))
    if source.file.text["level"]:  # a recording tells of its own length alone
        for length, rows in product(LENGTHS, (2, 1)):
            source.configured(replace(settings, batch_size=rows, max_length=length)).leaner()
    for part in [*source.file.parts]:  # whether a saver pays depends on the batch that is asked for
        kind, *words = part.split(" ", 4)
        if kind == "memory":
            names = tuple(words[3].split(", ")) if words[3] != "plain" else ()
            source.work(names, BatchShape(int(words[0]), int(words[2])))
    there = unpacked(path.read_bytes()) if path.exists() else {}
    there[asked.key] = source.file.text, source.file.parts
    with atomic_path(path) as temporary:
        temporary.write_bytes(packed({key: there[key] for key in sorted(known_keys() & set(there))}, small=True))
    return path


def record_run(source: StoredStep, step: StepConfig) -> None:
    """Record what a run under rankpilot adds to a step of a yaml: exact savers, and selective checkpointing."""
    measure, targets = source.configured(step).measure, source.model.targets
    assert measure is not None, "a stored step is recorded"
    priced = price_savers(measure, free_savers(targets), plain_ranks(targets), each=False)
    measure((*priced.names, ACTIVATIONS))


def is_current(asked: AskedStep) -> bool:
    """Whether a step is there, and was recorded by the installed libraries."""
    file = StepFile.read(shipped(asked.model), asked.key)
    return file is not None and file.text["versions"] | {"code": ""} == versions() | {"code": ""}


def main(arguments: list[str]) -> int:
    """Record what is missing; returns 1 if a model could not be recorded."""
    console, options = Console(), tyro.cli(Options, args=arguments)
    begun, failed = time.monotonic(), 0
    names = options.models or tuple(dict.fromkeys((*FIRST, *published_models())))
    for name in names:
        for asked in asked_steps(name):
            if not options.again and is_current(asked):
                continue
            quantization = asked.settings.quantization
            if time.monotonic() - begun > 60 * options.minutes:
                return failed
            before = time.process_time()
            try:
                path = record(asked)
            except RankPilotError as error:
                console.print(f"{name} {quantization}: {error}", markup=False)
                failed = 1
                continue
            taken = time.process_time() - before
            size = path.stat().st_size / 1000
            console.print(f"{name} {quantization}: {taken:.0f} CPU seconds, {path.name} {size:.1f} kB", highlight=False)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
