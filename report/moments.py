"""Report on the moments of a run: the peak of each, the decisive one, and settings for an evaluation to fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from ..common.text import byte_unit, format_bytes, make_table
from ..cost.forecast.outlook import Choice, Outlook
from ..cost.forecast.what_else import with_smaller_evaluation
from ..cost.moments import Evaluation, Files, Moment, moments_of_run
from ..cost.rollouts import cache_bytes_of

_SHOWN = {
    "load": "the frozen model",
    "first step": "first step",
    "step": "later steps",
    "evaluation": "evaluation",
    "generation": "generating answers",
    "checkpoint": "saving a checkpoint",
    "resume": "resuming from one",
    "merge": "merging the adapter",
}
"""Names of moments in tables."""


def moments_of(outlook: Outlook, choice: Choice) -> tuple[Moment, ...]:
    """Return the peaks of a run under a choice, in the order in which they come."""
    shards, given, ranks = outlook.shards, outlook.given, choice.ranks
    files = Files.of(
        given.memory,
        ranks,
        given.model.frozen_bytes,
        gpus=shards.gpus,
        sharding=shards.sharding,
        streamed=outlook.streamed * outlook.base.layer_bytes,
    )
    return moments_of_run(
        outlook.step.targets,
        ranks,
        outlook.step.model.frozen_bytes,
        choice.use.peaks,
        files,
        quantised=outlook.settings.quantization != "none",
        awake_bytes=outlook.room.card.context_bytes - outlook.card.context_bytes,
        generation_bytes=outlook.generation_bytes(choice.shape),
    )


def moments_table(outlook: Outlook, choice: Choice) -> Table:
    """Tabulate the peak of tensors at each moment under a choice, and the bytes of main memory it needs."""
    moments = moments_of(outlook, choice)
    highest = max(moments, key=lambda moment: (moment.device_bytes, moment.name == "step"))
    unit, size = byte_unit(highest.device_bytes)
    table = make_table(f"Peak of tensors at each moment of the run, in {unit}", ("moment", "on the card", "main"))
    for moment in moments:
        name = _SHOWN[moment.name]
        name += f", {_evaluation_text(outlook.evaluation(choice.shape))}" if moment.name == "evaluation" else ""
        main = format_bytes(moment.main_bytes) if moment.main_bytes else ""
        table.add_row(name, f"{moment.device_bytes / size:.2f}{' *' if moment is highest else ''}", main)
    return table


def too_large_evaluation(outlook: Outlook) -> str:
    """Return a line if a card has room for training but not for the evaluation, and what mends it; else empty."""
    if not (other := with_smaller_evaluation(outlook)):
        return ""
    batches = _evaluation_text(outlook.evaluation(outlook.memory.shape))
    takes = format_bytes(_by_name(outlook, outlook.choices[0])["evaluation"], up=True)
    told = f"Training fits, but evaluation in {batches} does not: its tensors take {takes}"
    return f"{told}. It fits with {_changes(outlook, other)}."


def highest_moment(outlook: Outlook) -> str:
    """Return a line if the peak of the run is not in a training step; else empty."""
    peaks = _by_name(outlook, outlook.main)
    highest = max(peaks, key=lambda name: (peaks[name], name == "step"))
    if highest == "step":
        return ""
    batches = f" in {_evaluation_text(outlook.evaluation(outlook.main.shape))}" if highest == "evaluation" else ""
    beside = f"{format_bytes(peaks[highest])} of tensors, beside {format_bytes(peaks['step'])} in a step"
    return f" The peak of the run is {_SHOWN[highest]}{batches}: {beside}."


def uncounted_moments(outlook: Outlook) -> Iterator[str]:
    """Yield a line for each moment that is not counted as it was asked for."""
    model, loaded, shape = outlook.given.model, outlook.given.loaded, outlook.memory.shape
    asked, found = loaded.evaluation(shape, model, bf16=outlook.settings.bf16), outlook.evaluation(shape)
    if asked != found:
        yield f"Evaluation is counted as a batch of {shape}: other batches of this model cannot be predicted."
    if loaded.rollouts and not cache_bytes_of(model.config):
        yield "Keys and values of generated answers are not counted, since the configuration does not tell their size."


def _by_name(outlook: Outlook, choice: Choice) -> dict[str, float]:
    """Return the bytes of tensors on the device by moment."""
    return {moment.name: moment.device_bytes for moment in moments_of(outlook, choice)}


def _evaluation_text(evaluation: Evaluation | None) -> str:
    """Describe the batches of an evaluation."""
    assert evaluation is not None, "the run evaluates"
    told = f"batches of {evaluation.shape}"
    return f"{told} (the logits of {evaluation.kept} at once)" if evaluation.kept else told


def _changes(outlook: Outlook, other: Outlook) -> str:
    """Name the settings by which an evaluation differs from another one, of the Trainer and of the command."""
    asked, found = (each.evaluation(each.memory.shape) for each in (outlook, other))
    assert asked, "both runs evaluate"
    assert found, "both runs evaluate"
    rows, kept = other.given.loaded.eval_batch_size, other.given.loaded.keep_logits
    outputs = f"eval_accumulation_steps={found.kept} (--keep-logits {kept})" if found.kept else "prediction_loss_only"
    return " and ".join(
        [
            *([outputs] if found.kept != asked.kept else []),
            *([f"per_device_eval_batch_size={rows} (--eval-batch-size)"] if found.shape != asked.shape else []),
        ]
    )
