"""Policy folders: their card and their weights."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from rankpilot.agents.learned.networks import PlanValueConfig, PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy_file import CARD, WEIGHTS, load_policy, policy_schedule, save_policy
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.cost.cost import ParameterCost
from rankpilot.errors import PolicyFileError
from rankpilot.lora.spec import RankLadder
from rankpilot.plan.problem import AllocationProblem
from safetensors.torch import load_file, save_file

from .damage import as_text, damaged_json, damaged_tensors, edited
from .running import fuzz


@dataclass(frozen=True)
class PolicyFiles:
    """The content of a policy folder."""

    card: bytes
    weights: bytes


@cache
def small_policy() -> PolicyFiles:
    """One with a small network and two small value networks."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "small"
        ensemble = PlanValueEnsemble(PlanValueConfig(count=2, width=4))
        save_policy(folder, RankNetwork(NetworkConfig(width=4)), DecisionSchedule(), {"name": "small"}, ensemble)
        card = json.loads((folder / CARD).read_text())
        return PolicyFiles(as_text(card | {"versions": {}}), (folder / WEIGHTS).read_bytes())


@st.composite
def policies(draw: st.DrawFn) -> PolicyFiles:
    """A policy with a damaged card or damaged weights, of which the card mostly has the right sha256."""
    whole = small_policy()
    weights = draw(damaged_tensors(whole.weights)) if draw(st.booleans()) else whole.weights
    card = json.loads(whole.card)
    if draw(st.integers(0, 4)):
        card["sha256"] = hashlib.sha256(weights).hexdigest()
    kind = draw(st.sampled_from(["whole", "values", "values", "anything"]))
    if kind == "anything":
        return PolicyFiles(draw(damaged_json(card)), weights)
    return PolicyFiles(as_text(draw(edited(card)) if kind == "values" else card), weights)


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


def write(files: PolicyFiles, folder: Path) -> Path:
    folder.mkdir()
    (folder / CARD).write_bytes(files.card)
    (folder / WEIGHTS).write_bytes(files.weights)
    return folder


@fuzz(policies(), examples=120)
def test_policies(files: PolicyFiles) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write(files, Path(name) / "policy")
        schedule = policy_schedule(folder)
        policy = load_policy(folder)
        assert policy.name.isprintable()
        assert schedule.steps(100)
        decision = policy.decide(observation())
        assert decision.ranks.shape == (6,)
        assert {path.name for path in Path(name).rglob("*")} == {"policy", CARD, WEIGHTS}


# What was found -------------------------------------------------------------------------------------------------------


def with_card(folder: Path, **changes: object) -> Path:
    files = small_policy()
    return write(PolicyFiles(as_text(json.loads(files.card) | changes), files.weights), folder)


@pytest.mark.parametrize("width", [10**9, 8192, 5])
@pytest.mark.parametrize("part", ["network", "plan_value"])
def test_a_card_that_asks_for_a_huge_network(tmp_path: Path, width: int, part: str) -> None:
    described = json.loads(small_policy().card)[part] | {"width": width}
    folder = with_card(tmp_path / "policy", **{part: described})
    with pytest.raises(PolicyFileError, match=r"do not fit its card|does not describe the network"):
        load_policy(folder)


@pytest.mark.parametrize("count", [10**9, 256, 3])
def test_a_card_that_asks_for_many_networks(tmp_path: Path, count: int) -> None:
    described = json.loads(small_policy().card)["network"] | {"critics": count}
    with pytest.raises(PolicyFileError, match=r"do not fit its card|does not describe the network"):
        load_policy(with_card(tmp_path / "policy", network=described))


def test_a_header_that_claims_huge_tensors(tmp_path: Path) -> None:
    for shape, offsets in (([2**40, 2**20], [0, 2**62]), ([2**62], [0, 2**62])):
        header = as_text({"module_encoder.0.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}})
        weights = len(header).to_bytes(8, "little") + header
        card = json.loads(small_policy().card) | {"sha256": hashlib.sha256(weights).hexdigest()}
        folder = write(PolicyFiles(as_text(card), weights), tmp_path / f"policy{len(shape)}")
        with pytest.raises(PolicyFileError, match="not a safetensors file"):
            load_policy(folder)
    for length in (2**63, 2**40):
        weights = length.to_bytes(8, "little") + b"{}"
        card = json.loads(small_policy().card) | {"sha256": hashlib.sha256(weights).hexdigest()}
        folder = write(PolicyFiles(as_text(card), weights), tmp_path / f"policy{length}")
        with pytest.raises(PolicyFileError, match="not a safetensors file"):
            load_policy(folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_weights_of_another_type_or_not_finite(tmp_path: Path, kind: torch.dtype, value: float) -> None:
    folder = with_card(tmp_path / "policy")
    weights = load_file(folder / WEIGHTS)
    weights["gains"] = torch.full_like(weights["gains"], value)
    if value == 1.0:
        weights["gains"] = weights["gains"].to(kind)
    save_file(weights, folder / WEIGHTS)
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CARD).write_bytes(as_text(card))
    with pytest.raises(PolicyFileError, match=r"'gains' is|hold NaN or infinity: gains"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b[31mred", "x" * 201, 5, ["x"]])
def test_a_name_that_is_no_line_of_text(tmp_path: Path, name: object) -> None:
    with pytest.raises(PolicyFileError, match=r"names the policy .*a name is a line of 1 to 200 characters"):
        load_policy(with_card(tmp_path / "policy", name=name))


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_card(tmp_path / "policy")
    from rankpilot.agents.learned import policy_file

    with (folder / WEIGHTS).open("ab") as stream:
        stream.truncate(2**30 + 1)  # sparse: it takes no room
    with pytest.raises(PolicyFileError, match="more than 1,073,741,824 bytes"):
        load_policy(folder)
    monkeypatch.setattr(policy_file, "MOST_CARD_BYTES", 100)
    with pytest.raises(PolicyFileError, match="more than 100 bytes"):
        load_policy(folder)
