"""The order from `rankpilot run` to the processes of a program, and their marks in return."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

VARIABLE = "RANKPILOT_RUN"
"""Environment variable with the order, as JSON."""

Event = Literal["made", "attached", "left", "own", "failed"]
"""A Trainer was created; or it is about to train: attached, left unchanged, attached by its script, or failed."""


@dataclass(frozen=True)
class Order:
    """The order to attach to each Trainer of a program.

    Attributes:
        marks: folder for the marks of processes.
        options: options of `attach` in the form of the command line, without those left at their defaults.
        dry: True to end before training.
    """

    marks: str
    options: dict[str, Any] = field(default_factory=dict)
    dry: bool = False

    @classmethod
    def of_environment(cls) -> Order:
        """Return the order from this process's environment."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def text(self) -> str:
        """Return the value of the environment variable."""
        return json.dumps(asdict(self))

    def mark(self, event: Event, **facts: str) -> None:
        """Record the first such event of this process, with facts for people who look into the folder."""
        path = Path(self.marks) / f"{event}-{os.getpid()}.json"
        with suppress(OSError):  # the run matters more than its mark
            if not path.exists():
                path.write_text(json.dumps(facts), encoding="utf-8")

    def events(self) -> set[str]:
        """Return the events recorded by all processes so far."""
        return {path.name.partition("-")[0] for path in Path(self.marks).glob("*.json")}


def tell(text: str) -> None:
    """Write a line to standard error, in the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"rankpilot run: {' '.join(text.split())}\n")
        sys.stderr.flush()
