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
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tyro
from numpy.typing import NDArray
from rankpilot.common.arrays import IntArray
from rankpilot.common.files import write_text
from rankpilot.cost.cards import USUAL_CARD, DeviceSpec, card_rates, device_table, find_device_spec
from rankpilot.cost.forecast.card_use import UNDER
from rankpilot.cost.forecast.configured_step import gathered_units
from rankpilot.cost.forecast.known_models import published_models
from rankpilot.cost.forecast.memory_of import AskedStep, shipped, words_of
from rankpilot.cost.forecast.step_file import anchors_of, lagged, narrow, read_memory, read_work, repeats, spans_after
from rankpilot.cost.forecast.stored_step import StepFile, StoredStep
from rankpilot.cost.gathers import with_gathers
from rankpilot.cost.growth import OF_STORAGES
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.moments import DELTA_BYTES, QUANTISED_DELTA_BYTES
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.prices import ACTIVATIONS
from rankpilot.cost.step_config import OptimizerName, Quantization, StepConfig
from rankpilot.cost.step_time import LAUNCH_SECONDS, Rates, WorkGrowth
from rankpilot.cost.streaming import BUS_SHARE, ON_DEVICE, BaseLayers
from rankpilot.lora.spec import highest_ranks
from rich.console import Console
from rich.progress import track

from .record_models import FIRST, QUANTIZATIONS, USUAL, of_trl

SOURCE = Path(__file__).with_name("page")

WIDTHS = {"int8": 1, "int16": 2, "int32": 4, "float64": 8}

OTHER = "another card"
"""The card of which only the memory is known, which people give: the largest, so that it is the last of the list."""

SAVERS = ("none", "free", "selective")
"""Exact savers of a recorded step: none, those that take no time, and selective checkpointing beside them."""

LONGEST_LAG = 12_000
"""After how many rows layers may repeat themselves: where four kinds take turns, and each has thousands."""

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


TRAINERS: dict[str, Callable[[str, Quantization], AskedStep]] = {
    "trl": of_trl,
    "trainer": lambda name, quantization: AskedStep(name, USUAL[quantization]),
}
"""Programs in which a step was recorded: TRL's SFTTrainer, and transformers' Trainer with a prepared model."""


def packed_model(name: str, quantization: Quantization, trainer: str = "trainer") -> bytes | None:
    """What the page knows of a model; None if nothing ships of it, or if it continues no texts."""
    asked = TRAINERS[trainer](name, quantization)
    file = StepFile.read(shipped(name), asked.key)
    if file is None:
        return None
    source = StoredStep(file, _refuse, None, asked.loaded)
    exact = file.text["level"] > 1  # a recording tells of its own batch alone
    words = words_of(published_models()[name]["config"])
    return packed_step(source, asked.settings, words) if source.model.continues and not exact else None


def packed_step(source: StoredStep, settings: StepConfig, words: int) -> bytes:
    """What the page knows of a stored step: a text and arrays, deflated.

    Four bytes tell how long the text is. Then come the text in JSON and the arrays, in the order that it tells.

    Args:
        source: the step.
        settings: with which it was recorded.
        words: vocabulary size of the model.
    """
    model, file = source.model, source.file
    highest = highest_ranks(model.targets)
    widths = np.array([target.d_in + target.d_out for target in model.targets])
    weights = np.array([target.d_in * target.d_out // target.experts for target in model.targets])
    of_model = {"highest": highest, "frozen": np.array(model.frozen), "widths": widths, "weights": weights}
    arrays: Parts = [(-1, name, values, 0) for name, values in of_model.items()]
    states: dict[str, Any] = {}
    for optimizer in get_args(OptimizerName):
        held = asdict(source.states(optimizer))
        states[optimizer] = {key: _plain(value) for key, value in held.items()}
    steps, works, names = list[dict[str, Any]](), list[dict[str, Any]](), saver_names(source, settings)
    layers = 0
    for part, found in file.parts.items():
        kind, _, rest = part.partition(" ")
        if kind not in ("memory", "work") or (savers := names.get(rest.split(" ", 3)[3])) is None:
            continue
        shape = BatchShape(*map(int, rest.split()[0:3:2]))
        if kind == "work":
            works.append(_work(read_work(*found, widths), savers, highest))
            continue
        memory = read_memory(*found, source.states("adamw"), shape)
        if np.isfinite(memory._growth.row_power).all():
            memory = with_gathers(memory, gathered_units(replace(model, words=words)), 1)
            steps.append(_step(memory, savers, shape))
            layers = len({segment.name for segment in memory.segments})
            arrays += _arrays(memory, len(steps) - 1)
    text: dict[str, Any] = {
        "arrays": [], "steps": steps, "works": works, "states": states, "parameters": model.parameters,
        "positions": model.positions, "windows": model.windows,
        "isEager": model.is_eager, "byLength": model.keeps_state or file.text["level"] > 0,
        "keepsState": model.keeps_state, "whole": model.frozen_bytes - model.outside,
        "products": model.products, "fused": model.fused, "words": words,
        "merged": DELTA_BYTES if settings.quantization == "none" else QUANTISED_DELTA_BYTES,
        "base": _base(BaseLayers.of(model.frozen, layers)),
    }  # fmt: skip
    return _deflated(text, arrays)


def _base(base: BaseLayers) -> dict[str, Any]:
    """The frozen weights of layers that can be streamed: each size, and how many of it a layer has."""
    return {"count": base.count, "sizes": [*Counter(base.sizes).items()], "onDevice": ON_DEVICE}


class _NotRecordedError(LookupError):
    """What a page would have to record."""


def _refuse() -> Any:
    raise _NotRecordedError


def _plain(value: Any) -> Any:
    """An array as a list, whole numbers without a point."""
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(each) for each in value]
    return int(value) if float(value).is_integer() else value


def saver_names(source: StoredStep, settings: StepConfig) -> dict[str, str]:
    """The names of `SAVERS` by those of the savers that a usual batch has, as parts of a file are called."""
    length = min(1024, source.model.positions or 1024)
    step = source.configured(replace(settings, batch_size=2, max_length=length))
    free = ", ".join(each.name for each in step.saved[1:])
    lean = ", ".join(filter(None, (free, ACTIVATIONS)))
    return {free: "free", lean: "selective", "plain": "none"}


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
    saved = np.zeros(count, dtype=np.int64)
    saved[[*recording.saved_in_segment]] = 1
    anchors = anchors_of(created, recording.segment_index, recording.forward_end)
    columns = {
        "created": np.diff(created, prepend=0),
        "freed": spans_after(freed, created, anchors),
        "unsaved": spans_after(recording.freed_if_unsaved, created, anchors),
        "saved": saved,
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
        lag, _ = repeats(columns["created"][half], LONGEST_LAG)
        found += [(owner, name, values[half], lag) for name, values in columns.items()]
    segments = list(enumerate(recording.segments))
    tables: dict[str, tuple[int, list[tuple[int, ...]]]] = {
        "gathers": (1, [(serial,) for serial in recording.gathers]),
        "gradients": (3, [(each, module, recording.added_at[each]) for each, module in recording.gradients.items()]),
        "segments": (5, [_segment(memory, index) for index, _ in segments]),
        "inputs": (2, [(serial, index) for index, each in segments for serial in each.inputs]),
        "savedOutside": (
            2,
            [
                (serial, index)
                for index, each in segments
                for serial in each.saved
                if recording.segment_index[serial] != index
            ],
        ),
    }
    for name, (width, rows) in tables.items():
        table = np.array(rows, dtype=np.int64).reshape(-1, width)
        found += [(owner, f"{name} {place}", np.diff(table[:, place], prepend=0), 0) for place in range(width)]
    return found


def _segment(memory: MemoryModel, index: int) -> tuple[int, int, int, int, int]:
    """When a checkpointed segment begins and ends, runs again, has all back, and its backward pass ends."""
    recording = memory.recording
    segment, created = recording.segments[index], recording.created
    own = [s for s in segment.saved if recording.segment_index[s] == index and created[s] <= recording.forward_end]
    backward = created[(created > recording.forward_end) & (recording.segment_index == index)]
    last = int(created[own].max()) if own else -1
    return segment.start, segment.end, recording.second_run_start(index), last, int(backward.max(initial=-1))


def _work(growth: WorkGrowth, savers: str, highest: IntArray) -> dict[str, Any]:
    """What a step computes: operators that are alike, the highest rank of their module (0 for none), and how many."""
    work = growth.work
    layers, (layer_of, _) = len(work.layers), work._layers()
    adapter = work.module >= 0
    layer, most = np.where(adapter, layer_of[work.module], work.layer), np.where(adapter, highest[work.module], 0)
    counted: dict[tuple[Any, ...], IntArray] = {}
    for key, place in zip(zip(*growth.flops, *growth.moved, work.backward, most, strict=True), layer, strict=True):
        counted.setdefault(key, np.zeros(layers + 1, dtype=np.int64))[place] += 1  # the last is for those of no layer
    operators = []
    for (*amounts, backward, rank), (*inside, outside) in counted.items():
        alike = inside[0] if len(set(inside)) == 1 else [int(each) for each in inside]
        operators.append([*map(_plain, amounts), int(backward), int(rank), int(outside), _plain(np.array(alike))])
    return {
        "savers": savers,
        "shapes": [[shape.rows, shape.length] for shape in growth.shapes],
        "rank": work.rank,
        "layers": layers,
        "operators": operators,
    }


def _deflated(text: dict[str, Any], arrays: Parts) -> bytes:
    content: list[bytes] = []
    known: dict[tuple[Any, ...], int] = {}
    for owner, name, values, lag in arrays:
        whole = values.astype(np.int64)
        ways = [whole if np.array_equal(whole, values) else values]
        while lag and ways[0] is whole and len(ways) < 3:
            ways.append(lagged(ways[-1], lag))
        times = min(range(len(ways)), key=lambda index: np.count_nonzero(np.diff(ways[index])))
        changed = narrow(ways[times])
        changed = np.ascontiguousarray(changed if changed.dtype.name in WIDTHS else changed.astype(np.float64))
        how, width = [WIDTHS[changed.dtype.name], lag, times, len(changed)], WIDTHS[changed.dtype.name]
        # The lowest bytes of all numbers first, then the next: they are more alike.
        bytes_of = changed.tobytes() if width == 8 else changed.view(np.uint8).reshape(-1, width).T.tobytes()
        if (key := (*how, bytes_of)) in known:
            text["arrays"].append([owner, name, known[key]])
            continue
        known[key] = len(text["arrays"])
        text["arrays"].append([owner, name, *how])
        content.append(bytes_of)
    said = json.dumps(text, separators=(",", ":")).encode()
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(struct.pack("<I", len(said)) + said + b"".join(content)) + compressor.flush()


def page_models(names: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """What the page knows, in base 64, by short name, and by quantisation and trainer ("nf4/trl")."""
    ordered = names or tuple(dict.fromkeys((*FIRST, *published_models())))
    found: dict[str, dict[str, str]] = {}
    for name in track(ordered, "Models of the page", console=Console(stderr=True)):
        for quantization in QUANTIZATIONS:
            for trainer in TRAINERS:
                if content := packed_model(name, quantization, trainer):
                    found.setdefault(name, {})[f"{quantization}/{trainer}"] = base64.b64encode(content).decode()
    return found


def _rates(card: DeviceSpec) -> Rates:
    rates = card.rates or device_table()[USUAL_CARD].rates
    assert rates is not None, "cards of the table have rates"
    return card_rates(rates, "bf16")


def page(models: dict[str, dict[str, str]]) -> str:
    """The page."""
    cards = {
        name: {
            "memory": card.memory_bytes,
            "context": card.context_bytes,
            "workspace": card.workspace_bytes,
            "flops": _rates(card).flops,
            "bytes": _rates(card).bytes,
            "bus": BUS_SHARE * card.bus_bytes_per_s,
        }
        for name, card in {**device_table(), OTHER: find_device_spec("1TiB")}.items()
        if card.has_flash_attention
    }
    published = published_models()
    about = {name: {key: published[name][key] for key in ("parameters", "id")} for name in models}
    known = {"cards": cards, "about": about, "launch": LAUNCH_SECONDS}
    known["slack"] = UNDER
    script = "\n".join((SOURCE / each).read_text() for each in ("memory.js", "seconds.js", "form.js"))
    parts = {
        "style": (SOURCE / "page.css").read_text(),
        "known": json.dumps(known, separators=(",", ":")),
        "models": "".join(
            f'<script type="application/octet-stream" id="{name}/{kind}">{content}</script>\n'
            for name, kinds in models.items()
            for kind, content in kinds.items()
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
