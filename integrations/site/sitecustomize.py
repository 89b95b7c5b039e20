"""Runs at the start of each Python process under `rankpilot run`, which puts this folder first on PYTHONPATH.

It waits for transformers' Trainer to be imported, and runs the `sitecustomize` that it hides. It loads no other library,
and no error of its own reaches the program.
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib takes longer to import than all else


class TrainerFinder:
    """Finder of the module with the Trainer: it patches the class once the module has run."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Return the spec that the other finders have for the module; None for any other module."""
        if name != "transformers.trainer":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        run = getattr(spec and spec.loader, "exec_module", None)
        if run is not None:

            def exec_module(module):  # type: ignore[no-untyped-def]
                run(module)
                patch(module.Trainer)

            try:
                spec.loader.exec_module = exec_module
            except AttributeError:  # a loader written in C; the parent says that nothing was attached
                pass
        return spec


def patch(trainer_class):  # type: ignore[no-untyped-def]
    """Attach to Trainers of this class when they train."""
    try:
        from rankpilot.integrations.hook import patch as attach_when_training

        attach_when_training(trainer_class)
    except Exception as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("rankpilot run: nothing is attached in %s: %s\n" % (sys.executable, error))


def run_hidden():  # type: ignore[no-untyped-def]
    """Run the `sitecustomize` that would have run without this one; its errors are its own."""
    from importlib.machinery import PathFinder

    hidden = PathFinder.find_spec("sitecustomize", [each for each in sys.path if os.path.abspath(each or ".") != HERE])
    if hidden is not None and hidden.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(hidden)
        hidden.loader.exec_module(module)


if os.environ.get("RANKPILOT_RUN"):
    sys.meta_path.insert(0, TrainerFinder())
run_hidden()
