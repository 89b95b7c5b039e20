"""Names of the suites of tasks and of their splits, which settings need before any task is read."""

from typing import Literal, get_args

Split = Literal["train", "validation", "test"]

SUITES = ("planted", "shift")
SPLITS: tuple[Split, ...] = get_args(Split)
