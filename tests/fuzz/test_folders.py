"""Folders of policies, of saved adapters, and of runs: summary, metrics, settings and a Trainer's state."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig
from rankpilot.agents.policy_file import (
    CARD,
    WEIGHTS,
    GroupNetwork,
    NetworkConfig,
    load_policy,
    policy_schedule,
    save_policy,
)
from rankpilot.common.checks import MOST_NUMBER
from rankpilot.common.errors import ConfigError, RunFolderError
from rankpilot.cost.cost import ParameterCost
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.lora.adapter_file import export_padded, export_rank_pattern, rank_pattern_yaml, read_adapter
from rankpilot.lora.spec import RankLadder
from rankpilot.study.page import page_data, study_html
from rankpilot.study.run_data import check_summary, number_rows, read_run
from rankpilot.study.verdict import summary_table, verdict
from safetensors.torch import save, save_file

from ..decide.test_log import make_record
from .damage import Files, as_text, damaged_json, damaged_tensors, edited, files_of, folder_of, put
from .running import fuzz

# Policies -------------------------------------------------------------------------------------------------------------


@cache
def small_policy() -> Files:
    """One with a small network."""
    torch.manual_seed(0)
    network = GroupNetwork(NetworkConfig(width=4))
    files = files_of(lambda folder: save_policy(folder, network, DecisionSchedule(), {"name": "small"}))
    return files | {CARD: as_text(json.loads(files[CARD]) | {"versions": {}})}


@st.composite
def policies(draw: st.DrawFn) -> Files:
    """A policy with a damaged card or damaged weights, of which the card mostly has the right sha256."""
    files = dict(small_policy())
    if draw(st.booleans()):
        files[WEIGHTS] = draw(damaged_tensors(files[WEIGHTS]))
    card = json.loads(files[CARD])
    if draw(st.integers(0, 4)):
        card["sha256"] = hashlib.sha256(files[WEIGHTS]).hexdigest()
    kind = draw(st.sampled_from(["whole", "values", "values", "anything"]))
    if kind == "anything":
        return files | {CARD: draw(damaged_json(card))}
    return files | {CARD: as_text(draw(edited(card)) if kind == "values" else card)}


def observation() -> Observation:
    count, generator = 6, np.random.default_rng(0)
    cost = ParameterCost(np.full((1, count), 100.0))
    ranks, most, blocks = np.zeros(count, dtype=np.int64), np.full(count, 32), np.arange(count) // 2
    return Observation(
        generator.normal(size=(count, len(MODULE_FEATURES))).astype(np.float32).clip(-3, 3),
        generator.uniform(size=len(RUN_FEATURES)).astype(np.float32),
        AllocationProblem(ranks, most, blocks, cost, 4000.0, RankLadder()),
        tuple(f"layers.{index}" for index in range(count)),
    )


@fuzz(policies(), examples=50)
def test_policies(files: Files) -> None:
    with folder_of(files) as folder:
        schedule = policy_schedule(folder)
        policy = load_policy(folder)
        assert policy.name.isprintable()
        assert schedule.steps(100)
        assert policy.decide(observation()).ranks.shape == (6,)
        assert {path.name for path in folder.parent.rglob("*")} == {"folder", CARD, WEIGHTS}


# Adapters -------------------------------------------------------------------------------------------------------------

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: Path) -> None:
    """Two modules, at ranks 2 and 4."""
    LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.v_proj": 4},
        alpha_pattern={"layers.0.v_proj": 8}, base_model_name_or_path="base", task_type="CAUSAL_LM",
    ).save_pretrained(str(folder))  # fmt: skip
    save_file(
        {
            f"base_model.model.layers.0.{name}.lora_{side}.weight": torch.ones((rank, 6) if side == "A" else (6, rank))
            for name, rank in (("q_proj", 2), ("v_proj", 4))
            for side in "AB"
        },
        folder / TENSORS,
    )


small_adapter = cache(lambda: files_of(write_adapter))


@st.composite
def adapters(draw: st.DrawFn) -> Files:
    """An adapter with a damaged configuration, damaged weights, or both."""
    files, which = dict(small_adapter()), draw(st.sampled_from(["config", "weights", "both"]))
    if which != "weights":
        files[CONFIG] = draw(damaged_json(json.loads(files[CONFIG])))
    if which != "config":
        files[TENSORS] = draw(damaged_tensors(files[TENSORS]))
    return files


@fuzz(adapters(), examples=50)
def test_adapters(files: Files) -> None:
    with folder_of(files) as folder:
        adapter = read_adapter(folder)
        for module in adapter.ranks:
            adapter.scale(module)
        rank_pattern_yaml(folder)
        export_rank_pattern(folder)
        export_padded(folder, folder.parent / "padded")
        assert {path.name for path in folder.parent.iterdir()} == {"folder", "padded"}


def with_config(folder: Path, **changes: Any) -> Path:
    files = small_adapter()
    return put(files | {CONFIG: as_text(json.loads(files[CONFIG]) | changes)}, folder)


@pytest.mark.parametrize("name", ["lora_dropout", "r", "lora_alpha", "use_dora", "modules_to_save", "target_modules"])
def test_a_setting_does_not_become_lines_of_yaml(tmp_path: Path, name: str) -> None:
    folder = with_config(tmp_path, **{name: {"0\ntrust_remote_code: true": 1}})
    with pytest.raises(RunFolderError, match=f"is corrupt or not an adapter: {name} is"):
        rank_pattern_yaml(folder)


def test_a_pair_of_rank_0_that_claims_a_huge_width(tmp_path: Path) -> None:
    sides, base = {"A": torch.ones(0, 2**40), "B": torch.ones(2**40, 0)}, "base_model.model.layers.0.q_proj"
    tensors = save({f"{base}.lora_{side}.weight": value for side, value in sides.items()})
    folder = put(small_adapter() | {TENSORS: tensors}, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="At rank 1 the adapter would take 8,796,093,022,208 bytes"):
        export_padded(folder, tmp_path / "padded")


SLOW = (
    *("(a+)+$", "(.*)*x", "([a-z]+\\.?){9}", ".*.*.*x", "(a|a)*$", "(?:a{1,}){2,}"),
    *("x" * 1001, "(a|a)" * 40, "a?" * 40),
)


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_may_take_for_ever(tmp_path: Path, pattern: str, name: str) -> None:
    with pytest.raises(RunFolderError, match="may take very long to match"):
        read_adapter(with_config(tmp_path, **{name: {pattern: 4}}))


@pytest.mark.parametrize("pattern", ["layers.0.v_proj", r"^layers\.\d+\.v_proj$", ".*v_proj", r"layers\.(0|1)\.v_proj"])
def test_patterns_that_people_write(tmp_path: Path, pattern: str) -> None:
    adapter = read_adapter(with_config(tmp_path, rank_pattern={pattern: 4}))
    assert adapter.ranks == {"layers.0.q_proj": 2, "layers.0.v_proj": 4}


NESTED = pytest.param(
    {"monteclora_config": {"m;Ea": 1}},
    "is corrupt or not an adapter: it has nested settings",
    marks=pytest.mark.skipif(
        "monteclora_config" not in LoraConfig.__dataclass_fields__, reason="this PEFT does not know it"
    ),
)
"""PEFT's own reader leaves out a setting that it does not know, by name, and tries again: here for ever."""


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"peft_type": kind}, "is corrupt or not an adapter: peft_type is")
            for kind in (None, "LORA ", ["LORA"], "../x")
        ),
        ({"rank_pattern": [1]}, "not a mapping of modules"),
        ({"alpha_pattern": 5}, "not a mapping of modules"),
        NESTED,
    ],
)
def test_configurations_at_which_peft_falls_over(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Without a kind, PEFT's own reader calls itself for ever."""
    with pytest.raises(RunFolderError, match=message):
        read_adapter(with_config(tmp_path, **changes))


# Runs -----------------------------------------------------------------------------------------------------------------

RESULT = {
    "held_out_loss": 0.38, "held_out_accuracy": 0.86, "adapter_parameters": 120_000, "peak_bytes": 91_000_000,
    "budget_bytes": 100_000_000, "median_step_s": 0.05, "train_s": 12.3, "steps": 100, "ranks": {"a": 4, "b": 0},
}  # fmt: skip

SUMMARY = {
    "model": "MiniLM", "data": "sst2", "policy": "pilot", "seed": 3, "held_out_rows": 100, "largest_class": 0.5,
    "runs": {"rankpilot": RESULT, "uniform": RESULT},
}  # fmt: skip

ROWS = [{"step": step, "loss": 1.0 - step / 100, "peak_bytes": 90_000_000, "eval_loss": 0.5} for step in range(4)]

TRAINER = {"global_step": 5, "log_history": [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.4}]}


@cache
def small_log() -> Files:
    """A log of three decisions on three modules."""
    return files_of(lambda folder: [DecisionLog(folder / "decisions").append(make_record(n)) for n in range(3)])


@st.composite
def logs(draw: st.DrawFn) -> Files:
    """A log with a damaged line, above all in what its decision was chosen from, or with damaged arrays."""
    files, lines, arrays = dict(small_log()), "decisions/decisions.jsonl", "decisions/decision-000001.safetensors"
    rows = files[lines].splitlines()
    line = json.loads(rows[1])
    how = draw(st.sampled_from(["choice", "choice", "line", "arrays"]))
    if how == "arrays":
        return files | {arrays: draw(damaged_tensors(files[arrays]))}
    rows[1] = as_text(line | {"choice": draw(edited(line["choice"]))}) if how == "choice" else draw(damaged_json(line))
    return files | {lines: b"\n".join(rows) + b"\n"}


@fuzz(logs(), examples=60)
def test_logs(files: Files) -> None:
    """A choice that is read can be made again, told and drawn."""
    with folder_of(files) as folder:
        for record in DecisionLog(folder / "decisions").read():
            record.facts()
            record.line()
            if record.choice is not None:
                assert 0 <= record.choice.best < len(record.choice.plans)
                assert record.choice.promise()


@st.composite
def runs(draw: st.DrawFn) -> Files:
    """The files of a run, some of them damaged; half of them of a Trainer alone."""
    files = small_log() if draw(st.booleans()) else {}
    if draw(st.booleans()):
        return files | {"trainer_state.json": draw(damaged_json(TRAINER))}
    return files | {
        "summary.json": draw(damaged_json(SUMMARY)),
        "metrics-rankpilot.jsonl": b"\n".join(json.dumps(draw(edited(row))).encode() for row in ROWS),
        "config.json": draw(damaged_json({"model": "MiniLM", "budget": "100MiB", "time": "0.8s", "steps": 200})),
    }


@fuzz(runs(), examples=40)
def test_run_folders(files: Files) -> None:
    with folder_of(files) as folder:
        run = read_run(folder)
        verdict(run)
        summary_table(run)
        study_html(page_data([run], [None]))


def test_rows_keep_their_numbers() -> None:
    lines: list[Any] = [{"step": 1, "loss": 0.5, "text": "x"}, 5, None, {"step": -1}, {"loss": True}, {"step": 2**60}]
    assert number_rows(lines) == [{"step": 1, "loss": 0.5}, {}, {}]


@pytest.mark.parametrize(
    "change",
    [
        {"runs": []},
        {"runs": {"rankpilot": 5}},
        {"runs": {"rankpilot": RESULT | {"held_out_loss": "low"}}},
        {"runs": {"rankpilot": RESULT | {"ranks": {"a": -1}}}},
        {"runs": {"rankpilot": RESULT | {"peak_bytes": MOST_NUMBER + 1}}},
        {"largest_class": "half"},
        {"largest_class": 1.5},
        {"held_out_rows": -1},
        {"outputs": "3); import os"},
        {"model": ["m"]},
    ],
)
def test_a_summary_of_something_else(change: dict[str, Any]) -> None:
    check_summary(SUMMARY)
    with pytest.raises((TypeError, AttributeError)):
        check_summary(SUMMARY | change)
