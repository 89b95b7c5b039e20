"""No loss trains wrongly in silence: whole or in parts, it is the gradient of plain steps, or a line says it is not."""

from __future__ import annotations

import pytest

from ..cases import first_cases
from .loss_matrix import CASES, WHOLE, Cell, cells, outcome

QUICK = (
    "class-weights-rare-0-auto",
    "class-weights-rare-0-on",
    "weights-in-function-rare-0-auto",
    "weights-in-forward-common-0-auto",
    "weights-in-mapping-common-0-auto",
    "meet-std-common-0-on",
    "meet-negatives-rare-0-on",
    "step-clamps-common-0-auto",
    "running-buffer-common-0-auto",
    "features-read-by-model-common-0-auto",
    "left-padded-gpt2-rare-0-auto",
    "classes-common-0-auto",
    "causal-common-0-auto",
    "causal-common-0-on",
    "z-loss-common-0-on",
    "dpo-common-0-auto",
)
"""Cells that `make test` runs: each a way to be wrong, or to be in parts."""

ALL = sorted(cells(CASES), key=lambda cell: str(cell) not in QUICK)


def test_the_matrix_is_large_and_its_quick_cells_are_of_it() -> None:
    assert len(ALL) >= 200
    assert len({str(cell) for cell in ALL}) == len(ALL)
    assert {str(cell) for cell in ALL[: len(QUICK)]} == set(QUICK)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", first_cases(len(QUICK), ALL), ids=str)
def test_no_loss_trains_wrongly_in_silence(cell: Cell) -> None:
    found = outcome(cell)
    assert found.kind in ("equal", "told"), found
    if cell.mode == "auto":
        assert found.kind == "equal", found
    if cell.mode == "auto" and cell.case.name in {case.name for case in WHOLE}:
        assert found.parts == 1, "it is not known, so it runs as a whole"
    if cell.case.sums:
        assert found.parts > 1, "what is known runs in parts"
