"""Speed of the environment: rates and ratios of known times, and one small real run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rankpilot.env.rank_allocation import RankAllocationEnv
from rich.console import Console

from benchmarks import env_speed
from benchmarks.__main__ import run
from benchmarks.env_speed import Load, Options, measure, whole_episodes

TINY = Load(steps=(4,), runs=(2,), rounds=1, base="llama-4x32", rows=2, length=8, eval_rows=4)


def known(load: Load, steps: int) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    return {"peft": steps, "n4": 4 * steps}, {"peft": np.array([2.0, 4.0, 3.0]), "n4": np.array([2.0, 4.0, 3.0])}


def test_rates_and_ratios_are_of_train_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_speed, "measure", known)
    monkeypatch.setattr(env_speed, "FULL", Load(steps=(6, 12)))
    shown = io.StringIO()
    figures = env_speed.benchmark(Options(), Console(file=shown, width=120))
    assert figures["steps_6.peft.train_steps_per_cpu_s"] == pytest.approx(2.0)
    assert figures["steps_12.n4.train_steps_per_cpu_s"] == pytest.approx(16.0)
    for end in ("", "_low", "_high"):
        assert figures[f"steps_6.n4.over_peft{end}"] == pytest.approx(4.0)
    assert "steps_6.peft.over_peft" not in figures
    for part in ("4 x 16 tokens", "12 steps, 4 stacked episodes", "62.50 ms", "4.00 (4.00 to 4.00)"):
        assert part in shown.getvalue()
    json.dumps(figures, allow_nan=False)


def test_a_round_is_whole_episodes_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, seconds = measure(TINY, 4)
    assert counts == {"peft": 4, "n2": 8}
    assert {name: times.shape for name, times in seconds.items()} == {"peft": (1,), "n2": (1,)}
    assert all(times[0] > 0 for times in seconds.values())


def test_the_command_writes_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env_speed, "measure", known)
    path = tmp_path / "figures.json"
    assert run(["env-speed", "--quick", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert (figures["quick"], figures["threads"], figures["rounds"]) == (True, 1, 3)
    assert figures["steps_20.n4.over_peft"] == pytest.approx(4.0)
    assert "single PEFT episodes" in capsys.readouterr().out


def test_an_episode_that_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(RankAllocationEnv):
        def step(self, action):
            observation, reward, _, truncated, info = super().step(action)
            return observation, reward, False, truncated, info

    from rankpilot.env.proxy_task import ProxyTask, Reference

    task = ProxyTask("shift", 0, "llama-4x32", steps=4, batch_size=2, length=8, reference=Reference(2.0, 1.8, 1.7))
    with pytest.raises(AssertionError, match="all that an episode has"):
        whole_episodes(Endless(task=task, schedule=env_speed.SCHEDULE))(0)
