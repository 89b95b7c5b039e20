"""The first sentences of a report: what is wrong with a run comes before what it gained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rankpilot.common.files import append_json_line, read_json, write_json
from rankpilot.cost.savers.prices import Saved
from rankpilot.decide.choice import Choice
from rankpilot.decide.plan.goal import Goal
from rankpilot.study.run_data import RunData, read_run
from rankpilot.study.verdict import comparison_rows, cost_sentence, loss_sentence, rise_of, verdict

from .conftest import MIB, four_plans

WithMetrics = Callable[[Mapping[int, Mapping[str, float]]], Path]


@pytest.fixture
def with_metrics(run_folder: Path) -> WithMetrics:
    """The run folder with other metrics of the run under the policy, by step."""

    def make(rows: Mapping[int, Mapping[str, float]]) -> Path:
        path = run_folder / "metrics-rankpilot.jsonl"
        path.unlink()
        for step, row in rows.items():
            append_json_line(path, {"step": step, **row})
        return run_folder

    return make


def edit_results(folder: Path, **results: Any) -> None:
    summary = read_json(folder / "summary.json")
    summary["runs"]["rankpilot"].update(results)
    summary.update(held_out_rows=800, largest_class=0.5)
    write_json(folder / "summary.json", summary)


def test_a_held_out_loss_that_rises_is_said_even_if_it_beats_uniform(with_metrics: WithMetrics) -> None:
    folder = with_metrics({50: {"eval_loss": 0.675}, 100: {"eval_loss": 0.69}, 200: {"eval_loss": 0.715}})
    edit_results(folder, held_out_loss=0.715)
    summary = read_json(folder / "summary.json")
    summary["runs"]["uniform"]["held_out_loss"] = 0.718
    write_json(folder / "summary.json", summary)
    found = verdict(read_run(folder))
    assert found.warnings == (
        "The held-out loss rose during the run, from 0.675 at step 50 to 0.715 at step 200. Train for "
        "fewer steps, or lower the learning rate.",
    )
    assert found.results == (
        "From a single run each, rankpilot's held-out loss is 0.4% lower than that of uniform ranks, "
        "ranks 4 to 16 on 17 of 36 modules.",
    )
    assert verdict(read_run(with_metrics({50: {"eval_loss": 0.675}, 200: {"eval_loss": 0.680}}))).warnings == ()


def test_what_a_run_saves_beside_plain_lora(run_folder: Path) -> None:
    summary = read_json(run_folder / "summary.json")
    plain = summary["runs"].pop("uniform") | {"held_out_loss": 0.38, "peak_bytes": 182 * 2**20, "median_step_s": 0.064}
    summary["runs"]["all-linear"] = plain
    write_json(run_folder / "summary.json", summary)
    run = read_run(run_folder)
    first = replace(run.decisions[0], saved=(Saved("plain LoRA", 182.0 * MIB, 100.0 * MIB),))
    (told,) = verdict(replace(run, decisions=[first, *run.decisions[1:]])).warnings
    assert "1.1% higher than that of rank 8 on all modules, with 50% of its memory and 80% of its step time" in told
    assert "With all layers checkpointed it would take 100 MiB; this run took 91% of that." in told


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"loss": math.nan}, "the training loss is nan at step 20"),
        ({"eval_loss": math.inf}, "the held-out loss is inf at step 20"),
        ({"loss": 0.0, "grad_norm": math.nan}, "the gradient norm is nan at step 20"),
        ({"loss": 9.0}, "the training loss rose from 0.7 to 9."),
    ],
)
def test_a_run_that_diverged(with_metrics: WithMetrics, row: Mapping[str, float], words: str) -> None:
    folder = with_metrics({10: {"loss": 0.7}, 20: row, 30: row})
    assert verdict(read_run(folder)).warnings[0].startswith(f"The run diverged: {words}")


def test_a_held_out_loss_that_has_blown_up(with_metrics: WithMetrics) -> None:
    folder = with_metrics({10: {"loss": 0.7}})
    edit_results(folder, held_out_loss=1.2e31)
    assert verdict(read_run(folder)).warnings[0] == (
        "The run diverged: the final held-out loss is 1.2e+31, the first training loss 0.7. Lower the learning rate."
    )
    losses = {label: cells for label, cells, _ in comparison_rows([read_run(folder)])}["held-out loss"]
    assert losses[0] == "1.2e+31"


def that_chose(folder: Path, found: Choice, **changes: Any) -> RunData:
    """A run whose policy chose so at the first decision."""
    run = read_run(folder)
    first = replace(run.decisions[0], decision=replace(run.decisions[0].decision, choice=found))
    return replace(run, decisions=[first, *run.decisions[1:-1], replace(run.decisions[-1], **changes)])


def test_what_a_choice_adds(run_folder: Path) -> None:
    found = verdict(that_chose(run_folder, four_plans(caveats=("it learns labels",), taken=2), rates=(1e-3, 2e-3)))
    assert found.warnings == ()
    assert found.caveats == ("Expectations come from other runs and are less reliable here: it learns labels.",)
    assert found.results[1:] == (
        "Expected versus rank 8 on all modules: loss -2.0 %, very likely at most -0.2 %.",
        "The plan was trained at a peak learning rate of 0.002, equivalent to 0.001 for plain LoRA.",
    )
    (warning,) = verdict(that_chose(run_folder, four_plans(goal=Goal("bytes"), fits=np.arange(4) == 3))).warnings
    assert warning.startswith("The goal cannot be met: rank 8 on all modules does not fit the budget")


def test_a_training_loss_that_did_not_fall(with_metrics: WithMetrics) -> None:
    folder = with_metrics({4: {"loss": 4.16}, 8: {"loss": 4.17}, 12: {"loss": 4.165}})
    (line,) = verdict(read_run(folder)).warnings
    assert line == "The training loss did not fall: it started at 4.16 and ended at 4.165."


def test_noise_is_no_rise() -> None:
    generator = np.random.default_rng(0)
    flat = [(step, 0.7 + 0.1 * float(generator.normal())) for step in range(100)]
    start, end = rise_of(flat)
    assert end <= start
    rising = [(step, loss + 0.005 * step) for step, loss in flat]
    start, end = rise_of(rising)
    assert end - start == pytest.approx(0.4, abs=0.1)
    assert rise_of([]) == rise_of([(1, 0.5)]) == (0, 0)
    assert rise_of([(1, 0.5), (2, 0.75)]) == (0.5, 0.75)


def test_an_accuracy_at_chance(run_folder: Path) -> None:
    edit_results(run_folder, held_out_accuracy=0.55)
    assert verdict(read_run(run_folder)).warnings == ()
    edit_results(run_folder, held_out_accuracy=0.51)
    (line,) = verdict(read_run(run_folder)).warnings
    assert "barely above always predicting the most frequent class (50.0%), and 800 rows are too few to tell" in line
    edit_results(run_folder, held_out_accuracy=0.43)
    (line,) = verdict(read_run(run_folder)).warnings
    assert "accuracy of 43.0% is no better than always predicting the most frequent class (50.0%)" in line


def test_a_peak_above_the_budget(with_metrics: WithMetrics) -> None:
    folder = with_metrics({1: {"peak_bytes": 90 * MIB}, 2: {"peak_bytes": 101 * MIB}})
    assert verdict(read_run(folder)).warnings == ("The peak was above the budget at 1 of 2 measured steps.",)


# What pictures show, in words -----------------------------------------------------------------------------------------


def run_of(
    peaks: Mapping[str, list[tuple[int, float]]],
    limits: list[tuple[int, float]],
    predicted: list[float] | None = None,
    unit: str = "bytes",
) -> RunData:
    """A run with measured peaks, and a decision at each step at which the budget or the plan changes."""
    decisions: list[Any] = []
    for (step, limit), cost in zip(limits, predicted or [0.0] * len(limits), strict=True):
        problem = SimpleNamespace(limit=limit, cost=SimpleNamespace(unit=unit))
        decisions.append(SimpleNamespace(step=step, predicted_cost=cost, measured_cost=None, problem=problem))
    metrics = {name: [{"step": step, "peak_bytes": peak} for step, peak in points] for name, points in peaks.items()}
    return RunData(Path(), {}, metrics, decisions, ())


def test_costs_beside_the_budget() -> None:
    runs = {"rankpilot": [(10, 60 * MIB), (20, 90 * MIB)], "uniform": [(10, 80 * MIB)]}
    found = cost_sentence(run_of(runs, [(0, 100 * MIB), (10, 100 * MIB)], [70 * MIB, 95 * MIB]))
    assert found == "rankpilot stays within the budget at every measured step: at most 90 of 100 MiB (90%)"
    gibibytes = cost_sentence(run_of({"rankpilot": [(1, 12000 * MIB)]}, [(0, 12 * 1024 * MIB)]))
    assert gibibytes.endswith("at most 11.7 of 12 GiB (98%)")
    nearly = cost_sentence(run_of({"rankpilot": [(1, 99.98 * MIB)]}, [(0, 100 * MIB)]))
    assert nearly.endswith("at most 100 of 100 MiB (99.9%)")
    over = cost_sentence(run_of({"uniform": [(1, 60 * MIB), (2, 120 * MIB)]}, [(0, 100 * MIB)]))
    assert over == "uniform exceeds the budget at 1 of 2 measured steps: 120 of 100 MiB"


def test_costs_of_which_nothing_was_measured() -> None:
    counted = run_of({}, [(0, 300_000), (10, 300_000)], [240_000, 290_000], "parameters")
    assert cost_sentence(counted) == "Plans take at most 290,000 of 300,000 parameters"
    planned = run_of({}, [(0, 100 * MIB)], [90 * MIB])
    assert cost_sentence(planned) == "Plans take at most 90 of 100 MiB; no measurements"
    known = replace(planned, decisions=(), summary={"runs": {"rankpilot": {"budget_bytes": 100 * MIB}}})
    assert cost_sentence(known) == "Budget of 100 MiB; no measurements"
    assert cost_sentence(replace(planned, decisions=())) == ""


def test_a_budget_that_changed_is_that_of_its_time() -> None:
    limits = [(0, 100 * MIB), (10, 60 * MIB)]
    kept = cost_sentence(run_of({"rankpilot": [(10, 90 * MIB), (11, 57 * MIB)]}, limits, [91 * MIB, 58 * MIB]))
    assert kept.endswith("stays within the budget at every measured step: at most 57 of 60 MiB (95%)")
    over = cost_sentence(run_of({"rankpilot": [(10, 90 * MIB), (11, 90 * MIB)]}, limits))
    assert over == "rankpilot exceeds the budget at 1 of 2 measured steps: 90 of 60 MiB"


def test_losses_in_words() -> None:
    both = loss_sentence({"rankpilot": 0.9, "uniform": 1.0})
    assert both == "rankpilot ends 10.0% below uniform on held-out data (0.900 vs 1.000, one run each)"
    assert "end equal" in loss_sentence({"rankpilot": 1.0, "uniform": 1.0001})
    assert loss_sentence({"rankpilot": 0.5}) == "rankpilot ends at a held-out loss of 0.500"
    assert "no held-out" in loss_sentence({})
