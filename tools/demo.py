"""`python -m tools.demo FOLDER`: what `make demo` has shown, in words, with the figures of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rankpilot.agents.training import learning_sentence
from rankpilot.common.errors import DataError
from rankpilot.common.files import read_json_lines, read_object, read_text
from rankpilot.common.text import format_bytes
from rankpilot.cost.savers.prices import Saved
from rankpilot.decide.log import DecisionRecord
from rankpilot.decide.rate_control import KEEP
from rankpilot.finetune.options import ALL_LINEAR, PILOT
from rankpilot.study.run_data import read_run
from rich.console import Console

MOST_ERROR_BYTES = 10**5


@dataclass(frozen=True)
class Options:
    """Say in words what `make demo` has shown.

    Attributes:
        folder: where its runs are.
    """

    folder: tyro.conf.Positional[Path] = Path("runs/demo")


def seen(folder: Path) -> Iterator[str]:
    """A sentence or two for each part of the demo.

    Raises:
        DataError: the budget that is too small was not refused.
    """
    yield card_sentence(read_object(folder / "memory" / "memory.json"))
    yield parts_sentence(read_object(folder / "parts" / "memory.json")["lengths"])
    run = read_run(folder / "saves")
    yield saves_sentence(run.results, run.saved)
    yield refusal_sentence(read_text(folder / "too-small.txt", MOST_ERROR_BYTES))
    yield elastic_sentence(read_object(folder / "elastic.json"))
    rows = list(read_json_lines(folder / "policy" / "progress.jsonl"))
    yield policy_sentence(rows)
    yield steered_sentence(read_run(folder / "steered").decisions)
    yield f"The page {folder / 'study.html'} explains each of its decisions."
    yield (f"To check what fits a card, for five models (all of them: make page), open {folder / 'memory.html'}")


def card_sentence(memory: dict[str, Any]) -> str:
    """What an 8B takes of a card."""
    card, frozen = (format_bytes(memory[f"{name}_bytes"]) for name in ("memory", "frozen"))
    return (
        f"A model of {memory['parameters'] / 1e9:.1f}B parameters was read from its configuration alone. Its weights "
        f"take {frozen}. On {card}: {memory['verdict']}"
    )


def parts_sentence(lengths: dict[str, Any]) -> str:
    """What steps in parts bring beside padded ones."""
    return (
        f"Batches of {lengths['rows']} functions of Python's standard library, of up to {lengths['longest']:,} tokens: "
        f"in parts, each padded to its own longest row, the same gradients take {lengths['time']:.0%} of the time of "
        f"padded batches. {lengths['padding_saved']:.0%} of the padding is avoided, and on average "
        f"{lengths['layers']:.1f} layers are checkpointed instead of {lengths['rectangle_layers']}."
    )


def saves_sentence(runs: Mapping[str, Mapping[str, Any]], saved: Sequence[Saved]) -> str:
    """The fine-tune under goal bytes beside plain LoRA, without checkpointing as it ran, and with."""
    ours, plain = runs[PILOT], runs[ALL_LINEAR]
    loss, peak, step = (ours[key] / plain[key] for key in ("held_out_loss", "peak_bytes", "median_step_s"))
    again = saved[0].again_bytes if saved else None
    return (
        "With the goal of least memory, the fine-tune ended at a held-out loss of "
        f"{ours['held_out_loss']:.4f}, plain LoRA at the rule's rate at {plain['held_out_loss']:.4f}: "
        f"{loss - 1:+.1%}, with one seed, and dropout masks that differ in parts. Its steps peaked at "
        f"{format_bytes(ours['peak_bytes'])} and took {step:.0%} of the time; those of plain LoRA peaked "
        f"at {format_bytes(plain['peak_bytes'])} ({peak:.0%})"
        + (
            f", or {format_bytes(again)} with all layers checkpointed ({ours['peak_bytes'] / again:.0%})"
            if again
            else ""
        )
        + "."
        + (
            " So it saved no more than gradient checkpointing does."
            if again and ours["peak_bytes"] > 0.95 * again
            else ""
        )
    )


def refusal_sentence(printed: str) -> str:
    """The error of the budget that is too small."""
    lines = [line for line in printed.splitlines() if line.startswith("error: The budget of")]
    if len(lines) != 1:
        raise DataError(
            f"A budget that is too small should be refused in one line, but the output was: {printed[-500:]}"
        )
    refused, *_ = lines[0].removeprefix("error: ").partition(" The peak is at ")
    return f"A budget that fits no plan was refused before the first step: {refused}"


def elastic_sentence(figures: dict[str, Any]) -> str:
    """The run from which another process took memory."""
    above, layers = figures["steps above the budget"], figures["most layers run again"]
    back = figures["back after steps, worst"]
    return (
        f"Another process took memory during the run and released it. The run continued, with {above} steps above "
        f"what was left. Up to {layers} layers were checkpointed meanwhile, and none {back} steps after the memory "
        f"was back. The loss differs by {figures['layers run again, loss, mean %']:+.2f} % from that of "
        "the undisturbed run."
    )


def steered_sentence(decisions: Sequence[DecisionRecord]) -> str:
    """What the agent did in a fine-tune after its first step."""
    later = [each for each in decisions if each.step > 0 and not each.correction]
    moved = sum(bool((each.rank_after != each.rank_before).any()) for each in later)
    rates = sum(each.decision.change != KEEP for each in later)
    return (
        f"The packaged agent steered a fine-tune: of {len(later)} decisions after the first step, {moved} "
        f"changed ranks and {rates} the learning rate."
    )


def policy_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What minutes of training an agent brought, and how it stands beside the rule that it started from."""
    episodes = sum(row.get("episodes", 0) for row in rows)
    return (
        f"An agent was trained on {episodes} short fine-tunes. {learning_sentence(rows)}. This only shows "
        "that training works; see docs/train-policy.md for what longer training brings. The packaged "
        "agent had 36 rounds of 48."
    )


def main() -> None:
    """Print the sentences."""
    options, console = tyro.cli(Options), Console()
    console.rule("what was seen", align="left")
    for number, sentence in enumerate(seen(options.folder), 1):
        console.print(f"{number}. {sentence}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
