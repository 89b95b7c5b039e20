"""A policy trained on a Ray cluster: byte for byte that of one process, also when an actor and a node are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.policy_file import WEIGHTS
from rankpilot.common.cluster import running_on_cluster
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.stacked import rounding_digest
from rankpilot.training.config import TrainConfig
from rankpilot.training.train import OnStage, Stage, finish, train
from rankpilot.training.vec_env import ProxyVecEnv

from ..ray_nodes import Nodes
from .test_train import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCHEDULE = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.4))
TINY = replace(CONFIG, iterations=2, stacks=2, task_steps=6, validate_every=1, schedule=SCHEDULE)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray")
    with Nodes(2) as nodes:
        yield nodes


def trained(config: TrainConfig, folder: Path, on_stage: OnStage | None = None) -> bytes:
    """Train; returns the file of what was learned."""
    finish(folder, train(config, folder, on_stage=on_stage), config)
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process makes."""
    return trained(TINY, tmp_path_factory.mktemp("one") / "policy")


@pytest.mark.long
def test_two_nodes_train_the_same_policy(nodes: Nodes, alone: bytes, tmp_path: Path) -> None:
    lines: list[str] = []
    with running_on_cluster(nodes.address, rounding_digest, lines.append):
        made = trained(replace(TINY, workers=0), tmp_path / "policy")
    assert lines == ["On the cluster: 2 nodes with 2 CPUs."]
    assert made == alone


@pytest.mark.long
def test_an_actor_and_then_a_node_are_lost(
    nodes: Nodes, alone: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor dies in the middle of a round, between two decisions; the node after an iteration."""
    step: Callable[[ProxyVecEnv], Any] = ProxyVecEnv.step_wait
    lost: list[str] = []

    def kill_at_the_second_decision(envs: ProxyVecEnv) -> Any:
        if envs._taken == 1 and not lost:
            assert nodes.kill_actors(nodes.nodes[1]) == 1
            lost.append("actor")
        return step(envs)

    def lose_after_the_first_iteration(stage: Stage) -> None:
        if (stage.name, stage.done) == ("training", 1):
            nodes.remove(nodes.nodes[0])
            lost.append("node")

    monkeypatch.setattr(ProxyVecEnv, "step_wait", kill_at_the_second_decision)
    with running_on_cluster(nodes.address, rounding_digest):
        made = trained(replace(TINY, workers=2), tmp_path / "policy", lose_after_the_first_iteration)
    assert lost == ["actor", "node"]
    assert made == alone
