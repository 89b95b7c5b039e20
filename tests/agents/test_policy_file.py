"""Policy files: the round trip, and everything that must be refused without being run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.config import NetworkConfig
from rankpilot.agents.learned import LearnedPolicy
from rankpilot.agents.network import RankNetwork
from rankpilot.agents.policy_file import CARD, WEIGHTS, load_policy, policy_schedule, save_policy
from rankpilot.agents.rules import RULES, SignalRule
from rankpilot.env.observation import Observation
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.errors import PolicyFileError, RankPilotError, UnknownNameError
from rankpilot.files import sha256
from safetensors.torch import save_file

NETWORK = asdict(NetworkConfig(width=12))
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
    before = LearnedPolicy("x", network)
    for seed in range(4):
        a, b = before.decide(make_observation(11, seed)), loaded.decide(make_observation(11, seed))
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.deltas, b.deltas)
        assert (a.floor, a.log_prob) == (b.floor, b.log_prob)
    assert policy_schedule(folder) == SCHEDULE
    card = json.loads((folder / CARD).read_text())
    assert card["note"] == [1, 2]
    assert card["schema"] == 1
    assert card["network"]["width"] == 12
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CARD}


def test_it_can_be_written_again(folder: Path, make_observation: Callable[..., Observation]) -> None:
    save_policy(folder, RankNetwork(), DecisionSchedule(), {})
    loaded = load_policy(folder)
    assert loaded.name == "pilot"
    observation = make_observation(6)
    np.testing.assert_array_equal(loaded.decide(observation).deltas, SignalRule().decide(observation).deltas)


def test_rules_and_objects() -> None:
    assert load_policy("heur3") is RULES["heur3"]
    mine = SignalRule(name="mine", gain=2)
    assert load_policy(mine) is mine
    assert policy_schedule("heur3") == policy_schedule(mine) == DecisionSchedule()


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
        ({"schema": 2}, "has schema 2; this version of rankpilot reads 1"),
        ({"schema": None}, "has schema None"),
        ({"module_features": ["snr"]}, r"has module_features \['snr'\]"),
        ({"run_features": []}, "has run_features"),
        ({"ladder": [0, 1]}, r"has ladder \[0, 1\]"),
        ({"format": "other"}, "not the card of a rankpilot policy"),
        ({"network": None}, "does not describe the network"),
        ({"network": {"width": 12}}, "does not describe the network"),
        ({"network": {"width": 12, "score_std": 1.0, "floor_std": 1, "signal_gain": 1}}, "does not describe the netw"),
        ({"network": NETWORK | {"width": 13}}, "do not fit its card"),
        ({"network": NETWORK | {"critics": 3}}, "do not fit its card"),
        ({"network": NETWORK | {"attention_heads": 4}}, "do not fit its card"),
        ({"network": NETWORK | {"attention_heads": 5}}, "does not describe the network: .* divides the width"),
        ({"network": NETWORK | {"width": "a"}}, "does not describe the network"),
        ({"network": NETWORK | {"width": -1}}, "does not describe the network"),
        ({"network": NETWORK | {"critics": 0}}, "does not describe the network"),
        ({"network": NETWORK | {"tilt_std": 0.0}}, "does not describe the network"),
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
    with pytest.raises(UnknownNameError, match="Did you mean: 'fracrule'"):
        load_policy("fracrules")
    with pytest.raises(UnknownNameError, match="There is no policy folder"):
        load_policy(tmp_path / "none")
    with pytest.raises(RankPilotError):
        load_policy("")
