"""Policy files: the round trip, and everything that must be refused without being run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import PlanValueConfig, PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import (
    CARD,
    ENSEMBLE_WEIGHTS,
    WEIGHTS,
    load_policy,
    policy_schedule,
    save_policy,
)
from rankpilot.agents.observation import MODULE_FEATURES, RUN_FEATURES, Inputs, Observation
from rankpilot.agents.rules import RULES, SignalRule
from rankpilot.agents.settings import ONCE, DecisionSchedule, NetworkConfig
from rankpilot.common.files import sha256
from rankpilot.errors import PolicyFileError, UnknownNameError
from safetensors.torch import load_file, save_file

from ...conftest import FIRST_INPUTS

NETWORK = asdict(NetworkConfig(width=12))
JUDGES = asdict(PlanValueConfig(count=2, width=8, dropout=0.5))
SCHEDULE = DecisionSchedule(probe_steps=7, fractions=(0.0, 0.25), max_step=3)


@pytest.fixture
def network() -> RankNetwork:
    network = RankNetwork(NetworkConfig(width=12, signal_gain=0.8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@pytest.fixture
def folder(tmp_path: Path, network: RankNetwork) -> Path:
    return save_policy(tmp_path / "pilot", network, SCHEDULE, {"name": "my pilot", "note": [1, 2]})


def edit_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / CARD).read_text())
    for key, value in changes.items():
        if value is None:
            del card[key]
        else:
            card[key] = value
    (folder / CARD).write_text(json.dumps(card))


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_round_trip(folder: Path, network: RankNetwork, make_observation: Callable[..., Observation]) -> None:
    loaded = load_policy(str(folder))
    assert isinstance(loaded, LearnedPolicy)
    assert loaded.name == "my pilot"
    assert not loaded.network.training
    assert loaded.sha256 == sha256(folder / WEIGHTS)
    before = LearnedPolicy("x", network)
    for seed in range(4):
        a, b = before.decide(make_observation(11, seed)), loaded.decide(make_observation(11, seed))
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.ranks, b.ranks)
        assert (a.rank_floor, a.expected) == (b.rank_floor, b.expected)
    assert policy_schedule(folder) == SCHEDULE
    card = json.loads((folder / CARD).read_text())
    assert card["note"] == [1, 2]
    assert card["schema"] == 4
    assert card["network"]["width"] == 12
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CARD}


def test_it_can_be_written_again(folder: Path, make_observation: Callable[..., Observation]) -> None:
    save_policy(folder, RankNetwork(), DecisionSchedule(), {})
    loaded = load_policy(folder)
    assert loaded.name == "pilot"
    observation = make_observation(6)
    np.testing.assert_array_equal(loaded.decide(observation).ranks, SignalRule().decide(observation).ranks)


def test_rules_and_objects() -> None:
    assert load_policy("signal-mean") is RULES["signal-mean"]
    mine = SignalRule(name="mine", gain=2)
    assert load_policy(mine) is mine
    assert policy_schedule("signal-mean") == policy_schedule(mine) == DecisionSchedule()


@pytest.mark.parametrize("position", [0, 30, -1])
def test_a_flipped_byte(folder: Path, position: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position] ^= 0x01
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(PolicyFileError, match=r"policy\.safetensors is corrupt: its sha256"):
        load_policy(folder)


@pytest.mark.parametrize("keep", [0, 4, 200])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(PolicyFileError, match="corrupt"):
        load_policy(folder)
    edit_card(folder, sha256=sha256(folder / WEIGHTS))
    with pytest.raises(PolicyFileError, match="not a safetensors file"):
        load_policy(folder)


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "zip", "legacy torch"])
@pytest.mark.parametrize("card_agrees", [True, False])
def test_a_pickle_in_disguise_is_never_run(folder: Path, tmp_path: Path, kind: str, card_agrees: bool) -> None:
    trap = tmp_path / "ran"
    if kind in ("pickle", "old pickle"):
        (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(trap), protocol=4 if kind == "pickle" else 0))
    else:
        torch.save(Payload(trap), folder / WEIGHTS, _use_new_zipfile_serialization=kind == "zip")
    if card_agrees:
        edit_card(folder, sha256=sha256(folder / WEIGHTS))
    with pytest.raises(PolicyFileError) as caught:
        load_policy(folder)
    assert not trap.exists()
    if kind != "old pickle":
        assert "in disguise" in str(caught.value)
    if kind == "pickle":  # the trap works
        pickle.loads((folder / WEIGHTS).read_bytes())  # noqa: S301
        assert trap.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "has schema 1; this version of rankpilot reads 4"),
        ({"schema": 5}, "has schema 5; this version of rankpilot reads 4"),
        ({"schema": 3}, "has schema 3; .*Train it again, or install the version that made it"),
        ({"schema": None}, "has schema None"),
        ({"module_features": ["snr"]}, r"has module_features \['snr'\]"),
        ({"run_features": []}, "has run_features"),
        ({"ladder": [0, 1]}, r"has ladder \[0, 1\]"),
        ({"format": "other"}, "not the card of a rankpilot policy"),
        ({"network": None}, "does not describe the network"),
        ({"network": {"width": 12}}, "does not describe the network"),
        (
            {"network": {"width": 12, "score_std": 1.0, "rank_floor_std": 1, "signal_gain": 1}},
            "does not describe the netw",
        ),
        ({"network": NETWORK | {"width": 13}}, "do not fit its card"),
        ({"network": NETWORK | {"critics": 3}}, "do not fit its card"),
        ({"network": NETWORK | {"attention_heads": 4}}, "does not describe the network: .*unknown 'attention_heads'"),
        ({"network": NETWORK | {"width": "a"}}, "does not describe the network"),
        ({"network": NETWORK | {"width": -1}}, "does not describe the network"),
        ({"network": NETWORK | {"critics": 0}}, "does not describe the network"),
        ({"network": NETWORK | {"depth_bias_std": 0.0}}, "does not describe the network"),
    ],
)
def test_foreign_cards(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_card(folder, **changes)
    with pytest.raises(PolicyFileError, match=message):
        load_policy(folder)


@pytest.mark.parametrize("schedule", [None, {}, {"fractions": [0.5]}, {"unknown": 1, "fractions": [0.0]}, [1]])
def test_a_card_with_a_broken_schedule(folder: Path, schedule: Any) -> None:
    edit_card(folder, schedule=schedule)
    with pytest.raises(PolicyFileError, match="schedule"):
        policy_schedule(folder)


def test_a_policy_that_was_trained_on_fewer_features_reads_those(
    tmp_path: Path, make_observation: Callable[..., Observation]
) -> None:
    torch.manual_seed(0)
    network = RankNetwork(NetworkConfig(width=12), FIRST_INPUTS)
    ensemble = PlanValueEnsemble(PlanValueConfig(**JUDGES), FIRST_INPUTS).eval()
    folder = save_policy(tmp_path / "earlier", network, SCHEDULE, {}, ensemble)
    card = json.loads((folder / CARD).read_text())
    assert card["module_features"] == list(MODULE_FEATURES[: FIRST_INPUTS.modules])
    assert card["run_features"] == list(RUN_FEATURES[: FIRST_INPUTS.run])
    policy = load_policy(folder)
    assert isinstance(policy, LearnedPolicy)
    assert policy.value_ensemble is not None
    observation = make_observation(11)
    modules, run = observation.modules.copy(), observation.run.copy()
    modules[:, FIRST_INPUTS.modules :], run[FIRST_INPUTS.run :] = 2.0, -1.0
    decisions = [policy.decide(seen) for seen in (observation, replace(observation, modules=modules, run=run))]
    np.testing.assert_array_equal(decisions[0].deliberation.votes, decisions[1].deliberation.votes)


def test_loading_draws_no_random_number(judged: Path) -> None:
    for policy in ("default", judged):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        load_policy(policy)
        assert torch.equal(torch.get_rng_state(), before)


def test_the_policy_that_ships_reads_all_features_and_tells_plans_of_any_cost_apart() -> None:
    policy = load_policy("default")
    assert isinstance(policy, LearnedPolicy)
    assert policy.value_ensemble is not None
    assert policy.network.inputs == policy.value_ensemble.inputs == Inputs()
    assert policy.value_ensemble.config.unit == "log loss"
    assert policy.value_ensemble.config.doubt > 0
    assert policy_schedule("default") == ONCE


def test_foreign_weights(folder: Path) -> None:
    save_file({"other": torch.zeros(2)}, folder / WEIGHTS)
    edit_card(folder, sha256=sha256(folder / WEIGHTS))
    with pytest.raises(PolicyFileError, match="do not fit its card"):
        load_policy(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[1]", b"null", b'{"a": 1}'])
def test_a_card_that_is_none(folder: Path, content: bytes) -> None:
    (folder / CARD).write_bytes(content)
    with pytest.raises(PolicyFileError, match=r"card\.json"):
        load_policy(folder)
    with pytest.raises(PolicyFileError, match=r"card\.json"):
        policy_schedule(folder)


@pytest.mark.parametrize("missing", [CARD, WEIGHTS])
def test_a_missing_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(PolicyFileError, match=f"{missing} is missing"):
        load_policy(folder)


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"is a file\. A policy is a folder"):
        load_policy(folder / WEIGHTS)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean: 'top-down'"):
        load_policy("top-downs")
    with pytest.raises(UnknownNameError, match="There is no policy folder"):
        load_policy(tmp_path / "none")
    with pytest.raises(PolicyFileError, match=r"is no policy folder: card\.json is missing"):
        load_policy("")


# Value ensembles ------------------------------------------------------------------------------------------------------


@pytest.fixture
def critics() -> PlanValueEnsemble:
    critics = PlanValueEnsemble(PlanValueConfig(**JUDGES))
    with torch.no_grad():
        for parameter in critics.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return critics.eval()


@pytest.fixture
def judged(tmp_path: Path, network: RankNetwork, critics: PlanValueEnsemble) -> Path:
    return save_policy(tmp_path / "judged", network, SCHEDULE, {"name": "judged"}, critics)


def decisions_of(policy: LearnedPolicy, make_observation: Callable[..., Observation]) -> list[dict[str, Any]]:
    observations = [make_observation(11, seed, max_step=step) for seed in range(4) for step in (None, 2)]
    return [vars(policy.decide(observation)) for observation in observations]


def test_critics_come_back(
    judged: Path, network: RankNetwork, critics: PlanValueEnsemble, make_observation: Callable[..., Observation]
) -> None:
    loaded = load_policy(judged)
    assert isinstance(loaded, LearnedPolicy)
    assert loaded.value_ensemble is not None
    assert loaded.value_ensemble.config == critics.config
    assert not any(module.training for module in loaded.value_ensemble.modules())
    decisions = decisions_of(loaded, make_observation)
    expected = decisions_of(LearnedPolicy("x", network, critics), make_observation)
    alone = decisions_of(LearnedPolicy("x", network), make_observation)
    for a, b in zip(decisions, expected, strict=True):
        np.testing.assert_array_equal(a["deliberation"].votes, b["deliberation"].votes)
        for name in b.keys() - {"deliberation"}:
            np.testing.assert_array_equal(a[name], b[name])
    assert any(not np.array_equal(a["ranks"], b["ranks"]) for a, b in zip(decisions, alone, strict=True))
    assert json.loads((judged / CARD).read_text())["plan_value"] == JUDGES | {"lowest": [], "highest": []}
    assert {path.name for path in judged.iterdir()} == {WEIGHTS, CARD}


def test_a_policy_without_critics_loads_as_before(folder: Path, make_observation: Callable[..., Observation]) -> None:
    """Also one whose card was written when there were none."""
    assert json.loads((folder / CARD).read_text())["plan_value"] is None
    assert not any(name.startswith(ENSEMBLE_WEIGHTS) for name in load_file(folder / WEIGHTS))
    new = load_policy(folder)
    edit_card(folder, plan_value=None)
    assert "plan_value" not in json.loads((folder / CARD).read_text())
    old = load_policy(folder)
    assert isinstance(new, LearnedPolicy)
    assert isinstance(old, LearnedPolicy)
    assert new.value_ensemble is old.value_ensemble is None
    for a, b in zip(decisions_of(new, make_observation), decisions_of(old, make_observation), strict=True):
        np.testing.assert_array_equal(a["ranks"], b["ranks"])
        assert a["expected"] == b["expected"] != 0


def test_a_policy_can_be_written_again_without_its_critics(judged: Path, network: RankNetwork) -> None:
    save_policy(judged, network, SCHEDULE, {})
    loaded = load_policy(judged)
    assert isinstance(loaded, LearnedPolicy)
    assert loaded.value_ensemble is None


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, "do not fit its card"),
        ({}, "does not describe"),
        (JUDGES | {"count": 1}, "do not fit its card"),
        (JUDGES | {"count": 3}, "do not fit its card"),
        (JUDGES | {"width": 9}, "do not fit its card"),
        ({"count": 2}, "does not describe"),
        (JUDGES | {"depth": 2}, "does not describe"),
        (JUDGES | {"count": 0}, "does not describe the network: count of the value ensemble is from 1"),
        (JUDGES | {"width": -1}, "does not describe"),
        (JUDGES | {"width": "a"}, "does not describe"),
        (JUDGES | {"width": 8.5}, "does not describe"),
        (JUDGES | {"dropout": 1.0}, "does not describe"),
        (JUDGES | {"dropout": None}, "does not describe"),
        ([2, 8], "does not describe"),
        ("critics", "does not describe"),
        (True, "does not describe"),
    ],
)
def test_cards_that_do_not_describe_the_critics(judged: Path, described: Any, message: str) -> None:
    edit_card(judged, plan_value=described)
    with pytest.raises(PolicyFileError, match=message):
        load_policy(judged)


@pytest.mark.parametrize("change", ["all missing", "one missing", "one more", "another shape"])
def test_weights_that_are_not_those_of_the_critics(judged: Path, change: str) -> None:
    weights = load_file(judged / WEIGHTS)
    ensemble_names = [name for name in weights if name.startswith(ENSEMBLE_WEIGHTS)]
    assert len(ensemble_names) == 2 * 8
    if change == "one more":
        weights[ENSEMBLE_WEIGHTS + "critics.0.other"] = torch.zeros(2)
    elif change == "another shape":
        weights[ensemble_names[0]] = weights[ensemble_names[0]][..., None].repeat_interleave(2, dim=-1)
    else:
        for name in ensemble_names[: 1 if change == "one missing" else None]:
            del weights[name]
    save_file(weights, judged / WEIGHTS)
    edit_card(judged, sha256=sha256(judged / WEIGHTS))
    with pytest.raises(PolicyFileError, match="do not fit its card"):
        load_policy(judged)


def test_critics_that_no_card_describes(folder: Path, judged: Path) -> None:
    """The weights of one policy with the card of another."""
    (folder / WEIGHTS).write_bytes((judged / WEIGHTS).read_bytes())
    edit_card(folder, sha256=sha256(folder / WEIGHTS))
    with pytest.raises(PolicyFileError, match="do not fit its card"):
        load_policy(folder)
