"""Checkpoints of a loop of one's own: what `load_checkpoint` takes has to go on for a step."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import rankpilot
from hypothesis import strategies as st
from rankpilot.common.files import parse_json
from rankpilot.finetune.checkpoint import OPTIMIZER, STATE, TENSORS, WEIGHTS
from transformers import LlamaConfig

from ..finetune.test_pilot import STEPS, Loop
from .damage import damaged, damaged_json, damaged_tensors
from .running import fuzz

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False
)


@cache
def whole_checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint, by name."""
    with tempfile.TemporaryDirectory() as name:
        loop = Loop(CONFIG, Path(name) / "log", budget="60%")
        loop.pilot.begin(loop.run)
        loop.train(range(3))
        rankpilot.save_checkpoint(loop.pilot, loop.run, Path(name) / "checkpoint")
        return {path.name: path.read_bytes() for path in (Path(name) / "checkpoint").iterdir()}


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, bytes | None]:
    """The name of a file of the checkpoint, and its damaged content; None if the file is missing."""
    files = whole_checkpoint()
    name = draw(st.sampled_from([STATE, STATE, STATE, TENSORS, WEIGHTS, OPTIMIZER]))
    if not draw(st.integers(0, 20)):
        return name, None
    if name == STATE:
        return name, draw(damaged_json(parse_json(files[name].decode())))
    return name, draw(damaged(files[name]) if name == OPTIMIZER else damaged_tensors(files[name]))


@fuzz(changes(), examples=20)
def test_checkpoints_of_loops(change: tuple[str, bytes | None]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        for file, content in (whole_checkpoint() | dict([change])).items():
            if content is not None:
                (folder / file).write_bytes(content)
        loop = Loop(CONFIG, Path(name) / "log", budget="60%")
        step = rankpilot.load_checkpoint(loop.pilot, loop.run, folder)
        loop.train(range(step, min(step + 1, STEPS)))
