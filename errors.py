"""Every error that rankpilot raises on purpose, under one base.

    RankPilotError
    ├── ConfigError        a setting is out of range or contradicts another        (ValueError)
    ├── UnknownNameError   a name that is not among the allowed ones               (LookupError)
    ├── BudgetError        a budget that cannot be read or that no plan fits       (ValueError)
    ├── UnsupportedError   a model, adapter or optimiser that cannot be handled    (TypeError)
    ├── DataError          a data set that is empty, too short or malformed        (ValueError)
    ├── NonFiniteError     a loss or weight that is NaN or infinite                (ArithmeticError)
    ├── NoGradientError    a run whose adapters receive no gradients               (RuntimeError)
    ├── PolicyFileError    a policy file that is corrupt, foreign or too new       (ValueError)
    ├── RunFolderError     a run or adapter that exists, is missing or is cut off  (OSError)
    ├── AssetError         a packaged model or data set that is not at hand        (OSError)
    ├── ReviewError        a person who refused a plan, or gave no answer in time  (RuntimeError)
    ├── WorkerError        work at which worker processes ended again and again    (RuntimeError)
    └── ProcessError       processes of one run that no longer hold the same       (RuntimeError)

Each also inherits the builtin in brackets, so that code that knows nothing of rankpilot can catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankPilotError(Exception):
    """Base of all errors raised on purpose by rankpilot."""

    def __str__(self) -> str:
        """The message alone (KeyError-like bases would quote it)."""
        return str(self.args[0]) if self.args else ""


def first_line(error: Exception) -> str:
    """What an error of another library says, as part of one line: its first line, or its kind if it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class ConfigError(RankPilotError, ValueError):
    """A setting is out of range or contradicts another one."""


class UnknownNameError(RankPilotError, LookupError):
    """A name that is not among the allowed ones."""

    @classmethod
    def of(cls, kind: str, given: str, allowed: Iterable[str], hint: str = "") -> UnknownNameError:
        """Build the error with the nearest allowed names.

        Args:
            kind: what the name stands for, e.g. "target module".
            given: the name that was passed.
            allowed: every name that would be accepted.
            hint: a sentence about what else is possible.
        """
        names = list(allowed)
        near = difflib.get_close_matches(given, names, n=3, cutoff=0.4)
        shown = near or names[:8]
        lead = "Did you mean" if near else "Allowed"
        more = "" if near or len(names) <= 8 else f" and {len(names) - 8} more"
        text = f"Unknown {kind} {given!r}. {lead}: {', '.join(map(repr, shown))}{more}."
        return cls(f"{text} {hint}".strip())


class BudgetError(RankPilotError, ValueError):
    """A budget that cannot be read, or that no plan fits."""


class UnsupportedError(RankPilotError, TypeError):
    """A model, adapter or optimiser whose ranks cannot be changed safely."""


class DataError(RankPilotError, ValueError):
    """A data set that is empty, too short or malformed."""


class NonFiniteError(RankPilotError, ArithmeticError):
    """A loss, weight or gradient that is NaN or infinite."""


class NoGradientError(RankPilotError, RuntimeError):
    """A run whose adapters receive no gradients."""


class PolicyFileError(RankPilotError, ValueError):
    """A policy file that is corrupt, foreign, or of another schema version."""


class RunFolderError(RankPilotError, OSError):
    """A folder of a run or an adapter that exists already, is missing, or is incomplete."""


class AssetError(RankPilotError, OSError):
    """A packaged model or data set that is neither cached nor downloadable."""


class ReviewError(RankPilotError, RuntimeError):
    """A person who refused a plan in review, or gave no answer in time."""


class WorkerError(RankPilotError, RuntimeError):
    """Work at which worker processes ended again and again."""


class ProcessError(RankPilotError, RuntimeError):
    """Processes of one run that no longer hold the same, or of which the first has failed."""
