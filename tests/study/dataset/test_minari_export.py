"""A data set as one of Minari's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from rankpilot.errors import ConfigError, UnsupportedError
from rankpilot.study.dataset import TrialsDataset
from rankpilot.study.dataset.minari_export import to_minari

from .conftest import STACKS


@pytest.fixture
def minari_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def test_episodes_are_runs(dataset: TrialsDataset, minari_folder: Path) -> None:
    import minari

    to_minari(dataset, "rankpilot/trials-v0", source="plan runs")
    loaded = minari.load_dataset("rankpilot/trials-v0")
    assert (loaded.total_episodes, loaded.total_steps) == (45, 88)
    most = max(stack.ranks.shape[2] for stack in STACKS)
    told = {each["options"]["run"]: each for each in loaded.storage.get_episode_metadata(range(45))}
    for episode in loaded.iterate_episodes():
        (metadata,) = loaded.storage.get_episode_metadata([episode.id])
        _, number, slot = map(int, metadata["options"]["run"].split("/"))
        stack = STACKS[number]
        count, steps = stack.ranks.shape[2], int((stack.ranks[:, slot].min(axis=1) >= 0).sum())
        assert episode.observations["modules"].shape == (steps + 1, most, stack.modules.shape[3])
        np.testing.assert_array_equal(episode.observations["modules"][:steps, :count], stack.modules[:steps, slot])
        np.testing.assert_array_equal(episode.observations["mask"][0], np.arange(most) < count)
        np.testing.assert_array_equal(episode.actions[:, :count], stack.ranks[:steps, slot])
        assert not episode.actions[:, count:].any()
        gain = np.log(stack.initial[slot]) + stack.gains[slot]
        np.testing.assert_allclose(episode.rewards, [*[0.0] * (steps - 1), gain], atol=1e-12)
        assert episode.terminations.tolist() == [*[False] * (steps - 1), True]
        assert episode.infos["probability"].shape == (steps + 1, 1)
        assert np.isnan(episode.infos["probability"][0, 0]) == (slot % 15 >= 5)
        task = stack.tasks[slot // 15]
        assert (metadata["seed"], metadata["options"]["task"]) == (task.seed, task.id)
    assert len(told) == 45


def test_names_that_minari_refuses(dataset: TrialsDataset, minari_folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write 'no name'"):
        to_minari(dataset, "no name")
    with pytest.raises(ConfigError, match="no rows of source 'rules'"):
        to_minari(dataset, "rankpilot/trials-v0", source="rules")
    to_minari(dataset, "rankpilot/trials-v0", source="policy runs")
    with pytest.raises(ConfigError, match="already exists"):
        to_minari(dataset, "rankpilot/trials-v0", source="policy runs")


def test_without_minari(dataset: TrialsDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'rankpilot\[minari\]'"):
        to_minari(dataset, "rankpilot/trials-v0")
