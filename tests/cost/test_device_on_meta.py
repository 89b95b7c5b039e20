"""What the meta device does where it stands for another device."""

from __future__ import annotations

import pytest
import torch
from rankpilot.cost.record.device_on_meta import (
    LOWER,
    WIDEST,
    WITH_DTYPE,
    DeviceOnMeta,
    autocast_on_meta,
    device_on_meta,
    operators,
)
from rankpilot.cost.record.live_storages import device_kind
from torch import nn
from torch.nn import functional


def attention_of(
    device: DeviceOnMeta, dtype: torch.dtype, *, mask: bool = False, keys: int = 4, width: int = 16, narrower: int = 0
) -> str:
    """The name of the kernel that attention's backward pass belongs to."""
    with device_on_meta(device):
        query = torch.zeros(2, 4, 8, width, dtype=dtype, requires_grad=True)
        key = torch.zeros(2, keys, 8, width, dtype=dtype)
        seen = torch.ones(2, 1, 8, 8, dtype=torch.bool) if mask else None
        value = key[..., : width - narrower]
        output = functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=keys != 4)
        assert output.shape == (2, 4, 8, width - narrower)
        return output.grad_fn.name()


CUDA, TURING, CPU = DeviceOnMeta("cuda"), DeviceOnMeta("cuda", "efficient"), DeviceOnMeta("cpu")
FLASH, EFFICIENT = "ScaledDotProductFlashAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0"


@pytest.mark.parametrize(
    ("device", "dtype", "options", "kernel"),
    [
        (CUDA, torch.bfloat16, {}, FLASH),
        (CUDA, torch.bfloat16, {"keys": 2}, FLASH),
        (CUDA, torch.bfloat16, {"mask": True}, EFFICIENT),
        (CUDA, torch.float32, {}, EFFICIENT),
        (CUDA, torch.bfloat16, {"width": 320}, EFFICIENT),
        (CUDA, torch.bfloat16, {"narrower": 8}, EFFICIENT),
        (TURING, torch.float16, {}, EFFICIENT),
        (TURING, torch.float16, {"keys": 2}, EFFICIENT),
        (CPU, torch.float32, {}, "ScaledDotProductFlashAttentionForCpuBackward0"),
        (CPU, torch.float32, {"mask": True}, "ScaledDotProductFlashAttentionForCpuBackward0"),
    ],
)
def test_attention_takes_the_kernel_that_the_device_would(device, dtype, options, kernel):
    assert attention_of(device, dtype, **options) == kernel


def test_without_fused_kernels_scores_are_made():
    assert "ScaledDotProduct" not in attention_of(DeviceOnMeta("cuda", "math"), torch.bfloat16)


def test_the_cpu_has_no_fused_kernel_for_values_of_another_width():
    assert "ScaledDotProduct" not in attention_of(CPU, torch.float32, narrower=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_experts_have_one_size_whoever_takes_them(dtype):
    with device_on_meta(CUDA):
        rows = torch.zeros(6, 16, dtype=dtype, requires_grad=True)
        ends = torch.zeros(4, dtype=torch.int32)
        output = functional.grouped_mm(rows, torch.zeros(4, 16, 24, dtype=dtype), offs=ends)
        output.square().sum().backward()
    assert (output.shape, output.dtype, rows.grad.shape) == ((6, 24), dtype, (6, 16))


def test_numbers_are_answered_by_whether_there_is_padding():
    for padded in (False, True):
        with device_on_meta(DeviceOnMeta("cpu", padded=padded)):
            mask = torch.ones(2, 3, dtype=torch.long)
            assert bool(mask.all()) is not padded
            assert torch.equal(mask, mask) is not padded
            assert mask.sum().item() == 1
            assert torch.tensor(7, device="cpu").item() == 7


@pytest.mark.parametrize(("kind", "node"), [("cuda", "NativeDropoutBackward0"), ("cpu", "MulBackward0")])
def test_dropout_is_fused_on_cuda(kind, node):
    with device_on_meta(DeviceOnMeta(kind)):
        assert functional.dropout(torch.zeros(4, requires_grad=True), 0.5).grad_fn.name() == node


def test_cuda_reads_halves_in_softmax_without_a_copy():
    def reads(kind: str, dtype: torch.dtype) -> str:
        with device_on_meta(DeviceOnMeta(kind)):
            scores = torch.zeros(4, 4, dtype=dtype, requires_grad=True)
            return functional.softmax(scores, -1, dtype=torch.float32).grad_fn.next_functions[0][0].name()

    assert reads("cuda", torch.float16).endswith("AccumulateGrad")
    assert reads("cuda", torch.bfloat16) == reads("cpu", torch.float16) == "ToCopyBackward0"


def test_autocast_follows_the_lists_of_the_device():
    for kind, softmax in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with device_on_meta(DeviceOnMeta(kind)):
            layer = nn.Linear(4, 4)
            with autocast_on_meta(torch.bfloat16):
                hidden = layer(torch.zeros(2, 4))
                assert hidden.dtype == torch.bfloat16
                assert hidden.softmax(-1).dtype == softmax
                assert functional.mse_loss(hidden, hidden).dtype == torch.float32
                assert torch.einsum("ij,kj->ik", torch.zeros(2, 4), torch.zeros(2, 4)).dtype == torch.bfloat16
            assert layer(torch.zeros(2, 4)).dtype == torch.float32


def test_a_weight_that_trains_is_cast_once_in_a_forward_pass():
    with device_on_meta(DeviceOnMeta("cuda")):
        layer, inputs = nn.Linear(4, 4, bias=False), torch.zeros(2, 4)
        with autocast_on_meta(torch.bfloat16):
            first, second = layer(inputs), layer(inputs)
        casts = [output.grad_fn.next_functions[1][0].next_functions[0][0] for output in (first, second)]
        assert casts[0] is casts[1]


def test_lists_name_operators_of_the_installed_torch():
    known = operators("cpu") | operators("cuda")
    assert {"linear", "matmul", "bmm", "scaled_dot_product_attention"} <= LOWER & operators("cpu") & operators("cuda")
    assert known >= (LOWER | WITH_DTYPE | WIDEST) - {"convolution", "linalg_vecdot"}


def test_nothing_is_changed_outside_of_the_context():
    with device_on_meta(CUDA):
        assert device_kind(torch.zeros(1)) == "cuda"
    assert torch.zeros(1).device.type == "cpu"
    assert device_kind(torch.empty(1, device="meta")) == "cpu"
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device="meta").item()
    with pytest.raises(KeyError, match="inside"), device_on_meta(CUDA):
        raise KeyError("inside")
    assert torch.zeros(1).device.type == "cpu"
