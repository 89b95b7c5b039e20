"""Policy files: the round trip, and everything that must be refused without being run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.policy_file import (
    CARD,
    WEIGHTS,
    GroupNetwork,
    LearnedPolicy,
    NetworkConfig,
    load_policy,
    policy_schedule,
    save_policy,
)
from rankpilot.common.errors import PolicyFileError, UnknownNameError
from rankpilot.common.files import sha256
from rankpilot.decide.groups import GROUP_RULES, NOTHING, STEERING, GroupView
from rankpilot.decide.observation import RUN_FEATURES, Observation
from rankpilot.decide.rules import RULES, SignalRule
from rankpilot.decide.settings import DecisionSchedule
from safetensors.torch import load_file, save_file

NETWORK = asdict(NetworkConfig(width=12))
SCHEDULE = DecisionSchedule(probe_steps=7, fractions=(0.0, 0.25), max_step=3)


def stirred(module: Any) -> Any:
    """The network, with weights that differ from those of a fresh one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture
def network() -> GroupNetwork:
    network: GroupNetwork = stirred(GroupNetwork(NetworkConfig(width=12)))
    return network


@pytest.fixture
def folder(tmp_path: Path, network: GroupNetwork) -> Path:
    return save_policy(tmp_path / "pilot", network, SCHEDULE, {"name": "my pilot", "note": [1, 2]})


def put_weights(folder: Path, weights: bytes | dict[str, torch.Tensor]) -> None:
    """Other weights, of which the card has the sha256."""
    if isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    else:
        save_file(weights, folder / WEIGHTS)
    edit_card(folder, sha256=sha256(folder / WEIGHTS))


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


def test_round_trip(folder: Path, network: GroupNetwork, make_observation: Callable[..., Observation]) -> None:
    loaded, before = load_policy(str(folder)), LearnedPolicy("x", network, SCHEDULE)
    assert isinstance(loaded, LearnedPolicy)
    assert (loaded.name, loaded.sha256) == ("my pilot", sha256(folder / WEIGHTS))
    assert not loaded.network.training
    for seed, step in product(range(3), (None, 2)):
        a, b = (vars(policy.decide(make_observation(11, seed, max_step=step))) for policy in (loaded, before))
        for name in ("ranks", "scores", "exact", "change"):
            np.testing.assert_array_equal(a[name], b[name])
    assert policy_schedule(folder) == policy_schedule(load_policy(folder)) == SCHEDULE
    card = json.loads((folder / CARD).read_text())
    assert (card["note"], card["schema"], card["network"]["width"]) == ([1, 2], 7, 12)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CARD}


def test_on_labels_an_agent_leaves_all_as_it_is(folder: Path, make_observation: Callable[..., Observation]) -> None:
    policy = load_policy(folder)
    assert isinstance(policy, LearnedPolicy)
    for predicted, labels in ((-0.1, False), (-1.5, True)):
        observation = make_observation(24, max_step=2)
        observation.run[RUN_FEATURES.index("predicted")] = predicted
        assert (policy.probabilities(GroupView.of(observation))[NOTHING] == 1) == labels


def test_rules_and_objects() -> None:
    assert load_policy("signal-mean") is RULES["signal-mean"]
    assert load_policy("union") is GROUP_RULES["union"]
    assert policy_schedule("union") == policy_schedule("agent") == STEERING
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
        ({"schema": 8}, "has schema 8; this version of rankpilot reads 7"),
        ({"schema": 6}, "has schema 6; .*Train it again, or install the version that made it"),
        ({"group_features": ["snr"]}, r"has group_features \['snr'\]"),
        ({"ladder": [0, 1]}, r"has ladder \[0, 1\]"),
        ({"format": "other"}, "not the card of a rankpilot policy"),
        ({"network": None}, "does not describe the network"),
        ({"network": NETWORK | {"width": 13}}, "do not match its card"),
        ({"network": NETWORK | {"width": 10**9}}, "does not describe the network"),
        ({"network": NETWORK | {"attention_heads": 4}}, "does not describe the network: .*unknown 'attention_heads'"),
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


def test_loading_draws_no_random_number(folder: Path) -> None:
    for policy in ("default", folder):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        load_policy(policy)
        assert torch.equal(torch.get_rng_state(), before)


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
    with pytest.raises(UnknownNameError, match=r"Policy folder .* does not exist"):
        load_policy(tmp_path / "none")
    with pytest.raises(PolicyFileError, match=r"is not a policy folder: card\.json is missing"):
        load_policy("")


def test_weights_that_are_not_those_of_the_card(folder: Path) -> None:
    """Those of something else, or some that are missing, or that the card does not know."""
    weights = load_file(folder / WEIGHTS)
    first = next(iter(weights))
    for content in (
        {"other": torch.zeros(2)},
        {name: value for name, value in weights.items() if name != first},
        weights | {"rate.other": torch.zeros(2)},
        weights | {first: torch.zeros(1, 1, 1)},
    ):
        put_weights(folder, content)
        with pytest.raises(PolicyFileError, match="do not match its card"):
            load_policy(folder)


def test_a_header_that_claims_huge_tensors(folder: Path) -> None:
    """Or is itself said to be huge."""
    tensor = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
    header = json.dumps({"token.0.weight": tensor}).encode()
    flat = json.dumps({"token.0.weight": tensor | {"shape": [2**62]}}).encode()
    for length, text in ((len(header), header), (len(flat), flat), (2**63, b"{}"), (2**40, b"{}")):
        put_weights(folder, length.to_bytes(8, "little") + text)
        with pytest.raises(PolicyFileError, match="not a safetensors file"):
            load_policy(folder)


@pytest.mark.parametrize("value", [torch.ones(1).double(), torch.ones(1).half(), torch.tensor([float("nan")])])
def test_weights_of_another_type_or_not_finite(folder: Path, value: torch.Tensor) -> None:
    weights = load_file(folder / WEIGHTS)
    put_weights(folder, weights | {"rate.bias": value.expand_as(weights["rate.bias"]).contiguous()})
    with pytest.raises(PolicyFileError, match=r"'rate.bias' is|contain NaN or infinity: rate.bias"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b[31mred", "x" * 201, 5, ["x"]])
def test_a_name_that_is_no_line_of_text(folder: Path, name: object) -> None:
    edit_card(folder, name=name)
    with pytest.raises(PolicyFileError, match=r"has the policy name .*a name must be one line of 1 to 200 characters"):
        load_policy(folder)


def test_files_that_are_too_large_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.truncate(2**30 + 1)  # sparse: it takes no room
    with pytest.raises(PolicyFileError, match="exceeds 1,073,741,824 bytes"):
        load_policy(folder)
    monkeypatch.setattr("rankpilot.agents.policy_file.MOST_CARD_BYTES", 100)
    with pytest.raises(PolicyFileError, match="exceeds 100 bytes"):
        load_policy(folder)
