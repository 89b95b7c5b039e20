"""All errors raised by rankpilot on purpose, under one base.

    RankPilotError
    ├── ConfigError        a setting out of range or in conflict with another      (ValueError)
    ├── UnknownNameError   a name not among the allowed ones                       (LookupError)
    ├── BudgetError        an unreadable budget, or one too small for any plan     (ValueError)
    ├── UnsupportedError   an unsupported model, adapter or optimizer              (TypeError)
    ├── DataError          an empty, too short or malformed data set               (ValueError)
    ├── NonFiniteError     a NaN or infinite loss or weight                        (ArithmeticError)
    ├── NoGradientError    a run whose adapters receive no gradients               (RuntimeError)
    ├── PolicyFileError    a corrupt, foreign or too new policy file               (ValueError)
    ├── RunFolderError     an existing, missing or truncated run or adapter        (OSError)
    ├── AssetError         a packaged model or data set that is not available      (OSError)
    ├── WorkerError        work whose worker processes died repeatedly             (RuntimeError)
    └── ProcessError       processes of one run that are out of sync               (RuntimeError)

Each also inherits from the builtin in parentheses, so code without rankpilot imports can catch it.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST_NAME = 200
"""Maximum length of a name to look up similar names for; a longer one is not a typo."""


MOST_LINE = 500
"""Characters shown of another library's error; it may quote a whole file."""


class RankPilotError(Exception):
    """Base of all errors raised on purpose by rankpilot."""

    def __str__(self) -> str:
        """Return the plain message (KeyError-like bases would quote it)."""
        return str(self.args[0]) if self.args else ""


def first_line(error: Exception) -> str:
    """First line of another library's error, or its type if it has no message."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= MOST_LINE else f"{lines[0][:MOST_LINE]} ..."


NOT_WRITTEN = ("I/O error", "IoError", "inline_container", "PytorchStreamWriter", "os error ")
"""Fragments of safetensors, tokenizers and `torch.save` errors on a full disk; they are not OSErrors."""

CHECK_PATH = "Check the path, its permissions, and the free disk space."


def not_written(error: Exception) -> bool:
    """True if the system refused to write a file."""
    return isinstance(error, OSError) or any(words in str(error) for words in NOT_WRITTEN)


def shown(value: object) -> str:
    """Format a value for errors: long texts, lists and deep nesting are cut, so the result is always short."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Format an integer; Python refuses to print thousands of digits."""
        return repr(x) if abs(x) < 10**self.maxlong else f"a whole number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class ConfigError(RankPilotError, ValueError):
    """A setting out of range or in conflict with another one."""


REMOVED = {
    "time": 'goal="time" takes the fastest plan of those with nearly the loss of plain LoRA.',
    "offload": "gradient_checkpointing and stream save more.",
    "recompute": "use gradient_checkpointing.",
    "checkpointing": "use gradient_checkpointing.",
    "measure": "`rankpilot finetune MODEL DATA --dry` tells the plan on your machine.",
}
"""What to do in place of options that were removed, by name."""


class UnknownNameError(RankPilotError, LookupError):
    """A name not among the allowed ones."""

    @classmethod
    def of(cls, kind: str, given: object, allowed: Iterable[str], hint: str = "") -> UnknownNameError:
        """Build the error with the nearest allowed names.

        Args:
            kind: kind of name, e.g. "target module".
            given: the given name.
            allowed: all allowed names.
            hint: a sentence about alternatives.
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
    """An unreadable budget, or one too small for any plan."""


class UnsupportedError(RankPilotError, TypeError):
    """A model, adapter or optimizer without support for safe rank changes."""


def install(extra: str) -> str:
    """Command that installs an extra, in a clone of the project."""
    return f'pip install -e ".[{extra}]"'


_EXTRAS = {
    f"Pictures require matplotlib: {install('study')}.": "matplotlib",
    f"Policies and environments require gymnasium: {install('agent')}.": "gymnasium stable_baselines3 scipy",
    "Training, --lengths, and models or settings without recordings require torch and transformers: "
    f"{install('train')}.": "torch transformers huggingface_hub peft accelerate datasets filelock psutil tqdm",
}
"""Advice for missing packages, by the packages an extra installs."""


@contextmanager
def naming_extras(hint: str = "") -> Iterator[None]:
    """Name the extra in the error if one of its packages is missing.

    Args:
        hint: how to do without it.

    Raises:
        UnsupportedError: a package of an extra, such as torch or gymnasium, is imported but not installed.
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
    """An empty, too short or malformed data set."""


class NonFiniteError(RankPilotError, ArithmeticError):
    """A NaN or infinite loss, weight or gradient."""


class NoGradientError(RankPilotError, RuntimeError):
    """A run whose adapters receive no gradients."""


class PolicyFileError(RankPilotError, ValueError):
    """A corrupt or foreign policy file, or one of another schema version."""


class RunFolderError(RankPilotError, OSError):
    """A run or adapter folder that already exists, is missing, or is incomplete."""


class AssetError(RankPilotError, OSError):
    """A packaged model or data set, neither cached nor downloadable."""


class WorkerError(RankPilotError, RuntimeError):
    """Work whose worker processes died repeatedly."""


class ProcessError(RankPilotError, RuntimeError):
    """Processes of one run that are out of sync, or whose first process has failed."""
