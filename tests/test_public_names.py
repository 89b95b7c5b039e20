"""What `import rankpilot` offers, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys

import gymnasium as gym
import pytest
import rankpilot
from rankpilot.errors import RankPilotError


def test_public_names() -> None:
    assert set(rankpilot.__all__) == {
        "ENV_ID",
        "Budget",
        "DecisionLog",
        "DecisionSchedule",
        "RankPilotCallback",
        "RankPilotError",
        "load_policy",
    }
    for name in rankpilot.__all__:
        assert getattr(rankpilot, name) is not None
    assert rankpilot.RankPilotError is RankPilotError
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rankpilot.Nothing
    with pytest.raises(ImportError):
        exec("from rankpilot import Nothing")


def test_the_environment_is_registered() -> None:
    assert rankpilot.ENV_ID == "rankpilot/RankAllocation-v3"
    assert rankpilot.ENV_ID in gym.registry


@pytest.mark.parametrize(
    "code",
    [
        "import gymnasium, rankpilot; assert 'rankpilot/RankAllocation-v3' in gymnasium.registry",
        "import rankpilot, gymnasium; assert rankpilot.ENV_ID in gymnasium.registry",
    ],
)
def test_the_environment_is_registered_in_either_order_of_imports(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train", "--help"], ["evaluate", "--help"], ["frobnicate"]])
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


def test_importing_is_light_and_quiet() -> None:
    heavy = (
        "torch",
        "transformers",
        "peft",
        "stable_baselines3",
        "datasets",
        "matplotlib",
        "pyarrow",
        "gymnasium",
        "tyro",
    )
    code = f"import sys, rankpilot; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "[]"
