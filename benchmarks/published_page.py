"""What others measured, and what configurations alone predict: tables of docs/known-models.md, of stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS = Path(__file__).parent / "results" / "published_rows.json"

StoredRow = dict[str, Any]
"""group, name, predicted and measured in MiB; of reserves on a T4 also "verdicts": right, all, right and all of clear
cases."""


@dataclass(frozen=True)
class Group:
    """Rows of one kind and source.

    Attributes:
        title: what is compared.
        told: paragraphs: source, licence, what was fitted, what is not known, why the worst rows are as they are.
    """

    title: str
    told: tuple[str, ...] = ()


_T4 = (
    "Source: the open data of fitcheck-llm 0.3.1 (MIT licence). LoRA or QLoRA on q, k, v and o of models of 135M to "
    "3B, in fp16, or nf4 without double quantisation; AdamW, gradient checkpointing, no padding. Nothing was fitted "
    "on these rows by a number; which kernels and copies a Turing card takes was found with them.",
    "Not known: what loading left in the allocator (up to 24 MiB, which no configuration tells). The lowest rows "
    "are the smallest models, where that counts most.",
)
_RESERVED = (
    "The same runs: the most that torch's allocator held. It keeps freed blocks by size, so what it holds depends "
    "on the order of all allocations, which a replay of two steps follows. Under nf4 the published figures "
    "themselves differ by 3 % between batches of equal tokens, for which a replay is the same, and how the weights "
    "were loaded is not known.",
)
_A100 = (
    "Source: the reference figures of fms-acceleration (Apache-2.0), without its fused kernels. LoRA of rank 16 on "
    "q, k, v and o, dropout 0.1, bf16 or nf4, packed rows of 4,096 tokens, flash attention, gradient checkpointing; "
    "torch 2.4.",
    "Fitted: no number, but two habits of the libraries of that time were looked for with these rows and found in "
    "their sources. The loss of transformers 4.46 to 4.49 copies all logits but the last in fp32 while those in "
    "bf16 stand, and TRL 0.11 casts embeddings and output layer of a model in four bits back to bf16. Not known: "
    "the version of transformers. That the bytes of each token and the rest agree for all four runs is the evidence.",
)

GROUPS = {
    "t4": Group("Tesla T4, allocated", _T4),
    "t4_reserved none": Group("Tesla T4, fp16, reserved", _RESERVED),
    "t4_reserved nf4": Group("Tesla T4, nf4, reserved"),
    "l40s_reserved": Group(
        "L40S, reserved",
        (
            "Source: PEFT's `method_comparison` (Apache-2.0): Llama-3.2-3B on MetaMathQA, bf16, batches of 4 padded to "
            "the longest row, no checkpointing, AdamW.",
            "Fitted on the first row: the length of the longest batch, which is not published, {fitted} tokens. The "
            "figures include evaluation, whose batches are unknown.",
        ),
    ),
    "a100": Group("A100 80 GB, allocated", _A100),
    "a100_in_use": Group(
        "A100 80 GB, in use",
        (
            "The same runs: memory in use by `nvidia-smi`, compared with the predicted reservation plus a context "
            "of 500 MiB. Unknown: the memory kept by the driver, which is included. All rows are under by 0.8 to "
            "1.3 GiB.",
        ),
    ),
    "a100_today": Group(
        "A100 80 GB, allocated, as today's libraries would",
        (
            "The same figures against the step of today's transformers and PEFT, which is what `rankpilot memory` "
            "predicts: what the two habits above are worth.",
        ),
    ),
    "contexts": Group(
        "The longest row on a card, tokens",
        (
            "Source: Unsloth's page of benchmarks, the column without Unsloth (transformers, flash attention): QLoRA "
            "of rank 32 on all linear layers, one padded row, gradient checkpointing. A card holds the frozen model, "
            "the step, the allocator's reserve and a CUDA context; 0 tokens: nothing fitted.",
            "Fitted: nothing. Not known: the optimizer (AdamW in eight bits, as their notebooks have, is predicted), "
            "the versions, and how the smaller cards were made. With the loss of 2024, as on the A100 above, "
            "predictions are up to twice as long, so today's libraries are assumed.",
        ),
    ),
}

BARS: dict[str, tuple[tuple[str, ...], tuple[float, float | None, float]]] = {
    "Allocated, all rows": (("t4", "a100"), (0.35, 1.5, 1.2)),
    "Reserved, fp16 and bf16, all rows": (("t4_reserved none", "l40s_reserved"), (1.5, None, 5.0)),
    "Reserved, nf4": (("t4_reserved nf4",), (3.0, None, 5.0)),
}
"""Groups that are judged together, with bars in per cent: of the mean error, of the worst, and of how far a row is
under."""

NOT_PREDICTED = (
    (
        "Qwen's README, memory of LoRA on one card",
        "what it counts is not stated; the predicted reservation is 0.4 GiB above to 3.2 GiB below it (18 rows)",
    ),
    ("Qwen's README, full fine-tunes and LoRA with trained embeddings", "not only LoRA is trained"),
    ("Qwen's README, several cards or nodes (DeepSpeed ZeRO-3)", "one card is predicted"),
    ("FLUX and other models of images", "they read no tokens: `rankpilot memory` refuses them by name"),
    ("Unsloth's own contexts, LLaMA-Factory, litgpt, ms-swift", "other kernels; no rows with their settings here"),
)
"""Published figures that are not compared, and why."""


def page(rows: Sequence[StoredRow]) -> str:
    """The tables, with their sources."""
    groups = {key: [row for row in rows if _key(row) == key] for key in GROUPS}
    lines = [
        "| what | rows | mean error, % | worst | lowest | bars: mean, worst, under | met |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for title, (keys, bars) in BARS.items():
        lines.append(_summary(title, [row for key in keys for row in groups[key]], bars))
    lines += [_summary(GROUPS[key].title, found) for key, found in groups.items()]
    lines += ["", _verdicts(rows)]
    for key, found in groups.items():
        group = GROUPS[key]
        lines += ["", f"### {group.title}", ""]
        for told in group.told:
            lines += [told.format(fitted=_fitted(found)), ""]
        lines += ["| run | predicted | measured | error, % |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row['name']} | {row['predicted']:,.0f} | {row['measured']:,.0f} | {error} |"
            for row in found
            for error in [f"{_errors([row])[0]:+.2f}" if row["measured"] else ""]
        ]
    lines += ["", "### Not compared", "", "| what | why |", "|---|---|"]
    lines += [f"| {what} | {why} |" for what, why in NOT_PREDICTED]
    return "\n".join(lines)


def _key(row: StoredRow) -> str:
    """The group of a row, without the length that was fitted."""
    name, _, rest = str(row["group"]).partition(" ")
    return name if rest.isdecimal() else str(row["group"])


def _fitted(rows: Sequence[StoredRow]) -> str:
    return str(rows[0]["group"]).rpartition(" ")[2]


def _errors(rows: Sequence[StoredRow]) -> Any:
    """Relative errors in per cent of the rows that measured something, (rows,)."""
    return np.array([100 * (row["predicted"] / row["measured"] - 1) for row in rows if row["measured"]])


def _summary(title: str, rows: Sequence[StoredRow], bars: tuple[float, float | None, float] | None = None) -> str:
    errors = _errors(rows)
    mean, worst, lowest = np.abs(errors).mean(), np.abs(errors).max(), errors.min()
    told, met = "", ""
    if bars:
        told = ", ".join("-" if bar is None else f"{bar:g}" for bar in bars)
        met = "yes" if mean <= bars[0] and (bars[1] is None or worst <= bars[1]) and lowest >= -bars[2] else "**no**"
    return f"| {title} | {len(errors)} | {mean:.2f} | {worst:.2f} | {lowest:+.2f} | {told} | {met} |"


def _verdicts(rows: Sequence[StoredRow]) -> str:
    right, every, right_clear, clear = np.sum([row["verdicts"] for row in rows if "verdicts" in row], axis=0).tolist()
    return (
        "Verdicts (fits, only without the allocator's reserve, does not fit) of the T4's runs on cards of 2 to 13 GiB, "
        "on which many do not fit: "
        f"{right} of {every} right; where the published figures are 3 % or more from the card, {right_clear} of "
        f"{clear} ({100 * right_clear / clear:.1f} %; the bar is 99 %)."
    )
