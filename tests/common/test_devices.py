"""Which device is at hand; what hardware counts, and that nothing is told where it counts nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rankpilot.common.devices import find_device, find_energy_counter
from rankpilot.common.errors import ConfigError

CPU = torch.device("cpu")


def package(powercap: Path, number: int, energy: int, most: int = 1_000_000) -> Path:
    """The folder of a processor's counter, in millionths of a joule."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder / "energy_uj"


def test_processors_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    files = [package(tmp_path, number, 100_000) for number in range(2)]
    (tmp_path / "intel-rapl:0:0").mkdir()
    counter = find_energy_counter(CPU, tmp_path)
    assert counter is not None
    assert counter.source == "2 processors, measured by RAPL"
    assert counter.joules() == 0.0
    files[0].write_text("400000\n")
    files[1].write_text("200000\n")
    assert counter.joules() == pytest.approx(0.4)


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    file = package(tmp_path, 0, 900_000, most=999_999)
    counter = find_energy_counter(CPU, tmp_path)
    assert counter is not None
    told = []
    for value in (950_000, 50_000, 600_000, 100_000):
        file.write_text(str(value))
        told.append(counter.joules())
    assert told == pytest.approx([0.05, 0.15, 0.7, 1.2])


@pytest.mark.parametrize("content", [None, "", "no number"])
def test_nothing_is_told_where_nothing_can_be_read(tmp_path: Path, content: str | None) -> None:
    file = package(tmp_path, 0, 5)
    if content is None:
        file.unlink()
        file.mkdir()  # reading it fails, for root as well
    else:
        file.write_text(content)
    assert find_energy_counter(CPU, tmp_path) is None
    assert find_energy_counter(CPU, tmp_path / "nowhere") is None


class Counting:
    """NVIDIA's library with one GPU, as far as it is asked."""

    def __init__(self, *, counts: bool = True) -> None:
        self.counts, self.millijoules = counts, 5_000

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-123-abc"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counts:
            raise RuntimeError("Not Supported")
        return self.millijoules


def counter_of_gpu(monkeypatch: pytest.MonkeyPatch, library: Any) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = SimpleNamespace(uuid="123-abc", name="H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return find_energy_counter(torch.device("cuda"))


def test_a_gpu_by_its_own_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Counting()
    counter = counter_of_gpu(monkeypatch, library)
    assert counter.source == "H100, measured by NVML"
    before = counter.joules()
    library.millijoules += 1_500
    assert counter.joules() - before == pytest.approx(1.5)


def test_a_gpu_that_does_not_count_or_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counter_of_gpu(monkeypatch, Counting(counts=False)) is None
    assert counter_of_gpu(monkeypatch, None) is None  # `import pynvml` fails


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu() -> None:
    pytest.importorskip("pynvml")
    counter = find_energy_counter(torch.device("cuda", torch.cuda.current_device()))
    assert counter is not None
    before = counter.joules()
    matrix = torch.ones(4096, 4096, device="cuda")
    for _ in range(300):
        matrix = matrix @ matrix / 4096
    torch.cuda.synchronize()
    assert counter.joules() > before


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda:99", "bogus", ""])
def test_absent_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Device '{name}' is not available. Use cpu"):
        find_device(name)
