"""No loss trains wrongly in silence: whole or in parts, it is the gradient of plain steps."""

from __future__ import annotations

import pytest

from ..cases import first_cases
from .loss_matrix import CELLS, WHOLE, Cell, outcome

QUICK = (
    "class-weights-rare",
    "weights-in-function-rare",
    "weights-in-forward-common",
    "weights-in-mapping-common",
    "step-clamps-common",
    "running-buffer-common",
    "features-read-by-model-common",
    "left-padded-gpt2-rare",
    "classes-common",
    "causal-common",
    "dpo-common",
)
"""Cells that `make test` runs: each a way to be wrong, or to be in parts."""

ALL = sorted(CELLS, key=lambda cell: str(cell) not in QUICK)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", first_cases(len(QUICK), ALL), ids=str)
def test_no_loss_trains_wrongly_in_silence(cell: Cell) -> None:
    found = outcome(cell)
    assert found.kind == "equal", found
    if cell.case in WHOLE:
        assert found.parts == 1, "it is not known, so it runs as a whole"
    if cell.case.sums:
        assert found.parts > 1, "what is known runs in parts"
