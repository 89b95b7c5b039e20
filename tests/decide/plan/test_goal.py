"""Goals as people give them; and what makes plans loads no tensor library."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from rankpilot.common.errors import ConfigError
from rankpilot.decide.plan.goal import TOLERANCE, Goal, goal_of


def test_goals_in_words() -> None:
    assert str(goal_of("quality", None)) == "the lowest loss within the budget"
    assert str(goal_of("time", None)).startswith("the least time per step, with a loss very likely at most 0.01 (log)")
    assert str(goal_of("bytes", 0.02)).startswith("the least memory, with a loss very likely at most 0.02 (log)")
    assert goal_of("quality", None) == Goal()
    assert goal_of("time", None) == Goal("time", TOLERANCE)
    assert [goal_of(kind, None).saves for kind in ("quality", "time", "bytes")] == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "speed", "tolerance": None}, "goal must be one of quality, time, bytes; got 'speed'"),
        ({"goal": None, "tolerance": None}, "goal must be one of quality, time, bytes; got None"),
        ({"goal": "time", "tolerance": -0.1}, r"from 0 to 1, such as 0\.01 for 1 %; got -0\.1"),
        ({"goal": "time", "tolerance": math.nan}, "from 0 to 1"),
        ({"goal": "time", "tolerance": "1%"}, "from 0 to 1, .*; got '1%'"),
        ({"goal": "bytes", "tolerance": True}, "from 0 to 1"),
        ({"goal": "quality", "tolerance": 0.01}, "tolerance applies only to goal='time' or goal='bytes'"),
        ({"goal": "bytes", "tolerance": None, "budget_unit": "parameters"}, "requires a budget in bytes"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        goal_of(**options)


def test_plans_need_no_tensor_library():
    """Loads that wait inside functions are import-linter's."""
    modules = ", ".join(
        f"rankpilot.decide.plan.{name}" for name in ("goal", "parts", "plan", "problem", "rate", "worth")
    )
    program = f"import sys, {modules}; print({{'torch', 'transformers', 'peft', 'psutil'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
