"""`python -m benchmarks gpu-evidence`: what is claimed of CUDA, predicted and measured on the card that is here.

Each section runs in a process of its own, so that one that fails, hangs or loses the card takes no other along.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rankpilot.common.devices import find_device
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import read_object, write_json, write_text
from rich.console import Console

from .gpu_sections import SECTIONS, Row, Section, perform
from .harness import machine_facts

LEAST_GIB = 22
"""Of the card, as CUDA reports it: one of 24 GiB."""

RAN = "ran"

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([perform.__module__])  # all libraries are loaded once, and none has touched the card


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predict and measure on one CUDA card of 24 GiB or more, in at most 40 minutes; nothing is downloaded.

    The tests marked gpu, the peaks of eight training steps, step times of six plans, a step out of memory, a budget
    that another process takes from, exact savers bit by bit, a paged optimizer, a quantised reload, and NCCL where
    there are two cards. A section that fails is a row, and the others go on; the exit status is 1 then. Written are
    figures, and beside them a page of the same name that ends in .md.

    Attributes:
        dry_run: on the CPU, with tiny models, in three minutes; sections that need CUDA say so.
        only: names of sections, by default all.
        json: the file for the figures.
    """

    dry_run: bool = False
    only: tuple[str, ...] = ()
    json: Path = Path("runs/gpu-evidence.json")


def benchmark(options: Options, console: Console) -> dict[str, Any]:
    """Run the sections and write figures and page after each.

    Raises:
        ConfigError: there is no such section, or no such card.
        SystemExit: a section failed; its status is 1.
    """
    unknown = [name for name in options.only if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r}: there is no such section. Sections are: {', '.join(SECTIONS)}.")
    if not options.dry_run:
        _check_card()
    found: dict[str, Any] = {**machine_facts(find_device("cpu" if options.dry_run else "cuda"))}
    found |= {"dry_run": options.dry_run, "sections": {}}
    for name in options.only or SECTIONS:
        section = run_section(name, dry=options.dry_run)
        found["sections"][name] = section
        console.print(f"{name}: {section['outcome']} ({section['seconds']:.0f} s)", markup=False, highlight=False)
        write_json(options.json, found)
        write_text(options.json.with_suffix(".md"), page(found))
    if any(failed(section) for section in found["sections"].values()):
        raise SystemExit(1)
    return found


def _check_card() -> None:
    """Raise ConfigError unless there is a card that is large enough."""
    if not torch.cuda.is_available():
        raise ConfigError("No CUDA card is at hand. Run it where there is one of 24 GiB, or give --dry-run.")
    memory = torch.cuda.mem_get_info()[1] / 2**30
    if memory < LEAST_GIB:
        raise ConfigError(
            f"The card has {memory:.1f} GiB; the sections need one of 24 GiB. Give --dry-run for the CPU."
        )


def run_section(name: str, *, dry: bool) -> dict[str, Any]:
    """The outcome, seconds and rows of a section, which runs in a fresh process."""
    section, start = SECTIONS[name], time.monotonic()
    missing = _missing(section, dry)
    if missing:
        return {"outcome": missing, "seconds": 0.0, "rows": []}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        process = PROCESSES.Process(target=perform, args=(section, path), kwargs={"dry": dry})
        process.start()
        process.join(60 * section.minutes)
        late = process.is_alive()
        process.kill()
        process.join()
        ended = f"it took more than {section.minutes:g} minutes" if late else f"exit status {process.exitcode}"
        told = read_object(path) if path.exists() else {"rows": [], "error": ended}
    rows, outcome = told["rows"], f"failed: {told['error']}" if told["error"] else RAN
    if outcome == RAN and any(map(_differs, rows)):
        outcome = f"failed: {sum(map(_differs, rows))} rows are not as predicted"
    return {"outcome": outcome, "seconds": time.monotonic() - start, "rows": rows}


def failed(section: Mapping[str, Any]) -> bool:
    """Whether a section ran, or should have, and failed."""
    return str(section["outcome"]).startswith("failed")


def _missing(section: Section, dry: bool) -> str:
    """Why a section is not run; empty if it is."""
    if section.needs and dry:
        return "needs CUDA: not run"
    if section.needs == "bitsandbytes" and find_spec("bitsandbytes") is None:
        return "needs bitsandbytes: not run"
    if section.needs == "two cards" and torch.cuda.device_count() < 2:
        return "needs two cards: not run"
    return ""


def _differs(row: Row) -> bool:
    return bool(row["exact"]) and row["predicted"] != row["measured"]


def page(found: Mapping[str, Any]) -> str:
    """The page in Markdown: predicted beside measured, section by section."""
    facts = ", ".join(f"{name} {found[name]}" for name in ("chip", "rankpilot", "torch", "transformers", "peft"))
    kind = "A dry run on the CPU, with tiny models" if found["dry_run"] else "Measured"
    lines = ["# Predicted and measured on a card", "", f"{kind}: {facts}.", "", "| section | outcome |", "|---|---|"]
    lines += [f"| {name} | {_cell(section['outcome'])} |" for name, section in found["sections"].items()]
    for name, section in found["sections"].items():
        lines += ["", f"## {name}", "", SECTIONS[name].title, "", f"Outcome: {section['outcome']}."]
        if section["rows"]:
            lines += ["", "| what | predicted | measured | difference |", "|---|---:|---:|---:|"]
            lines += [_line(row) for row in section["rows"]]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    predicted, measured = row["predicted"], row["measured"]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (predicted, measured))
    difference = f"{100 * (predicted / measured - 1):+.2f} %" if numbers and predicted and measured else ""
    if _differs(row):
        difference = "not as predicted"
    cells = (row["what"], _told(predicted, row["unit"]), _told(measured, row["unit"]), difference)
    return f"| {' | '.join(map(_cell, cells))} |"


def _told(value: Any, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:.5g}" if isinstance(value, float) and unit != "MiB" else str(value)
    return f"{value:.1f} {unit}" if unit == "MiB" else f"{text} {unit}".strip()


def _cell(text: Any) -> str:
    return str(text).replace("|", "/").replace("\n", " ")
