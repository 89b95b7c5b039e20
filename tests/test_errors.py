"""The exception tree: what each error is besides, and what its message says."""

from __future__ import annotations

import pickle

import pytest
from rankpilot.common import errors
from rankpilot.common.errors import RankPilotError, UnknownNameError

BUILTINS = {
    "ConfigError": ValueError,
    "UnknownNameError": LookupError,
    "BudgetError": ValueError,
    "UnsupportedError": TypeError,
    "DataError": ValueError,
    "NonFiniteError": ArithmeticError,
    "NoGradientError": RuntimeError,
    "PolicyFileError": ValueError,
    "RunFolderError": OSError,
    "AssetError": OSError,
    "WorkerError": RuntimeError,
    "ProcessError": RuntimeError,
}


def test_the_tree_is_complete():
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, RankPilotError) and kind is not RankPilotError
    }
    assert kinds == set(BUILTINS)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_each_error_is_also_a_builtin_one_and_documented(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, builtin)
    assert f"{name} " in errors.__doc__
    assert f"({builtin.__name__})" in errors.__doc__
    error = kind("what went wrong")
    assert str(error) == "what went wrong"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  (as multiprocessing does)
    assert type(copy) is kind
    assert str(copy) == "what went wrong"


def test_an_unknown_name_gets_suggestions():
    error = UnknownNameError.of("task", "revews", ["reviews", "code", "planted"], "See `rankpilot list`.")
    assert str(error) == "Unknown task 'revews'. Did you mean: 'reviews'. See `rankpilot list`."


def test_without_a_near_name_the_allowed_ones_are_listed():
    assert str(UnknownNameError.of("task", "zzz", ["a", "b"])) == "Unknown task 'zzz'. Allowed: 'a', 'b'."
    many = str(UnknownNameError.of("task", "zzz", (f"name{i}" for i in range(20))))
    assert many.endswith("'name7' and 12 more.")
