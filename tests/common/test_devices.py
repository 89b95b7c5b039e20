import pytest
import torch
from rankpilot.common.devices import find_device
from rankpilot.errors import ConfigError


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda:99", "bogus", ""])
def test_absent_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"No device '{name}' is at hand. Use cpu"):
        find_device(name)
