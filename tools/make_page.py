"""Makes the page that tells whether a fine-tune fits a card: one HTML file, which fetches nothing.

It holds what ships of recorded steps (`cost/recorded`), without what a page does not ask: everything is for adapters on
all modules, in the card's usual attention kernels.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tyro
from numpy.typing import NDArray
from rankpilot.common.files import write_text
from rankpilot.cost.cards import USUAL_CARD, device_table
from rankpilot.cost.growth import OF_STORAGES
from rankpilot.cost.known_models import published_models
from rankpilot.cost.memory_of import AskedStep, shipped
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.outlook import card_rates
from rankpilot.cost.recording import NEVER, BatchShape
from rankpilot.cost.saver_prices import ACTIVATIONS
from rankpilot.cost.step_config import OptimizerName, Quantization, StepConfig
from rankpilot.cost.step_file import lagged, narrow, read_memory, repeats
from rankpilot.cost.stored_step import StepFile, StoredStep
from rankpilot.lora.spec import highest_ranks

from .record_models import FIRST, QUANTIZATIONS

SOURCE = Path(__file__).with_name("page")

WIDTHS = {"int8": 1, "int16": 2, "int32": 4, "float64": 8}

SAVERS = ("none", "free", "selective")
"""Exact savers of a recorded step: none, those that take no time, and selective checkpointing beside them."""

Parts = list[tuple[int, str, NDArray[Any], int]]
"""Owner (a step's number, -1 for the model), name and values of each array, and after how many rows it repeats."""


@dataclass(frozen=True)
class Options:
    """Make the page.

    Attributes:
        output: the HTML file.
        models: short names of those that are on it; by default all that ship.
    """

    output: Path = Path("build/memory.html")
    models: tuple[str, ...] = ()


def packed_model(name: str, quantization: Quantization) -> bytes | None:
    """What the page knows of a model; None if nothing ships that tells any batch, or if it continues no texts."""
    settings = StepConfig(quantization=quantization, bf16=True)
    file = StepFile.read(shipped(name), AskedStep(name, settings).key)
    if file is None:
        return None
    source = StoredStep(file, _refuse, None)
    known = source.model.continues and file.text["level"] == 0
    return packed_step(source, settings) if known else None


def packed_step(source: StoredStep, settings: StepConfig) -> bytes:
    """What the page knows of a stored step: a text and arrays, deflated.

    Four bytes tell how long the text is. Then come the text in JSON and the arrays, in the order that it tells.

    Args:
        source: the step.
        settings: with which it was recorded.
    """
    model, file = source.model, source.file
    highest = highest_ranks(model.targets)
    arrays: Parts = [(-1, "highest", highest, 0), (-1, "frozen", np.array(model.frozen), 0)]
    states: dict[str, Any] = {}
    for optimizer in get_args(OptimizerName):
        held = asdict(source.states(optimizer))
        states[optimizer] = {key: _plain(value) for key, value in held.items()}
    steps: list[dict[str, Any]] = []
    for part, found in file.parts.items():
        kind, _, rest = part.partition(" ")
        if kind == "memory" and (savers := _savers(rest, file)):
            shape = BatchShape(*map(int, rest.split()[0:3:2]))
            memory = read_memory(*found, source.states("adamw"), shape)
            if np.isfinite(memory._growth.row_power).all():
                steps.append(_step(memory, savers, shape))
                arrays += _arrays(memory, len(steps) - 1)
    text: dict[str, Any] = {
        "arrays": [], "steps": steps, "states": states, "parameters": model.parameters, "outside": model.outside,
        "widest": model.widest, "positions": model.positions, "windows": model.windows, "isEager": model.is_eager,
        "keepsState": model.keeps_state, "named": model.named, "times": _times(source, settings),
    }  # fmt: skip
    return _deflated(text, arrays)


class _NotRecordedError(LookupError):
    """What a page would have to record."""


def _refuse() -> Any:
    raise _NotRecordedError


def _plain(value: Any) -> Any:
    """An array as a list, whole numbers without a point."""
    if isinstance(value, (np.ndarray, list)):
        return [_plain(each) for each in value]
    return int(value) if float(value).is_integer() else value


def _savers(rest: str, file: StepFile) -> str:
    """Which of `SAVERS` a part of a file has; "" for those in between."""
    shape, names = rest.split(" ", 3)[:3], rest.split(" ", 3)[3]
    if names == "plain":
        return "none"
    start = f"memory {' '.join(shape)} "
    free = [
        part.removeprefix(start)
        for part in file.parts
        if part.startswith(start) and ACTIVATIONS not in part and not part.endswith("plain")
    ]
    best = max(free, key=lambda each: (each.count(","), each), default="")
    return {best: "free", f"{best}, {ACTIVATIONS}": "selective"}.get(names, "")


def _step(memory: MemoryModel, savers: str, shape: BatchShape) -> dict[str, Any]:
    growth, recording = memory._growth, memory.recording
    kinds, _ = growth.kinds
    tiles = growth.tile_tokens
    return {
        "savers": savers,
        "shape": [shape.rows, shape.length],
        "recorded": [growth.recorded.rows, growth.recorded.length],
        "lengthRatio": growth.length_ratio,
        "blockBytes": memory._block_bytes,
        "forwardEnd": recording.forward_end,
        "kinds": _plain(np.stack([getattr(kinds, each) for each in OF_STORAGES], axis=1)),
        "tiles": tiles and [tiles.of_token, tiles.of_row, tiles.size.parts, tiles.size.least, tiles.size.most],
    }


def _arrays(memory: MemoryModel, owner: int) -> Parts:
    """The arrays of a step in which all modules are adapted, those of storages cut behind the forward pass."""
    recording, (_, kind) = memory.recording, memory._growth.kinds
    created, count = recording.created, len(recording.created)
    freed, needed = recording.freed.copy(), np.zeros(count, dtype=np.int64)
    needed[[*recording.needed]] = 1
    for serial, phases in recording.needed_later.items():
        freed[serial] = next((time for time, modules in phases if not modules), freed[serial])
    columns = {
        "created": np.diff(created, prepend=0),
        "freed": np.where(freed == NEVER, -1, freed - created),
        "unsaved": np.where(recording.freed_if_unsaved == NEVER, -1, recording.freed_if_unsaved - created),
        "segment": recording.segment_index,
        "target": recording.target_index,
        "needed": needed,
        "kind": kind,
        "base": memory._base,
        "slope": memory._slope,
    }
    forward = int(np.searchsorted(created, recording.forward_end, side="right"))
    found: Parts = []
    for half in (slice(forward), slice(forward, None)):
        lag, _ = repeats(columns["created"][half])
        found += [(owner, name, values[half], lag) for name, values in columns.items()]
    gradients = [(serial, module, recording.added_at[serial]) for serial, module in recording.gradients.items()]
    segments = [_segment(memory, index) for index in range(len(recording.segments))]
    inputs = [(serial, index) for index, each in enumerate(recording.segments) for serial in each.inputs]
    saved = [(serial, index) for index, each in enumerate(recording.segments) for serial in each.saved]
    tables: dict[str, Sequence[tuple[int, ...]]] = {
        "gradients": gradients, "segments": segments, "inputs": inputs, "saved": saved,
    }  # fmt: skip
    for name, rows in tables.items():
        table = np.array(rows, dtype=np.int64).reshape(len(rows), -1)
        if name in ("inputs", "saved") and len(table):
            table[:, 0] = np.diff(table[:, 0], prepend=0)
        found.append((owner, name, table.ravel(), 3 if name == "gradients" else 5 if name == "segments" else 0))
    return found


def _segment(memory: MemoryModel, index: int) -> tuple[int, int, int, int, int]:
    """When a checkpointed segment begins and ends, runs again, has all back, and its backward pass ends."""
    recording = memory.recording
    segment, created = recording.segments[index], recording.created
    own = [s for s in segment.saved if recording.segment_index[s] == index and created[s] <= recording.forward_end]
    backward = created[(created > recording.forward_end) & (recording.segment_index == index)]
    last = int(created[own].max()) if own else -1
    return segment.start, segment.end, recording.second_run_start(index), last, int(backward.max(initial=-1))


def _times(source: StoredStep, settings: StepConfig) -> dict[str, float]:
    """Times of a step with all layers checkpointed, and with selective checkpointing, as shares of plain LoRA's."""
    length = min(1024, source.model.positions or 1024)
    try:
        step = source.configured(StepConfig(**asdict(settings) | {"batch_size": 2, "max_length": length}))
    except _NotRecordedError:  # no recording tells other batches
        return {}
    rates, names = device_table()[USUAL_CARD].rates, [segment.name for segment in step.memory.segments]
    if step.work is None or rates is None:
        return {}
    ranks = np.minimum(8, highest_ranks(step.targets))
    time = step.work.time(card_rates(rates, "bf16"))
    plain, lean = time.seconds(ranks, ()), step.leaner()
    found = {"checkpointed": time.seconds(ranks, names) / plain}
    if lean and lean.work:
        found["selective"] = lean.work.time(card_rates(rates, "bf16")).seconds(ranks, ()) / plain
    return {key: round(value, 3) for key, value in found.items()}


def _deflated(text: dict[str, Any], arrays: Parts) -> bytes:
    content = []
    for owner, name, values, lag in arrays:
        whole = values.astype(np.int64)
        ways = [whole if np.array_equal(whole, values) else values]
        while lag and ways[0] is whole and len(ways) < 3:
            ways.append(lagged(ways[-1], lag))
        times = min(range(len(ways)), key=lambda index: np.count_nonzero(np.diff(ways[index])))
        changed = narrow(ways[times])
        changed = changed if changed.dtype.name in WIDTHS else changed.astype(np.float64)
        text["arrays"].append([owner, name, WIDTHS[changed.dtype.name], lag, times, len(changed)])
        content.append(np.ascontiguousarray(changed).tobytes())
    said = json.dumps(text, separators=(",", ":")).encode()
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(struct.pack("<I", len(said)) + said + b"".join(content)) + compressor.flush()


def page_models(names: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """What the page knows, in base 64, by short name and quantisation."""
    ordered = names or tuple(dict.fromkeys((*FIRST, *published_models())))
    found: dict[str, dict[str, str]] = {}
    for name in ordered:
        for quantization in QUANTIZATIONS:
            if content := packed_model(name, quantization):
                found.setdefault(name, {})[quantization] = base64.b64encode(content).decode()
    return found


def page(models: dict[str, dict[str, str]]) -> str:
    """The page."""
    cards = {
        name: {"memory": card.memory_bytes, "context": card.context_bytes, "workspace": card.workspace_bytes}
        for name, card in device_table().items()
        if card.has_flash_attention
    }
    published = published_models()
    about = {
        name: {"parameters": published[name]["parameters"], "id": f"{published[name]['owner']}/{name}"}
        for name in models
    }
    known = {"cards": cards, "about": about}
    script = "\n".join((SOURCE / each).read_text() for each in ("memory.js", "form.js"))
    parts = {
        "style": (SOURCE / "page.css").read_text(),
        "known": json.dumps(known, separators=(",", ":")),
        "models": "".join(
            f'<script type="application/octet-stream" id="{name}/{quantization}">{content}</script>\n'
            for name, kinds in models.items()
            for quantization, content in kinds.items()
        ),
        "script": script,
    }
    text = (SOURCE / "page.html").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def main(arguments: list[str]) -> int:
    """Write the page."""
    options = tyro.cli(Options, args=arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, page(page_models(options.models)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
