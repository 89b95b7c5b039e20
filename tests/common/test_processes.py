"""What one process works out, all know: results, errors, the largest and the smallest numbers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from rankpilot.common.errors import BudgetError, ConfigError
from rankpilot.common.processes import Processes

from ..finetune.several import ProcessFailed, in_processes

QUICK_S = 10


def joined() -> Processes:
    dist.init_process_group("gloo")
    processes = Processes.of_this_run()
    assert Processes.of_this_run() is processes
    return processes


def test_alone_nothing_is_sent() -> None:
    processes = Processes.of_this_run()
    assert (processes.rank, processes.count, processes.first) == (0, 1, True)
    assert processes.on_first(lambda: "result") == "result"
    assert processes.most(1, 2.5) == processes.least(1, 2.5) == [1, 2.5]
    assert processes.of_each("value") == ["value"]
    with pytest.raises(BudgetError, match="too small"):
        processes.on_first(lambda: fail(BudgetError("too small")))


def test_all_know_what_the_first_works_out() -> None:
    results = in_processes(3, everything)
    known = {"first": [0, [0.0, 1.0, 2.0]], "most": [2.0, 0.0], "least": [0.0, -2.0], "each": ["0", "11", "222"]}
    assert results == [known | {"rank": rank} for rank in range(3)]


def everything() -> dict[str, Any]:
    processes = joined()
    rank = processes.rank
    number, array = processes.on_first(lambda: (rank, np.arange(3.0)))
    return {
        "rank": rank,
        "first": [number, array.tolist()],
        "most": processes.most(rank, -rank),
        "least": processes.least(rank, -rank),
        "each": processes.of_each(str(rank) * (rank + 1)),
    }


class Peculiar(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (BudgetError("no plan fits"), "BudgetError", "no plan fits"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError", "by zero"),
        (Peculiar(1, 2), "ProcessError", "The first process failed with Peculiar: 1 and 2"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "ProcessError", "UnicodeDecodeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_first_is_raised_in_all(error: Exception, kind: str, text: str) -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, raises, error, patience_s=QUICK_S)
    assert caught.value.kinds == {0: type(error).__name__, 1: kind}
    assert text in caught.value.texts[1]


def second_fails() -> int:
    def work() -> int:
        if dist.get_rank() == 1:
            raise ConfigError("a wrong setting")
        return 7

    processes = joined()
    assert processes.on_each(dist.get_rank) == processes.rank
    return processes.on_each(work)


def test_an_error_of_any_is_raised_in_all() -> None:
    assert Processes().on_each(lambda: 3) == 3
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, second_fails)
    assert caught.value.kinds == {0: "ConfigError", 1: "ConfigError"}
    assert set(caught.value.texts.values()) == {"a wrong setting"}


def raises(error: Exception) -> None:
    joined().on_first(lambda: fail(error))


def test_a_result_that_cannot_be_sent_is_an_error_and_no_waiting() -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, sends_a_lambda)
    assert set(caught.value.kinds) == {0, 1}


def sends_a_lambda() -> None:
    joined().on_first(lambda: lambda: None)


def test_a_process_that_dies_is_noticed() -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, dies)
    assert caught.value.kinds[0] == "Killed"
    assert caught.value.kinds[1] == "RuntimeError"


def dies() -> None:
    processes = joined()
    processes.most(1)
    if processes.first:
        os._exit(9)
    processes.on_first(lambda: None)
