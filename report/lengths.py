"""Predict steps run in parts on rows of known lengths, compared with padded rectangles."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ..common import drawing
from ..common.arrays import FloatArray, IntArray
from ..common.errors import AssetError, BudgetError, DataError, UnknownNameError, UnsupportedError, first_line, shown
from ..common.files import read_text
from ..common.text import byte_unit, format_bytes, make_table, plural
from ..cost.cards import USUAL_CARD, card_rates, device_table
from ..cost.forecast.outlook import Outlook, room_for_tensors
from ..cost.model import fewest_checkpointed
from ..cost.recording import BatchShape
from ..cost.streaming import PartSeconds
from ..decide.plan.parts import PlanBytes, longest_that_fits, plan_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_STEPS = 500
"""Maximum number of evaluated steps: the first ones of one order of the rows."""

MOST_BYTES = 2**26
"""Maximum size of a file of lengths in bytes."""


@dataclass(frozen=True, eq=False)
class StepsOfLengths:
    """Predictions for steps on rows of known lengths. Seconds use published rates; only their ratios matter.

    Attributes:
        steps: number of evaluated steps.
        rows: rows per step.
        longest: tokens of the longest row.
        fits: tokens of the longest row that fits alone with all layers checkpointed; `longest` if all do.
        too_long: steps with a row too long to fit alone.
        rectangle_too_large: steps that do not fit as a rectangle with all layers checkpointed.
        rectangle_layers: layers checkpointed in every rectangle for the largest one to fit.
        parts: mean number of parts per step.
        layers: mean number of checkpointed layers of a part, weighted by tokens.
        time: seconds in parts divided by seconds of rectangles.
        padding_saved: share of the padding that is not computed.
        rectangle_bytes: peak bytes of each rectangle, (steps,).
        parts_bytes: peak bytes of each step in parts, NaN if a row does not fit, (steps,).
        limit: bytes available to a step; infinite without a limit.
        filling_tokens: tokens below which smaller parts are not faster on this device.
    """

    steps: int
    rows: int
    longest: int
    fits: int
    too_long: int
    rectangle_too_large: int
    rectangle_layers: int
    parts: float
    layers: float
    time: float
    padding_saved: float
    rectangle_bytes: FloatArray
    parts_bytes: FloatArray
    limit: float
    filling_tokens: int


def read_lengths(path: Path) -> IntArray:
    """Read the tokens per row from a file: whole numbers separated by spaces, commas or line ends, or a JSON list.

    Raises:
        DataError: it holds something else, or nothing.
        RunFolderError: it cannot be read.
    """
    text = read_text(path, MOST_BYTES).strip()
    text = text[1:-1].strip() if text[:1] + text[1:][-1:] == "[]" else text
    words = re.split(r"[\s,]+", text) if text else []
    wrong = next((word for word in words if not re.fullmatch(r"[0-9]{1,9}", word) or not int(word)), None)
    if not words or wrong is not None:
        what = "nothing" if wrong is None else shown(wrong)
        how = "as whole numbers above 0 separated by spaces, commas or newlines"
        raise DataError(f"{path} contains {what}; expected one length in tokens per row, {how}.")
    return np.array([int(word) for word in words], dtype=np.int64)


def lengths_of(given: str, model: str, max_length: int = 0) -> IntArray:
    """Return the tokens per row from a file of lengths, or from a column of a data set.

    Args:
        given: the file, or DATASET:COLUMN, as rotten-tomatoes:text or rows.jsonl:prompt. A column holds texts, or lists
            of tokens.
        model: name of the model whose tokenizer counts the tokens of texts.
        max_length: length at which training truncates rows; 0 for none.

    Raises:
        DataError, UnknownNameError, AssetError: there is no such file, data set, column or tokenizer, or a row holds
            something else.
        RunFolderError: the file cannot be read.
    """
    name, _, column = given.rpartition(":")
    if Path(given).is_file():
        found = read_lengths(Path(given))
        return np.minimum(found, max_length or found)
    if not name:
        ways = "Pass a file with the length in tokens of each row, or DATASET:COLUMN."
        raise DataError(f"File {given} does not exist. {ways}")
    from ..data.columns import check_rows, not_list, not_text  # these need datasets
    from ..data.workload import load_splits

    splits = load_splits(name)
    part = splits["train"] if "train" in splits else next(iter(splits.values()))
    if column not in part.column_names:
        raise UnknownNameError.of("column", column, part.column_names)
    is_tokens = len(part) > 0 and isinstance(part[0][column], list)
    advice = f"--lengths {given} requires texts or lists of tokens."
    check_rows(part, column, not_list if is_tokens else not_text, advice)
    rows: Any = part[column][:]
    if not is_tokens:
        rows = _tokenizer(model)(rows, verbose=False)["input_ids"] if rows else []
    found = np.array([len(row) for row in rows if len(row)], dtype=np.int64)
    if not len(found):
        raise DataError(f"Column {column!r} of {name} has no tokens: all {len(part)} rows are empty.")
    return np.minimum(found, max_length or found)


def _tokenizer(model: str) -> Any:
    from ..data.models import load_tokenizer  # this needs transformers

    try:
        return load_tokenizer(model)
    except (UnknownNameError, AssetError) as error:
        needs = f"Counting the tokens of a column requires the tokenizer of {model}, which is not available"
        advice = "Pass the model's folder, or a file with the length of each row."
        raise AssetError(f"{needs}: {first_line(error)} {advice}") from error


def steps_of_lengths(outlook: Outlook, lengths: IntArray) -> StepsOfLengths:
    """Predict steps on rows with these lengths, drawn in a fixed random order.

    Args:
        outlook: outlook of the step.
        lengths: tokens of each row of the data set, int64 (rows,), at least one.

    Raises:
        UnsupportedError: the model's operations depend on its data, so other shapes are unknown.
    """
    memory, ranks = outlook.memory, outlook.main.ranks
    whole = BatchShape(rows := memory.shape.rows, int(lengths.max()))
    if not memory.predicts(whole) or not memory.predicts(BatchShape(1, 1)):
        raise UnsupportedError(
            "The operations of this model depend on its data, so steps in parts cannot be predicted."
        )
    order = np.random.default_rng(0).permutation(np.resize(lengths, max(len(lengths), rows)))
    batches = order[: len(order) // rows * rows][: MOST_STEPS * rows].reshape(-1, rows)
    limit = room_for_tensors(outlook)
    bytes_of = PlanBytes(memory, ranks, whole, chooses=bool(memory.segments), each=1)
    seconds = _seconds(outlook, len(bytes_of.layers))
    return _drawn(batches, limit, bytes_of, seconds, len(fewest_checkpointed(memory, ranks, limit, whole)))


def _seconds(outlook: Outlook, layers: int) -> PartSeconds:
    operators, model = int(outlook.memory.recording.created.max()), outlook.step.model
    published = outlook.card.rates or device_table()[USUAL_CARD].rates
    assert published is not None, "cards of the table have rates"
    rates = card_rates(published, outlook.dtype)
    return PartSeconds.of_sizes(model.products, operators, layers, rates, overlaps=True)


def _drawn(batches: IntArray, limit: float, bytes_of: PlanBytes, seconds: PartSeconds, layers: int) -> StepsOfLengths:
    """Return the steps of these batches, int64 (steps, rows); see `StepsOfLengths`."""
    steps, rows = batches.shape
    longest, every = batches.max(axis=1), bytes_of.levels[-1]
    rectangles = np.full(steps, rows)
    spent, found, peaks = 0.0, list[Any](), np.full(steps, np.nan)
    for step, lengths in enumerate(batches):
        try:
            parts = plan_parts(lengths, limit, bytes_of.levels, bytes_of, seconds)
        except BudgetError:
            continue
        shapes = [(np.array([len(part.rows)]), np.array([part.length]), part.layers) for part in parts]
        peaks[step] = max(float(bytes_of(*shape)[0]) for shape in shapes)
        spent += sum(float(seconds(*shape)[0]) for shape in shapes)
        found += parts
    kept, tokens = ~np.isnan(peaks), sum(len(part.rows) * part.length for part in found)
    padding = int((rows * longest - batches.sum(axis=1))[kept].sum())
    whole = float(seconds(rectangles, longest, layers)[kept].sum())
    return StepsOfLengths(
        steps=steps,
        rows=rows,
        longest=int(batches.max()),
        fits=longest_that_fits(int(batches.max()), limit, every, bytes_of),
        too_long=int((~kept).sum()),
        rectangle_too_large=int((bytes_of(rectangles, longest, every) > limit).sum()),
        rectangle_layers=layers,
        parts=len(found) / max(int(kept.sum()), 1),
        layers=sum(len(part.rows) * part.length * part.layers for part in found) / max(tokens, 1),
        time=spent / whole if whole else 1.0,
        padding_saved=(padding - (tokens - int(batches[kept].sum()))) / padding if padding else 0.0,
        rectangle_bytes=bytes_of(rectangles, longest, layers),
        parts_bytes=peaks,
        limit=limit,
        filling_tokens=seconds.filling_tokens if seconds.overlaps else 0,
    )


def lengths_table(found: StepsOfLengths) -> Table:
    """Return a table of steps in parts and padded rectangles."""
    title = f"{plural(found.steps, 'step')} of {found.rows} rows, up to {found.longest:,} tokens each"
    table = make_table(title, ("step", "time", "highest peak", "checkpointed layers", "steps that don't fit"))
    peak, layers = format_bytes(float(found.rectangle_bytes.max())), f"{found.rectangle_layers} in every step"
    table.add_row("padded rectangle", "1.00", peak, layers, str(found.rectangle_too_large))
    peak = "none fits" if np.isnan(found.parts_bytes).all() else format_bytes(float(np.nanmax(found.parts_bytes)))
    layers = f"{found.layers:.1f} on average"
    table.add_row(f"{found.parts:.1f} parts", f"{found.time:.2f}", peak, layers, str(found.too_long))
    return table


def lengths_text(found: StepsOfLengths) -> str:
    """Describe the benefit of parts in a line or two."""
    padding = f"Splitting into parts avoids {found.padding_saved:.0%} of the padding."
    some = f"Rows of up to {found.fits:,} tokens fit on their own"
    fits = "Every row fits on its own" if found.fits == found.longest else some
    told = f"{padding} {fits}."
    if found.filling_tokens <= 1:
        return told
    launches = f"Below {found.filling_tokens:,} tokens kernel launches dominate (data-sheet rates)"
    return f"{told} {launches}, so smaller parts are not faster."


def lengths_picture(found: StepsOfLengths) -> Figure:
    """Draw the bytes of each step as a rectangle and in parts, sorted by rectangle, and the limit."""
    order = np.argsort(found.rectangle_bytes)
    title = f"In parts: {found.time:.2f}x the step time, {found.padding_saved:.0%} less padding"
    note = f"{found.rows} rows per step; as rectangles, every step checkpoints {found.rectangle_layers} layers"
    figure = drawing.new_figure(3.4, title, note)
    axes = figure.add_subplot()
    unit, size = byte_unit(float(found.rectangle_bytes.max()))
    axes.plot(found.rectangle_bytes[order] / size, color=drawing.COLORS[1], label="padded rectangle")
    axes.plot(found.parts_bytes[order] / size, ".", color=drawing.COLORS[0], label="in parts", markersize=3)
    axes.axhline(found.limit / size, color=drawing.BUDGET_RED, label="available")
    axes.set(xlabel="steps, sorted by longest row", ylabel=f"peak, {unit}", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def lengths_figures(found: StepsOfLengths) -> dict[str, Any]:
    """Return all figures as JSON values."""
    values = asdict(found)
    values["rectangle_bytes"] = found.rectangle_bytes.tolist()
    values["parts_bytes"] = [None if np.isnan(peak) else peak for peak in found.parts_bytes.tolist()]
    return dict(json.loads(json.dumps(values)))
