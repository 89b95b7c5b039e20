"""`make demo`: its programs read their command lines, and its last words are those of its runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from rankpilot.cost.saver_prices import Saved
from rankpilot.errors import DataError

from tools import demo

from .docs.test_blocks import PROGRAMS
from .docs.test_blocks import reads_only as reads_only

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("reads_only")
def test_each_command_of_the_demo_is_read() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [re.split(r" 2>&1 ", line)[0] for line in done.stdout.splitlines() if " runs/demo" in line]
    names = [shlex.split(line)[1] for line in commands]
    assert names == ["memory", "finetune", "finetune", "-m", "policy", "study", "-m"]
    for program, *words in map(shlex.split, commands[:-1]):
        PROGRAMS[Path(program).name](words)


def test_the_last_words_hold_the_figures_of_the_runs() -> None:
    gib = 2**30
    card = {"parameters": 8e9, "memory_bytes": 24 * gib, "frozen_bytes": 15 * gib, "verdict": "Fits."}
    assert "15 GiB. On 24 GiB: Fits." in demo.card_sentence(card)
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
    assert "no plan fits" in demo.refusal_sentence("loading\nerror: The budget of 1 MiB is too small.\n")
    with pytest.raises(DataError, match="is refused in one line"):
        demo.refusal_sentence("trained as if nothing were asked")


def test_a_policy_that_training_did_not_change_is_told_as_that() -> None:
    table = {name: {"improvement": 1.088, "tasks": 4.0} for name in ("learned", "signal-mean")}
    start, rounds = {"iteration": 0, "validation_over_start": 0.0}, {"iteration": 1, "return_mean": 0.2, "episodes": 48}
    told = demo.policy_sentence(table, [start, rounds | {"validation_over_start": 0.0}])
    assert "PPO improved nothing in 1 round: the rule that it starts from is kept" in told
    assert "+108.8% of what the best known plan gains, is the same as that of the rule signal-mean" in told
    better = demo.policy_sentence(table | {"learned": table["learned"] | {"improvement": 1.2}},
                                  [start, rounds | {"validation_over_start": 0.1}])  # fmt: skip
    assert "The policy of iteration 1 is kept: +10.0% over the rule" in better
    assert "where +108.8% is that of the rule" in better
