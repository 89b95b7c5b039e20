"""`rankpilot export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..common.errors import ConfigError
from ..common.files import read_json, write_text
from .progress import console


@dataclass(frozen=True)
class Export:
    """Export a LoRA adapter for programs with a single rank and scale, or its learned ranks for a new fine-tune.

    padded: a folder for vLLM, llama.cpp and plain PEFT. All modules get the same rank, padded with zeros, and each
    module's scale is merged into its weights. Start vLLM with at least that value of --max-lora-rank.
    merged: a folder with the whole model, the adapter added to its weights one at a time: main memory holds one weight
    and its product. The base model's files must be here, unquantised.
    rank-pattern: lines for an axolotl config file, to start a fresh fine-tune at the learned ranks.

    Attributes:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        output: new folder for the padded adapter or the merged model, or new file for the rank pattern (printed by
            default).
        format: output format.
        rank: rank of all modules of a padded adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512 (the ranks vLLM supports);
            by default the smallest that fits.
        base: folder of the base model to merge into; by default the one that the adapter names.
        per_expert: give each matrix of each expert its own pair in a padded adapter, instead of one shared pair.
    """

    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    output: Path | None = None
    format: Literal["padded", "merged", "rank-pattern"] = "padded"
    rank: int | None = None
    base: Path | None = None
    per_expert: bool = False


def main(arguments: Sequence[str]) -> None:
    """Write the padded adapter or the merged model, or write or print the rank pattern."""
    options = tyro.cli(Export, args=arguments, prog="rankpilot export")
    from ..lora.adapter_file import export_padded, rank_pattern_yaml

    output = options.output
    if options.base is not None and options.format != "merged":
        raise ConfigError("--base applies to --format merged only. Drop --base.")
    if output is None and options.format != "rank-pattern":
        what = "padded adapter" if options.format == "padded" else "merged model"
        raise ConfigError(f"A {what} is a folder: pass --output FOLDER.")
    if output and options.format == "padded":
        export_padded(options.adapter, output, options.rank, per_expert=options.per_expert)
        rank = read_json(output / "adapter_config.json")["r"]
        console.print(f"Wrote {output}, with all modules at rank {rank}.", soft_wrap=True, markup=False)
        return
    if options.rank is not None or options.per_expert:
        name = "--per-expert" if options.rank is None else "--rank"
        raise ConfigError(f"{name} applies to padded adapters only. Drop {name}.")
    if output and options.format == "merged":
        from ..lora.merged_file import export_merged

        export_merged(options.adapter, output, options.base)
        console.print(f"Wrote the merged model to {output}.", soft_wrap=True, markup=False)
        return
    if output is not None and output.exists():
        raise ConfigError(f"{output} already exists. Choose a new file name.")
    text = rank_pattern_yaml(options.adapter)
    if output is None:
        console.out(text, end="", highlight=False)
    else:
        write_text(output, text)
        console.print(f"Wrote the ranks for axolotl to {output}.", soft_wrap=True, markup=False)
