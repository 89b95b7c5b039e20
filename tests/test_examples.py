"""Every example runs as the first line of its docstring says, in an empty folder.

`make test` runs them with tiny models and data under the names of those that are fetched, `make test-long` with these.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .as_printed import ROOT, run_line
from .small_assets import cache as cache
from .small_assets import small_cache as small_cache
from .warm_python import WarmPython

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}

PRINTED = {
    "allocate_for_axolotl": r"runs/axolotl-lora.yaml: .*modules adapted",
    "continue_adapter": r"held-out loss before .*held-out loss after",
    "plain_loop": r"step 0: .*modules adapted",
    "qlora": "highest peak",
    "resume": r"began and trained 100 steps",
    "several_processes": r"2 processes, highest peak",
    "train_with_sb3": r"update 2: losses .*above that of left-alone.*above that of union\nsaved in",
    "trainer": "held-out loss",
    "trl_dpo": "highest peak",
    "trl_grpo": r"without \d+% of their padding.*highest peak",
    "trl_sft": "highest peak",
}
AFTER = {"continue_adapter": ("trainer",)}
"""Examples that go on from what others have left."""

SLOW = ("several_processes", "train_with_sb3")
"""Examples that take long with tiny models too."""


def command_of(name: str) -> str:
    """How an example is started."""
    first = (ast.get_docstring(ast.parse(EXAMPLES[name].read_text(encoding="utf-8"))) or "").splitlines()[0]
    found = re.search(r": ((?:python|torchrun) .*)\.$", first)
    assert found, f"{name}: the first line does not end with a command"
    return found[1]


def saved(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter that was saved."""
    return load_file(folder / "runs" / name / "adapter" / "adapter_model.safetensors")


def test_examples_are_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in EXAMPLES.items()}
    assert lines.keys() == PRINTED.keys()
    assert max(lines.values()) <= 51, lines


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in EXAMPLES]
)
def test_it_runs_as_printed(name: str, warm_python: WarmPython, tmp_path: Path) -> None:
    for before in AFTER.get(name, ()):
        run_line(warm_python, command_of(before), tmp_path)
    printed = run_line(warm_python, command_of(name), tmp_path)
    assert re.search(PRINTED[name], printed, re.S), printed
    for adapter in tmp_path.glob("runs/*/adapter/adapter_model.safetensors"):
        assert any(value.any() for key, value in load_file(adapter).items() if "lora_B" in key)
    CHECKS.get(name, lambda *given: None)(warm_python, tmp_path)


def check_lines(python: WarmPython, folder: Path) -> None:
    """The lines for axolotl."""
    lines = yaml.safe_load((folder / "runs/axolotl-lora.yaml").read_text())
    assert len(lines["lora_target_modules"]) == len(lines["lora_rank_pattern"]) > 0
    assert not (folder / "runs" / "plan" / "decisions").exists()


def check_resumed(python: WarmPython, folder: Path) -> None:
    """A run that goes on ends as one that was not interrupted."""
    whole = saved("resumed", folder)
    shutil.rmtree(folder / "runs/resumed/checkpoint-100")  # as if it had been killed before
    assert "checkpoint-80 and trained 100 steps" in run_line(python, command_of("resume"), folder)
    resumed = saved("resumed", folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def check_loop(python: WarmPython, folder: Path) -> None:
    """A loop that goes on where its last checkpoint is."""
    assert "Resuming after step" in run_line(python, f"{command_of('plain_loop')} --resume", folder)


CHECKS = {
    "allocate_for_axolotl": check_lines,
    "plain_loop": check_loop,
    "resume": check_resumed,
}
