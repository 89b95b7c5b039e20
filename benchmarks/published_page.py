"""Published measurements and what configurations alone predict: tables of docs/known-models.md, from stored rows."""

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
class Section:
    """Groups of one source, side by side: a row of the table has the figures of one run.

    Attributes:
        groups: the keys of its groups in the stored rows, by what each measured.
        told: paragraphs: source, licence, what was fitted, what is not known, why the worst rows are as they are.
        by_setting: whether the table has a row per attention and weights instead, with the range of errors.
    """

    groups: dict[str, tuple[str, ...]]
    told: tuple[str, ...]
    by_setting: bool = False


TITLES = {
    "t4": "T4, allocated",
    "t4_reserved none": "T4, fp16, reserved",
    "t4_reserved nf4": "T4, nf4, reserved",
    "l40s_reserved": "L40S, reserved",
    "a100": "A100, allocated",
    "a100_in_use": "A100, in use",
    "a100_today": "A100, allocated, current libraries",
    "a100_sharded": "two A100s, allocated",
    "a100_sharded_in_use": "two A100s, in use",
    "contexts": "longest row, tokens",
    "pictures": "rows with pictures, allocated",
    "pictures_in_use": "rows with pictures, in use",
}
"""What the summary calls the groups."""

SECTIONS = {
    "Tesla T4": Section(
        {"allocated": ("t4",), "reserved": ("t4_reserved none", "t4_reserved nf4")},
        (
            "fitcheck-llm 0.3.1 (MIT licence): LoRA in fp16 (none), or QLoRA in nf4 without double quantisation, on q, "
            "k, v and o; AdamW, gradient checkpointing, no padding. No constant was fitted to these rows, but they "
            "showed which kernels and copies a Turing card uses. Unknown: what loading left in the allocator (up to 24 "
            "MiB). Under nf4 the published reserves differ by 3 % between batches of equal tokens, for which the "
            "replay of the allocator gives one figure.",
        ),
        by_setting=True,
    ),
    "L40S": Section(
        {"reserved": ("l40s_reserved",)},
        (
            "PEFT's `method_comparison` (Apache-2.0): Llama-3.2-3B on MetaMathQA, bf16, batches of 4 padded to the "
            "longest row, no checkpointing, AdamW. The length of the longest batch is unpublished, and was fitted "
            "to the first row: {fitted} tokens. The figures include evaluation, whose batches are unknown.",
        ),
    ),
    "A100 80 GB": Section(
        {"allocated": ("a100",), "current libraries": ("a100_today",), "in use": ("a100_in_use",)},
        (
            "fms-acceleration (Apache-2.0), without its fused kernels: LoRA of rank 16 on q, k, v and o, dropout 0.1, "
            "bf16 (none) or nf4, packed rows of 4,096 tokens, flash attention, gradient checkpointing, torch 2.4. No "
            "constant was fitted, but these rows pointed to two habits of the libraries of that time: the loss of "
            "transformers 4.46 to 4.49 copies all logits but the last to fp32 while the bf16 ones exist, and TRL 0.11 "
            "casts embeddings and output layer of a 4-bit model back to bf16. *Current libraries* compares the same "
            "figures with what `rankpilot memory` predicts for today's. *In use* is what `nvidia-smi` reports, versus "
            "predicted reserve and a context of 500 MiB; it includes an unknown share of the driver.",
        ),
    ),
    "Two A100s of 80 GB under FSDP": Section(
        {"allocated": ("a100_sharded",), "in use": ("a100_sharded_in_use",)},
        (
            "Same source and settings, per card, all weights sharded (`FULL_SHARD`), predicted as FSDP2. A quantised "
            "model that is sharded is not prepared by TRL; expert weights were linear layers, in 4 bits too. Nothing "
            "was fitted. The published step of Llama-2-70B takes 25.5 GiB beside the weights, 10 of them for the "
            "inputs of layers; where the rest comes from is unknown. NCCL's buffers are not predicted.",
        ),
    ),
    "Rows with pictures": Section(
        {"allocated": ("pictures",), "in use": ("pictures_in_use",)},
        (
            "One row per batch, bf16, AdamW. *Allocated*: a course on DeepSpeed (yiqiao-yin/deepspeed-course) that "
            "publishes its script: Qwen3-VL-8B on an A40, LoRA of rank 16 and dropout 0.05 on q, k, v and o, no "
            "checkpointing, ZeRO-3 with one card. That gathers nothing, but, as its code tells, keeps the inputs of "
            "all linear layers and a bucket of 1 GB, and runs without autocast. No constant was fitted, but these "
            "rows pointed to adapters in fp32, which its code confirms. *In use*: examples of ms-swift (rank 8 on all "
            "linear layers) and axolotl (SmolVLM2, rank 32). Unknown: what they count, and the exact sizes of "
            "pictures and rows, assumed here from their data sets.",
        ),
    ),
    "The longest row on a card": Section(
        {"measured": ("contexts",)},
        (
            "Unsloth's benchmarks, the column without Unsloth: QLoRA of rank 32 on all linear layers, one padded row, "
            "gradient checkpointing, flash attention; at 0 tokens nothing fits. Nothing was fitted. Unknown: the "
            "optimizer (predicted: 8-bit AdamW), the versions, and how smaller cards were simulated. Current libraries "
            "are assumed; the loss of 2024 (see A100) would allow up to twice as many tokens.",
        ),
    ),
}

NOT_COMPARED = (
    "Not compared: Qwen's README, which does not say what it counts (predicted reserves are 0.4 GiB above to 3.2 GiB "
    "below its LoRA rows on one card), and figures of programs with other kernels (Unsloth, LLaMA-Factory, litgpt)."
)


def page(rows: Sequence[StoredRow]) -> str:
    """The tables, with their sources."""
    groups = {key: [row for row in rows if _key(row) == key] for key in TITLES}
    lines = ["| errors in % | rows | mean size | lowest | highest |", "|---|---:|---:|---:|---:|"]
    lines += [_summary(title, groups[key]) for key, title in TITLES.items()]
    lines += ["", _verdicts(rows)]
    for title, section in SECTIONS.items():
        found = {what: [row for key in keys for row in groups[key]] for what, keys in section.groups.items()}
        lines += ["", f"### {title}", ""]
        for told in section.told:
            lines += [told.format(fitted=_fitted(next(iter(found.values())))), ""]
        lines += _by_setting(found) if section.by_setting else _table(found)
    return "\n".join([*lines, "", NOT_COMPARED])


def _by_setting(found: dict[str, list[StoredRow]]) -> list[str]:
    """A row per attention and weights: the number of runs, and the range of errors in per cent."""
    heads = "".join(f" {what}, error, % |" for what in found)
    lines = [f"| attention, weights | runs |{heads}", f"|---|---:|{'---:|' * len(found)}"]
    for setting in sorted({" ".join(row["name"].split()[1:3]) for rows in found.values() for row in rows}):
        of = [[row for row in rows if f" {setting} " in row["name"]] for rows in found.values()]
        errors = [_errors(rows) for rows in of]
        lines.append(f"| {setting} | {len(of[0])} |" + "".join(f" {e.min():+.2f} to {e.max():+.2f} |" for e in errors))
    return lines


def _table(found: dict[str, list[StoredRow]]) -> list[str]:
    """A row per run: what was measured and the error; predictions too where nothing was measured in some run."""
    names = list(dict.fromkeys(row["name"] for rows in found.values() for row in rows))
    heads, columns = ["run"], [[name.replace(" x ", "\N{MULTIPLICATION SIGN}") for name in names]]
    for what, rows in found.items():
        stored = {row["name"]: row for row in rows}
        runs = [stored.get(name) for name in names]
        if not all(row["measured"] for row in rows):
            heads.append("predicted")
            columns.append([f"{row['predicted']:,.0f}" if row else "" for row in runs])
        told = [f"{row['measured']:,.0f}" if row else "" for row in runs]
        if told not in columns:
            heads.append(what)
            columns.append(told)
        heads.append("error, %" if told == columns[-1] else f"error, %, {what}")
        columns.append([f"{_errors([row])[0]:+.2f}" if row and row["measured"] else "" for row in runs])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *zip(*columns, strict=True)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _key(row: StoredRow) -> str:
    """The group of a row, without the length that was fitted."""
    name, _, rest = str(row["group"]).partition(" ")
    return name if rest.isdecimal() else str(row["group"])


def _fitted(rows: Sequence[StoredRow]) -> str:
    return str(rows[0]["group"]).rpartition(" ")[2]


def _errors(rows: Sequence[StoredRow]) -> Any:
    """Relative errors in per cent of the rows that measured something, (rows,)."""
    return np.array([100 * (row["predicted"] / row["measured"] - 1) for row in rows if row["measured"]])


def _summary(title: str, rows: Sequence[StoredRow]) -> str:
    errors = _errors(rows)
    return f"| {title} | {len(errors)} | {np.abs(errors).mean():.2f} | {errors.min():+.2f} | {errors.max():+.2f} |"


def _verdicts(rows: Sequence[StoredRow]) -> str:
    right, every, right_clear, clear = np.sum([row["verdicts"] for row in rows if "verdicts" in row], axis=0).tolist()
    return (
        "Verdicts (fits, fits without the allocator's reserve, does not fit) on the T4's runs, for cards of 2 to 13 "
        f"GiB: {right} of {every} right; where the published figures are 3 % or more from the card, {right_clear} of "
        f"{clear}."
    )
