"""Runs at the start of each Python process under `rankpilot run`, with this folder first on PYTHONPATH.

It waits for the import of transformers' Trainer, and runs the `sitecustomize` hidden by this one. It loads no other
library, and none of its errors reaches the program.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib takes longer to import than all else


class TrainerFinder:
    """Finds the Trainer's module, and patches the class once the module has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the other finders' spec of that module; None for any other module."""
        if name != "transformers.trainer":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec: Any = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        run = getattr(spec and spec.loader, "exec_module", None)
        if run is not None:

            def exec_module(module: Any) -> None:
                run(module)
                patch(module.Trainer)

            try:  # noqa: SIM105 - contextlib takes longer to import than all else
                spec.loader.exec_module = exec_module
            except AttributeError:  # a loader written in C; the parent says that nothing was attached
                pass
        return spec


def patch(trainer_class: Any) -> None:
    """Attach to Trainers of this class when they train."""
    try:
        from rankpilot.integrations.hook import patch as attach_when_training

        attach_when_training(trainer_class)
    except Exception as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"rankpilot run: nothing is attached in {sys.executable}: {error}\n")


def run_hidden() -> None:
    """Run the `sitecustomize` hidden by this one; its errors are its own."""
    from importlib.machinery import PathFinder

    others = [each for each in sys.path if os.path.abspath(each or ".") != HERE]  # noqa: PTH100
    hidden = PathFinder.find_spec("sitecustomize", others)
    if hidden is not None and hidden.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(hidden)
        hidden.loader.exec_module(module)


if os.environ.get("RANKPILOT_RUN"):
    sys.meta_path.insert(0, TrainerFinder())
run_hidden()
