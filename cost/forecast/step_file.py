"""Files of recorded steps: JSON text and arrays, compressed as a whole.

A file holds steps of models with the same architecture, and stores equal arrays once. Layers are alike too, so their
storages differ by constant steps: times are stored as differences, sets of modules as indices into a table, integers in
as few bytes as possible. The rest compresses to a few per cent. Reading needs only numpy; a checksum detects damaged
files.
"""

from __future__ import annotations

import json
import lzma
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.arrays import Arrays, IntArray
from ...common.errors import DataError, first_line, shown
from ..cost import ModuleSet
from ..growth import OF_STORAGES, Growth
from ..model import RANK, MemoryModel, ModelStates
from ..recording import NEVER, BatchShape, Recording, Segment
from ..step_time import StepWork, WorkGrowth
from ..tile_size import TileSize, TileTokens

MOST_BYTES = 2**28
"""Maximum size of an unpacked file in bytes."""

Json = dict[str, Any]

Part = tuple[Arrays, Json]
"""Arrays by name, and the text, of a part of a step."""

Step = tuple[Json, dict[str, Part]]
"""Text of a step as a whole, and its parts by name."""


def packed(steps: Mapping[str, Step], *, small: bool) -> bytes:
    """Pack steps by key into a file; `small` takes seconds to find the repetition of layers.

    The file holds the length of the text in eight bytes, the text with the indices of each part's arrays, and the
    arrays in that order.
    """
    found: dict[Any, tuple[str, NDArray[Any]]] = {}
    for _, parts in steps.values():
        for arrays, _ in parts.values():
            for name, array in arrays.items():
                found.setdefault(_same(array), (name, array))
    ordered = sorted(found, key=lambda same: found[same][0])  # similar arrays compress better side by side
    numbers = {same: number for number, same in enumerate(ordered)}
    heads, bodies = zip(*(_written(found[same][1], small) for same in ordered), strict=True)
    told = {
        key: (
            said,
            {part: (text, {name: numbers[_same(own[name])] for name in own}) for part, (own, text) in parts.items()},
        )
        for key, (said, parts) in steps.items()
    }
    text = json.dumps([told, heads], separators=(",", ":")).encode()
    content = b"".join((len(text).to_bytes(8, "little"), text, *bodies))
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME if small else 1)


def _same(array: NDArray[Any]) -> Any:
    """Return a key shared by equal arrays."""
    return array.dtype.str, array.shape, array.tobytes()


def unpacked(content: bytes, keys: Collection[str] | None = None) -> dict[str, Step]:
    """Unpack the steps of a file by key, optionally only these keys.

    Raises:
        DataError: it is damaged, or too large.
    """
    reader = lzma.LZMADecompressor()
    try:
        plain = reader.decompress(content, max_length=MOST_BYTES)
        if not reader.eof:
            raise DataError(f"It is truncated, or unpacks to more than {MOST_BYTES:,} bytes.")
        start = 8 + int.from_bytes(plain[:8], "little")
        told, heads = json.loads(plain[8:start])
        sizes = [np.dtype(head[0]).itemsize * math.prod(head[2]) for head in heads]
        starts = np.cumsum([start, *sizes]).tolist()

        @cache
        def array(number: int) -> NDArray[Any]:
            return _read(heads[number], plain[starts[number] : starts[number + 1]])

        return {
            key: (said, {name: ({each: array(own[each]) for each in own}, text) for name, (text, own) in parts.items()})
            for key, (said, parts) in told.items()
            if keys is None or key in keys
        }
    except (lzma.LZMAError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"It is not a file of recorded steps: {first_line(error)}") from error


def _written(array: NDArray[Any], small: bool) -> tuple[Any, bytes]:
    """Return an array's entry in the text, and its bytes."""
    values = array
    if array.dtype.kind == "f" and np.isfinite(array).all() and np.array_equal(whole := array.astype(np.int64), array):
        values = whole
    lag, times = 0, 0
    if small and values.dtype.kind == "i":
        lag, times = repeats(values if values.ndim == 1 else values[:, 0])
    for _ in range(times):
        values = lagged(values, lag)
    values = narrow(values)
    return (values.dtype.str, array.dtype.str, array.shape, lag, times), values.tobytes()


def _read(head: Any, content: bytes) -> NDArray[Any]:
    written, kind, shape, lag, times = head
    values: NDArray[Any] = np.frombuffer(content, dtype=written).reshape(shape)
    if not {written, kind} <= _TYPES or (times and not 0 < lag <= _LONGEST_LAG):
        raise DataError(f"An array is {shown(head)}.")
    for _ in range(min(times, 2)):
        values = _unlagged(values, lag)
    return values.astype(kind, copy=False)


_LONGEST_LAG = 2000

_LAST, _TRIED = 4000, 60
"""Number of values used to preselect lags, and number of lags then tried on all values."""

_TYPES = {"|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<f8"}


def repeats(values: NDArray[Any], longest: int = _LONGEST_LAG) -> tuple[int, int]:
    """Return the number of rows after which values repeat up to constant steps, and the order of differences.

    They minimise the changes left after `lagged`. Steps are constant within each kind of row, so second differences are
    often 0; (0, 0) if nothing helps. Searches up to `longest` rows: all values, for the lags at which the last ones
    repeat best.
    """
    best, least = (0, 0), np.count_nonzero(np.diff(values))
    for lag in _likely(values.astype(np.int64), min(longest, len(values) // 3)):
        changed = values
        for times in (1, 2):
            changed = lagged(changed, lag)
            changes = np.count_nonzero(changed[1:] != changed[:-1])
            if changes < least:
                best, least = (lag, times), changes
    return best


def _likely(values: NDArray[np.int64], longest: int) -> list[int]:
    """Return the lags below `longest` at which the last values repeat best, in increasing order."""
    last = min(_LAST, len(values) - longest)
    changes = np.zeros(max(longest, 1), dtype=np.int64)
    for lag in range(1, longest):
        changed = values[-last:] - values[len(values) - last - lag : -lag]
        changes[lag] = np.count_nonzero(changed[1:] != changed[:-1])
    return sorted((np.argsort(changes[1:], kind="stable")[:_TRIED] + 1).tolist())


def lagged(values: NDArray[Any], lag: int) -> NDArray[Any]:
    """Return the difference of each row from the one `lag` rows before."""
    changed = values.astype(np.int64)
    changed[lag:] -= values[:-lag]
    return changed


def _unlagged(changed: NDArray[Any], lag: int) -> NDArray[Any]:
    rest = changed.shape[1:]
    whole = np.zeros((-(-len(changed) // lag) * lag, *rest), dtype=np.int64)
    whole[: len(changed)] = changed
    summed: NDArray[Any] = whole.reshape(-1, lag, *rest).cumsum(axis=0).reshape(-1, *rest)
    return summed[: len(changed)]


def _halves(columns: Mapping[str, NDArray[Any]], forward: int) -> Arrays:
    """Split columns after the forward pass: the backward pass has the layers in reverse."""
    cut = {name: column[..., :forward] for name, column in columns.items()}
    return cut | {f"{name}{_BACKWARD}": column[..., forward:] for name, column in columns.items()}


def _whole(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Rejoin the split columns of the arrays."""
    halves = {name: half for name, half in arrays.items() if name.endswith(_BACKWARD)}
    both = {(whole := name.removesuffix(_BACKWARD)): (arrays[whole], half) for name, half in halves.items()}
    joined = {name: np.concatenate(pair, axis=-1) for name, pair in both.items()}
    return {name: array for name, array in arrays.items() if name not in halves} | joined


_BACKWARD = ", backward"


_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.|$)")


def names_alike(names: Sequence[str]) -> list[str]:
    """Encode the first number in each name relative to the one before: "=" for the same, "+" for the next."""
    written, last = [], -1
    for name in names:
        if found := _NUMBER.search(name):
            number = int(found[1])
            told = "=" if number == last else "+" if number == last + 1 else found[1]
            name, last = name[: found.start()] + told + name[found.end() :], number
        written.append(name)
    return written


_TOLD = re.compile(r"(?<=\.)(\d+|=|\+)(?=\.|$)")


def names_told(written: Sequence[str]) -> tuple[str, ...]:
    """Decode the names written by `names_alike`."""
    names, last = [], -1
    for name in written:
        if found := _TOLD.search(name):
            last = last if found[1] == "=" else last + 1 if found[1] == "+" else int(found[1])
            name = f"{name[: found.start()]}{last}{name[found.end() :]}"
        names.append(name)
    return tuple(names)


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Store integers in as few bytes as possible."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.signedinteger) or not values.size:
        return values
    kinds = (np.int8, np.int16, np.int32)
    low, high = int(values.min()), int(values.max())
    kind = next((kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), np.int64)
    return values.astype(kind)


class _Sets:
    """A table of sets of modules."""

    def __init__(self) -> None:
        self._numbers: dict[ModuleSet, int] = {}

    def number(self, modules: ModuleSet) -> int:
        return self._numbers.setdefault(modules, len(self._numbers))

    def array(self) -> NDArray[np.uint8]:
        """Return the bits of each set, uint8 (sets, bytes)."""
        width = max((modules.bit_length() for modules in self._numbers), default=0) // 8 + 1
        rows = b"".join(modules.to_bytes(width, "little") for modules in self._numbers)
        return np.frombuffer(rows, dtype=np.uint8).reshape(-1, width)


def _sets_of(array: NDArray[Any]) -> list[ModuleSet]:
    return [int.from_bytes(row.tobytes(), "little") for row in array]


def anchors_of(created: IntArray, segments: IntArray, forward_end: int) -> IntArray:
    """Return the anchor time from which each storage's release is stored, int64 (storages,).

    It is the start of its segment's backward pass, so that layers look alike, or its creation.
    """
    backward = np.flatnonzero(created > forward_end)[::-1]
    first = np.zeros(segments.max(initial=-1) + 2, dtype=np.int64)  # the last is for storages outside segments
    first[segments[backward]] = created[backward]  # the earliest stays
    first[-1] = 0
    return np.maximum(created, first[segments])


def spans_after(times: IntArray, created: IntArray, anchors: IntArray) -> IntArray:
    """Encode times relative to anchors, or below -1 relative to the creation; -1 for never."""
    spans = np.where(times < anchors, created - times - 2, times - anchors)
    return np.where(times == NEVER, -1, spans)


def _times(spans: IntArray, created: IntArray, anchors: IntArray) -> IntArray:
    """Decode the times written by `_after`."""
    times = np.where(spans < -1, created - spans - 2, anchors + spans)
    return np.where(spans == -1, NEVER, times)


def _table(rows: Sequence[Sequence[int]], width: int) -> IntArray:
    """Return a table of integers, (rows, width), with the first column as differences."""
    table = np.array(rows, dtype=np.int64).reshape(-1, width)
    table[:, 0] = np.diff(table[:, 0], prepend=0)
    return table


def _rows(table: NDArray[Any]) -> list[list[int]]:
    whole = table.astype(np.int64)
    whole[:, 0] = np.cumsum(whole[:, 0])
    rows: list[list[int]] = whole.tolist()
    return rows


_INDICES = ("name_index", "target_index", "segment_index")


def memory_arrays(memory: MemoryModel) -> tuple[Arrays, Json]:
    """Encode a byte model without its states and batch shape."""
    recording, growth, sets = memory.recording, memory._growth, _Sets()
    created = recording.created
    anchors = anchors_of(created, recording.segment_index, recording.forward_end)
    needed = np.zeros(len(created), dtype=np.int64)
    for serial, modules in recording.needed.items():
        needed[serial] = 1 + sets.number(modules)
    segments = list(enumerate(recording.segments))
    tables: dict[str, tuple[list[Any], int]] = {
        "later": (
            [
                (serial, time - created[serial], sets.number(modules))
                for serial, phases in recording.needed_later.items()
                for time, modules in phases
            ],
            3,
        ),
        "context": ([(serial, time - created[serial]) for serial, time in recording.on_context_until.items()], 2),
        "gradients": (list(recording.gradients.items()), 2),
        "added": ([(serial, time - created[serial]) for serial, time in recording.added_at.items()], 2),
        "segments": ([(each.start, each.end - each.start, each.reentrant) for _, each in segments], 3),
        "inputs": ([(serial, number) for number, each in segments for serial in each.inputs], 2),
        "outputs": ([(serial, number) for number, each in segments for serial in each.outputs], 2),
        "saved": (
            [(serial, number, sets.number(m)) for number, each in segments for serial, m in each.saved.items()],
            3,
        ),
    }
    columns = {
        "sizes": recording.sizes,
        "created": np.diff(created, prepend=0),
        "freed": spans_after(recording.freed, created, anchors),
        "freed_if_unsaved": spans_after(recording.freed_if_unsaved, created, anchors),
        "uses_saved": recording.uses_saved,
        "slope": memory._slope,
        "needed": needed,
        **{name: getattr(recording, name) for name in _INDICES},
        **{name: getattr(growth, name) for name in OF_STORAGES},
    }
    if not np.array_equal(memory._base, recording.sizes - RANK * memory._slope):  # experts have higher ranks
        columns["base"] = memory._base
    forward = int(np.searchsorted(created, recording.forward_end, side="right"))
    arrays = _halves(columns, forward) | {name: _table(*table) for name, table in tables.items()}
    tiles = growth.tile_tokens
    text = {
        "segments": names_alike([each.name for _, each in segments]),
        "forward_end": recording.forward_end,
        "inputs_on_device": recording.inputs_on_device,
        "block_bytes": memory._block_bytes,
        "recorded": _numbers_of(growth.recorded),
        "length_ratio": growth.length_ratio,
        "tiles": tiles and [tiles.of_token, tiles.of_row, tiles.size.parts, tiles.size.least, tiles.size.most],
    }
    return {**arrays, "names": _letters(recording.names), "sets": sets.array()}, text


def _letters(names: Sequence[str]) -> NDArray[np.uint8]:
    """Encode names as an array, so a file stores it once."""
    return np.frombuffer("\n".join(names_alike(names)).encode(), dtype=np.uint8)


def _numbers_of(shape: BatchShape) -> list[int]:
    return [shape.rows, shape.length]


def read_memory(arrays: Mapping[str, Any], text: Json, states: ModelStates, shape: BatchShape) -> MemoryModel:
    """Decode the byte model written by `memory_arrays`, with these states and for batches of this shape."""
    arrays = _whole(arrays)
    sets = _sets_of(arrays["sets"])
    created = np.cumsum(arrays["created"], dtype=np.int64)
    anchors = anchors_of(created, arrays["segment_index"], text["forward_end"])
    times = created.tolist()
    rows = {name: _rows(arrays[name]) for name in ("later", "context", "gradients", "added")}
    later: dict[int, Any] = {}
    for serial, span, number in rows["later"]:
        later[serial] = (*later.get(serial, ()), (times[serial] + span, sets[number]))
    needed = arrays["needed"]
    indices: dict[str, Any] = {name: arrays[name].astype(np.int64) for name in _INDICES}
    recording = Recording(
        sizes=arrays["sizes"].astype(np.int64),
        created=created,
        freed=_times(arrays["freed"], created, anchors),
        freed_if_unsaved=_times(arrays["freed_if_unsaved"], created, anchors),
        **indices,
        needed={serial: sets[needed[serial] - 1] for serial in np.flatnonzero(needed).tolist()},
        needed_later=later,
        on_context_until={serial: times[serial] + span for serial, span in rows["context"]},
        uses_saved=arrays["uses_saved"].astype(np.bool_),
        gradients=dict(rows["gradients"]),  # type: ignore[arg-type]
        added_at={serial: times[serial] + span for serial, span in rows["added"]},
        names=names_told(arrays["names"].tobytes().decode().split("\n")),
        forward_end=text["forward_end"],
        inputs_on_device=text.get("inputs_on_device", 0),
        segments=_segments(arrays, names_told(text["segments"]), sets),
    )
    slope = arrays["slope"].astype(np.float64)
    tiles = text["tiles"]
    growth = Growth(
        whole=shape,
        recorded=BatchShape(*text["recorded"]),
        length_ratio=text["length_ratio"],
        tile_tokens=tiles and TileTokens(tiles[0], tiles[1], TileSize(*tiles[2:])),
        **{name: arrays[name] for name in OF_STORAGES},
    )
    base = arrays["base"] if "base" in arrays else recording.sizes - RANK * slope
    return MemoryModel(shape, False, states, recording, base, slope, growth, text["block_bytes"])


def _segments(arrays: Mapping[str, Any], names: Sequence[str], sets: list[ModuleSet]) -> tuple[Segment, ...]:
    inputs, outputs = ([list[int]() for _ in names] for _ in range(2))
    saved: list[dict[int, ModuleSet]] = [{} for _ in names]
    for found, name in ((inputs, "inputs"), (outputs, "outputs")):
        for serial, number in _rows(arrays[name]):
            found[number].append(serial)
    for serial, number, modules in _rows(arrays["saved"]):
        saved[number][serial] = sets[modules]
    return tuple(
        Segment(start, start + span, tuple(i), tuple(o), (0, 0), bool(reentrant), name, s)
        for (start, span, reentrant), i, o, name, s in zip(
            _rows(arrays["segments"]), inputs, outputs, names, saved, strict=True
        )
    )


def work_arrays(growth: WorkGrowth) -> tuple[Arrays, Json]:
    """Encode the computation of a step."""
    work, sets = growth.work, _Sets()
    needed = np.array([sets.number(modules) for modules in work.needed], dtype=np.int64)
    columns = {name: getattr(work, name) for name in ("backward", "module", "layer")}
    columns |= {"flops": growth.flops, "moved": growth.moved, "needed": needed}
    arrays = _halves(columns, int(np.count_nonzero(~work.backward))) | {"sets": sets.array()}
    text = {
        "shapes": [_numbers_of(shape) for shape in growth.shapes],
        "rank": work.rank,
        "layers": names_alike(work.layers),
        "running_again": names_alike(work.running_again),
    }
    return arrays, text


def read_work(arrays: Mapping[str, Any], text: Json, widths: IntArray) -> WorkGrowth:
    """Decode the work written by `work_arrays`; `widths` are those of `StepWork`."""
    arrays, sets = _whole(arrays), _sets_of(arrays["sets"])
    flops, moved = arrays["flops"].astype(np.float64), arrays["moved"].astype(np.float64)
    work = StepWork(
        flops=flops[0],
        moved=moved[0],
        backward=arrays["backward"].astype(np.bool_),
        module=arrays["module"].astype(np.int64),
        layer=arrays["layer"].astype(np.int64),
        needed=tuple(sets[number] for number in arrays["needed"].tolist()),
        rank=text["rank"],
        widths=widths,
        layers=names_told(text["layers"]),
        running_again=names_told(text["running_again"]),
    )
    return WorkGrowth(tuple(BatchShape(*shape) for shape in text["shapes"]), work, flops, moved)


def states_arrays(states: ModelStates) -> tuple[Arrays, Json]:
    """Encode the state held by an adapter and its optimizer between steps."""
    values = {each.name: getattr(states, each.name) for each in fields(ModelStates)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in values.items() if name not in arrays}


def read_states(arrays: Mapping[str, Any], text: Json) -> ModelStates:
    """Decode the state written by `states_arrays`."""
    return ModelStates(**{name: value.astype(np.float64) for name, value in arrays.items()}, **text)
