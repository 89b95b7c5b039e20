"""Every error that rankpilot raises on purpose, under one base.

    RankPilotError
    ├── ConfigError        a setting is out of range or contradicts another        (ValueError)
    ├── UnknownNameError   a name that is not among the allowed ones               (LookupError)
    ├── BudgetError        a budget that cannot be read or that no plan fits       (ValueError)
    ├── UnsupportedError   a model, adapter or optimizer that cannot be handled    (TypeError)
    ├── DataError          a data set that is empty, too short or malformed        (ValueError)
    ├── NonFiniteError     a loss or weight that is NaN or infinite                (ArithmeticError)
    ├── NoGradientError    a run whose adapters receive no gradients               (RuntimeError)
    ├── PolicyFileError    a policy file that is corrupt, foreign or too new       (ValueError)
    ├── RunFolderError     a run or adapter that exists, is missing or is cut off  (OSError)
    ├── AssetError         a packaged model or data set that is not at hand        (OSError)
    ├── WorkerError        work at which worker processes ended again and again    (RuntimeError)
    └── ProcessError       processes of one run that no longer hold the same       (RuntimeError)

Each also inherits the builtin in brackets, so that code that knows nothing of rankpilot can catch it.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST_NAME = 200
"""Characters of a name for which others like it are looked up; a longer one is no slip of a pen."""


MOST_LINE = 500
"""Characters of another library's error that are shown; it may have all of a file in it."""


class RankPilotError(Exception):
    """Base of all errors raised on purpose by rankpilot."""

    def __str__(self) -> str:
        """The message alone (KeyError-like bases would quote it)."""
        return str(self.args[0]) if self.args else ""


def first_line(error: Exception) -> str:
    """What an error of another library says, as part of one line: its first line, or its kind if it says nothing."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= MOST_LINE else f"{lines[0][:MOST_LINE]} ..."


NOT_WRITTEN = ("I/O error", "IoError", "inline_container", "PytorchStreamWriter", "os error ")
"""What the errors of safetensors, tokenizers and `torch.save` say when a disk is full; they are no OSErrors."""

CHECK_PATH = "Check that the path is right, that you may use it, and that the disk has room."


def not_written(error: Exception) -> bool:
    """Whether the system has refused to write a file."""
    return isinstance(error, OSError) or any(words in str(error) for words in NOT_WRITTEN)


def shown(value: object) -> str:
    """A value as errors show it: long texts, lists and deep ones are cut, so that it is short whatever was given."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """A whole number; Python refuses to write out those of thousands of digits."""
        return repr(x) if abs(x) < 10**self.maxlong else f"a whole number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class ConfigError(RankPilotError, ValueError):
    """A setting is out of range or contradicts another one."""


class UnknownNameError(RankPilotError, LookupError):
    """A name that is not among the allowed ones."""

    @classmethod
    def of(cls, kind: str, given: object, allowed: Iterable[str], hint: str = "") -> UnknownNameError:
        """Build the error with the nearest allowed names.

        Args:
            kind: what the name stands for, e.g. "target module".
            given: the name that was passed.
            allowed: every name that would be accepted.
            hint: a sentence about what else is possible.
        """
        names = list(allowed)
        short = isinstance(given, str) and len(given) <= MOST_NAME
        written = {each.lower(): each for each in names}
        near = difflib.get_close_matches(str(given).lower(), written, n=3, cutoff=0.5) if short else []
        near = [written[each] for each in near]
        listed = near or names[:8]
        lead = "Did you mean" if near else "Allowed"
        more = "" if near or len(names) <= 8 else f" and {len(names) - 8} more"
        name = repr(given) if short else shown(given)
        text = f"Unknown {kind} {name}. {lead}: {', '.join(map(repr, listed))}{more}."
        return cls(f"{text} {hint}".strip())


class BudgetError(RankPilotError, ValueError):
    """A budget that cannot be read, or that no plan fits."""


class UnsupportedError(RankPilotError, TypeError):
    """A model, adapter or optimizer whose ranks cannot be changed safely."""


_EXTRAS = {
    "A picture needs matplotlib: pip install 'rankpilot[study]'.": "matplotlib",
    "Policies and environments need gymnasium: pip install 'rankpilot[agent]'.": "gymnasium stable_baselines3 scipy",
    "Training, --lengths, and models or settings whose steps do not ship need torch and transformers: pip install "
    "'rankpilot[train]'.": "torch transformers huggingface_hub peft accelerate datasets filelock psutil tqdm",
}
"""What to do where one of some packages is missing, which an extra installs."""


@contextmanager
def naming_extras(hint: str = "") -> Iterator[None]:
    """Where a package of an extra is missing, let the error name the extra.

    Args:
        hint: how to do without it.

    Raises:
        UnsupportedError: a package of an extra, such as torch or gymnasium, is imported and not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        for told, packages in _EXTRAS.items():
            if package in packages.split():
                raise UnsupportedError(f"{told} {hint}".strip()) from error
        raise


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


class WorkerError(RankPilotError, RuntimeError):
    """Work at which worker processes ended again and again."""


class ProcessError(RankPilotError, RuntimeError):
    """Processes of one run that no longer hold the same, or of which the first has failed."""
