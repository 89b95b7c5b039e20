"""What `import rankpilot` offers, and what it costs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import gymnasium as gym
import pytest
import rankpilot
from rankpilot.common.errors import RankPilotError
from rankpilot.common.quiet import silence_missing_kernels

from .warm_python import WarmPython


def test_public_names() -> None:
    assert set(rankpilot.__all__) == {
        "Budget", "Decision", "DecisionLog", "DecisionSchedule", "ENV_ID", "Observation", "PilotOptions", "RankPilot",
        "RankPilotCallback", "RankPilotError", "StackVecEnv", "StaticPlan",
        "TrainingRun", "allocate", "attach", "axolotl_yaml", "decision_from_scores", "export_merged", "export_padded",
        "export_rank_pattern", "fetch_asset", "last_checkpoint",
        "load_packaged_dataset", "load_policy", "memory_of", "module_feature", "rank_pattern_yaml", "static_plan",
        "stream_base",
    }  # fmt: skip
    for name in rankpilot.__all__:
        assert getattr(rankpilot, name) is not None
    assert rankpilot.RankPilotError is RankPilotError
    assert set(rankpilot.__all__) <= set(dir(rankpilot)), "a console completes the names"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rankpilot.Nothing
    with pytest.raises(ImportError):
        exec("from rankpilot import Nothing")


def test_the_environment_is_registered() -> None:
    assert rankpilot.ENV_ID == "rankpilot/FineTune-v8"
    assert rankpilot.ENV_ID in gym.registry


@pytest.mark.parametrize(
    "code",
    [
        "import gymnasium, rankpilot; gymnasium.spec(rankpilot.ENV_ID)",
        "import gymnasium, rankpilot.env; gymnasium.spec('rankpilot/FineTune-v8')",
        pytest.param("import gymnasium; gymnasium.make('rankpilot.env:rankpilot/FineTune-v8')", marks=pytest.mark.slow),
    ],
    ids=["by its name", "by an import", "by the id alone"],
)
def test_a_fresh_process_finds_the_environment(warm_python: WarmPython, code: str) -> None:
    done = warm_python.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_looks_after_no_import() -> None:
    """It once patched the loader of gymnasium."""
    code = "import sys; before = [*sys.meta_path]; import rankpilot; assert sys.meta_path == before"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["policy", "train", "--help"], ["policy", "evaluate", "--help"], ["frobnicate"]])
def test_the_command_line_speaks_for_itself_alone(command: list[str]) -> None:
    """Whatever the libraries that it loads have to say."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RANKPILOT")}
    done = subprocess.run(
        [sys.executable, "-m", "rankpilot", *command], capture_output=True, text=True, check=False, env=environment
    )
    if "--help" in command:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")


def added_modules(code: str, before: str = "pass") -> set[str]:
    """Top-level modules outside the standard library that code loads in a fresh process, beyond those before it."""
    program = f"import sys; {before}; first = set(sys.modules); {code}; print(*set(sys.modules) - first)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names


def test_missing_kernels_are_told_of_only_where_a_level_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = logging.getLogger("torchao")
    assert noisy.level >= logging.ERROR
    for before, after in ((logging.NOTSET, logging.ERROR), (logging.INFO, logging.INFO)):
        monkeypatch.setattr(noisy, "level", before)
        silence_missing_kernels()
        assert noisy.level == after


def test_importing_is_light_and_quiet() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import rankpilot"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert added_modules("import rankpilot") == {"rankpilot"}


@pytest.mark.long
@pytest.mark.slow
def test_the_callback_loads_no_library_that_a_trainer_does_not_load() -> None:
    """Nor any of these, which a Trainer does not load either."""
    trainer, absent = (
        "import peft; from transformers import Trainer",
        "gymnasium stable_baselines3 matplotlib tyro rich",
    )
    callback = f"from rankpilot import attach; assert not (set(sys.modules) - first) & set('{absent}'.split())"
    assert added_modules(callback, trainer) == {"rankpilot", "platformdirs"}
