"""The report says what the rows say: shares, chances and verdicts by hand, from rows that are made up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.evaluation.evaluate import ROWS
from rankpilot.agents.evaluation.results import Row, write_rows
from rankpilot.agents.learned.network import RankNetwork
from rankpilot.agents.learned.policy_file import save_policy
from rankpilot.agents.training.progress import PROGRESS
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.common.files import write_json, write_json_lines
from rankpilot.study.policy.claims import UNIFORM, claims, measure, share
from rankpilot.study.policy.report import main

PLANTED: dict[str, Any] = {"kind": "planted", "price": "parameters", "place": "spread", "budget": 0.125}
SHIFT: dict[str, Any] = {"kind": "shift", "price": "bytes", "place": "news", "budget": 0.5}


def row(policy: str, index: int, loss: float | None, **options: Any) -> Row:
    """A run of one of a few tasks; uniform ends at 1 nat."""
    fields: dict[str, Any] = {
        "policy": policy,
        "task": f"{options['kind']}-{index // 2}",
        "seed": index,
        "base": "llama-4x32",
        "family": "llama",
        "depth": 4,
        "initial_loss": 2.0,
        "uniform_loss": 1.0,
        "best_loss": 0.5,
        "loss": loss,
        "improvement": -3.0 if loss is None else (1.0 - loss) / 0.5,
        "failed": loss is None,
    }
    return Row(**(fields | options))


@pytest.fixture
def rows() -> list[Row]:
    made = []
    for index in range(8):
        made += [row("pilot", index, math.exp(-0.3), **PLANTED), row("oracle", index, math.exp(-0.5), **PLANTED)]
        made += [row("pilot", index, 0.9, **SHIFT), row("fracrule", index, 0.8, **SHIFT)]
    return made


def test_share_of_the_oracle(rows: list[Row]) -> None:
    gained = share(rows, "pilot", "oracle", UNIFORM, logs=True)
    assert gained is not None
    assert (gained.value, gained.low, gained.high) == (pytest.approx(0.6), pytest.approx(0.6), pytest.approx(0.6))
    assert share(rows, "fracrule", "oracle", UNIFORM) is None, "it has no planted run"
    nats = share(rows, "pilot", "oracle", UNIFORM)
    assert nats is not None
    assert nats.value == pytest.approx((1 - math.exp(-0.3)) / (1 - math.exp(-0.5)))
    failed = [row("pilot", 0, None, **PLANTED) if r.key == ("pilot", "planted-0", 0) else r for r in rows]
    lower = share(failed, "pilot", "oracle", UNIFORM, logs=True)
    assert lower is not None
    assert lower.value == pytest.approx((7 * 0.3 - math.log(2)) / (8 * 0.5)), "a failed run counts as no gain at all"


def test_a_share_of_nothing(rows: list[Row]) -> None:
    """Where nothing could be gained on any task there is no share; draws without any count as none gained."""
    level = [replace(r, loss=1.0) if r.policy == "oracle" else r for r in rows]
    assert share(level, "pilot", "oracle", UNIFORM, logs=True) is None
    one = [replace(r, loss=1.0) if r.policy == "oracle" and r.task != "planted-0" else r for r in rows]
    gained = share(one, "pilot", "oracle", UNIFORM, logs=True)
    assert gained is not None
    assert all(map(math.isfinite, (gained.value, gained.low, gained.high)))


def test_the_report(rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, evaluation, output = tmp_path / "run", tmp_path / "evaluation", tmp_path / "docs" / "policy.md"
    save_policy(run, RankNetwork(), DecisionSchedule(), {"name": "pilot", "episodes": 96, "training": {"seed": 7}})
    write_json_lines(
        run / PROGRESS,
        [
            {"iteration": 0, "validation_over_start": 0.0, "validation_over_uniform": 0.1},
            *(
                {"iteration": i, "episodes": 48, "return_mean": 0.1, "return_p10": -0.5, "return_p90": 0.5}
                | {"spread_in_groups": 0.3, "score_std": 0.1, "floor_std": 0.5, "tilt_std": 0.7}
                for i in (1, 2)
            ),
        ],
    )
    write_rows(evaluation / ROWS, rows)
    transfer, options = tmp_path / "transfer.json", ["--output", str(output)]
    figures = {"runs": 20, "better": 0.75, "better_low": 0.6, "better_high": 0.9, "one_percent_worse": 3}
    figures |= {"log_loss_gain": 0.02, "log_loss_gain_low": -0.01, "log_loss_gain_high": 0.05}
    figures |= {"worst_ratio": 1.0312, "accuracy_gain": 0.0044}
    flat: dict[str, Any] = {"quick": False} | {f"runs/pilot.{name}": value for name, value in figures.items()}
    write_json(transfer, flat)
    options += ["--ablations", str(evaluation), "--transfer", str(transfer)]
    assert main([str(run), str(evaluation), *options]) == 0
    text = output.read_text()
    expected = "| pilot | 20 | 75% (60% to 90%) | +0.020 (-0.010 to +0.050) | 3 | 1.031 | +0.44 |"
    assert text.splitlines().count(expected) == 1
    (against_fracrule,) = [line for line in text.splitlines() if line.startswith("| real shifts, 30 to 50 %")]
    cells = [cell.strip() for cell in against_fracrule.strip("|").split("|")]
    assert cells[1:3] == ["fracrule", "4 x 2"]
    assert cells[3].startswith("-0.100"), "nats that it gained over fracrule"
    assert cells[5].startswith("0% ")
    assert cells[6:8] == ["0 / 0 / 8", "8"], "runs lost, and by more than 1 %"
    assert cells[-1] == "**no**, few tasks"
    (over_uniform,) = [line for line in text.splitlines() if line.startswith("| real shifts, bytes | uniform")]
    assert over_uniform.rstrip(" |").endswith("yes, few tasks")
    assert "| pilot | 60% (60% to 60%) |" in text
    gains = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in text[text.index("## Gain over") :].splitlines()
        if "|" in line
    }
    whole = sum(r.improvement for r in rows if r.policy == "pilot") / 16
    assert gains["pilot"][-1].startswith(f" {whole:+.2f}"), "of all kinds"
    assert not gains["oracle"][-1].strip(), "it flew one kind alone"
    assert "from seed 7" in text
    assert (output.parent / "images" / "learning_curve.png").stat().st_size > 1000
    assert main([str(run), str(tmp_path / "none"), "--output", str(output)]) == 1
    assert "holds no results" in capsys.readouterr().err
    for content in ({}, {"quick": False}, flat | {"quick": True}, {"runs/pilot.better": 0.75, "quick": False}, []):
        write_json(transfer, content)
        assert main([str(run), str(evaluation), *options]) == 1
        assert "transfer.json holds no results" in capsys.readouterr().err


def test_large_batches_are_a_claim_of_their_own() -> None:
    more_rows = [row("pilot", index, 0.9, **(SHIFT | {"price": "large batch"})) for index in range(4)]
    more_rows += [row("fracrule", index, 0.8, **(SHIFT | {"price": "large batch"})) for index in range(4)]
    measured = {(c.title, c.other): m for c in claims("pilot") if (m := measure(more_rows, "pilot", c))}
    title = "real shifts, bytes of a large batch"
    assert measured[title, UNIFORM].versus.wins == measured[title, "fracrule"].versus.losses == 4
    assert not [other for name, other in measured if name.startswith("real shifts, 30")]
