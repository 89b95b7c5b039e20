"""`make demo`: its programs read their command lines, and its last words are those of its runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from rankpilot.common.errors import DataError
from rankpilot.cost.savers.prices import Saved

from tools import demo

from .docs.test_blocks import PROGRAMS
from .docs.test_blocks import reads_only as reads_only

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("reads_only")
def test_each_command_of_the_demo_is_read() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [re.split(r" 2>&1 ", line)[0] for line in done.stdout.splitlines() if " runs/demo" in line]
    names = [shlex.split(line)[1] for line in commands]
    assert names == ["memory", "memory", "finetune", "finetune", "-m", "policy", "finetune", "study", "-m", "-m"]
    for program, *words in map(shlex.split, commands[:-1]):
        PROGRAMS[Path(program).name](words)


def test_the_last_words_hold_the_figures_of_the_runs() -> None:
    gib = 2**30
    card = {"parameters": 8e9, "memory_bytes": 24 * gib, "frozen_bytes": 15 * gib, "verdict": "Fits."}
    assert "15 GiB. On 24 GiB: Fits." in demo.card_sentence(card)
    lengths = {"rows": 4, "longest": 1610, "time": 0.6, "padding_saved": 0.5, "layers": 0.9, "rectangle_layers": 27}
    assert "1,610 tokens" in demo.parts_sentence(lengths)
    plain = {"held_out_loss": 0.5, "peak_bytes": 100 * 2**20, "median_step_s": 0.5}
    runs = {"all-linear": plain, "rankpilot": {"held_out_loss": 0.51, "peak_bytes": 25 * 2**20, "median_step_s": 0.4}}
    told = demo.saves_sentence(runs, [Saved("plain LoRA", 100 * 2**20, 26 * 2**20)])
    figures = (
        "0.5100",
        "0.5000",
        "+2.0%",
        "25 MiB",
        "100 MiB (25%)",
        "80%",
        "26 MiB with all layers checkpointed (96%)",
    )
    assert all(figure in told for figure in figures)
    assert "fits no plan" in demo.refusal_sentence("loading\nerror: The budget of 1 MiB is too small.\n")
    with pytest.raises(DataError, match="should be refused in one line"):
        demo.refusal_sentence("trained as if nothing were asked")


def test_a_policy_that_training_did_not_change_is_told_as_that() -> None:
    rows = [{"round": 0, "validation": 0.4}, {"round": 1, "over_rule": 0.2, "episodes": 48, "validation": 0.6}]
    told = demo.policy_sentence(rows)
    assert "48 short fine-tunes" in told
    assert "The copy of the rule is kept: its losses on validation tasks are 0.4 % above the rule's" in told
    assert "The agent of round 1 is kept" in demo.policy_sentence([rows[0], rows[1] | {"validation": -0.1}])
