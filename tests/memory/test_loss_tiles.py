"""The tiles of TRL's fused loss are predicted as they are, also where a batch fills several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rankpilot.errors import UnsupportedError
from rankpilot.finetune.before_training import run_memory
from rankpilot.memory.batch_shape import BatchShape, reshaped
from rankpilot.memory.tiled_loss import loss_tokens, tile_tokens
from rankpilot.study.memory.config import MemoryConfig
from rankpilot.study.memory.measured_step import measure_step
from rankpilot.study.memory.setup import StepSetup, set_up

from ..cases import first_cases
from ..data.small_models import save

SIZE = 64


@pytest.mark.parametrize("small", [14, 30, 45, 510, 1022])
@pytest.mark.parametrize("whole", [16, 64, 65, 127, 128, 129, 4096])
def test_a_small_batch_has_as_many_tiles(small: int, whole: int) -> None:
    tile = tile_tokens(small, whole, SIZE)
    tiles = -(-whole // SIZE)
    if tiles == 1:
        assert tile == SIZE
    elif tiles <= small:
        assert -(-small // tile) == tiles or abs(tile - SIZE * small / whole) < 1
        assert abs(tile - SIZE * small / whole) <= 1


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """TRL's loss, with small tiles."""
    module = pytest.importorskip("trl.kernels.chunked_logprob")
    monkeypatch.setattr(module, "TOKEN_CHUNK_SIZE", SIZE)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 4096)
    return SimpleNamespace(module=module, forward=module.ChunkedLogProbFunction.forward)


def step_of(model: str, rows: int, length: int) -> StepSetup:
    return set_up(MemoryConfig(model, batch_size=rows, max_length=length, optimizer="sgd"), lambda text: None)


@pytest.mark.parametrize(("rows", "length"), first_cases(3, [(8, 17), (9, 17), (2, 64), (4, 17), (16, 17)]))
def test_the_peak_of_a_step(tmp_path: Path, fused: SimpleNamespace, rows: int, length: int) -> None:
    setup = step_of(save("llama", tmp_path / "llama"), rows, length)
    memory = setup.measure_memory()
    assert fused.module.TOKEN_CHUNK_SIZE == SIZE
    assert fused.module.ChunkedLogProbFunction.forward is fused.forward
    predicted = memory.at_peak(np.array([target.rank for target in setup.targets])).total
    assert 0.97 * predicted <= measure_step(setup).peak_bytes <= predicted
    for shape in (BatchShape(rows // 2, length), BatchShape(2 * rows, length)):
        if max(loss_tokens(shape), loss_tokens(memory.shape)) <= SIZE:
            assert memory.sizes(shape)
        else:
            with pytest.raises(UnsupportedError, match=f"cannot be predicted: .*tiles of {SIZE}|cannot be .* its data"):
                memory.sizes(shape)


def test_other_losses_have_no_tiles(tmp_path: Path, fused: SimpleNamespace) -> None:
    setup = set_up(MemoryConfig(save("bert", tmp_path / "bert"), batch_size=8, max_length=16), lambda text: None)
    assert run_memory(setup.run, setup.targets, reshaped(setup.batch, BatchShape(4, 16))).sizes(BatchShape(8, 16))
