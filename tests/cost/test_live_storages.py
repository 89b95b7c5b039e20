"""Bytes of live tensors, on code whose bytes are counted by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from rankpilot.cost.record.device_on_meta import DeviceOnMeta, device_on_meta
from rankpilot.cost.record.live_storages import LivePeak, LiveStorages, storages
from torch.nn import functional

from .measured import allocated_peak

KIB = 1024


def kib(count: int = 1) -> torch.Tensor:
    """A tensor of `count` KiB of fp32."""
    return torch.zeros(256 * count)


def test_the_peak_is_the_highest_sum_of_what_lives_together():
    with LivePeak() as live:
        first = kib(3)
        del first
        second, third = kib(1), kib(1)
        assert (live.bytes, live.peak) == (2 * KIB, 3 * KIB)
        fourth = kib(2)
    assert (live.bytes, live.peak) == (4 * KIB, 4 * KIB)
    assert len(second) + len(third) + len(fourth) == 4 * 256


def test_tensors_from_before_count_neither_when_used_nor_when_freed():
    before = kib(5)
    with LivePeak() as live:
        view = before[:10]
        del before
        before = view
        del view, before
    assert (live.bytes, live.peak) == (0, 0)


def test_views_share_the_bytes_of_their_base_and_keep_it():
    with LivePeak() as live:
        base = kib(4)
        part = base.view(2, -1)[0]
        assert live.bytes == 4 * KIB
        del base
        assert live.bytes == 4 * KIB
        del part
        assert live.bytes == 0


def test_operators_in_place_or_with_a_given_result_make_nothing():
    given, other = kib(1), kib(1)
    with LivePeak() as live:
        given.add_(1).mul_(2)
        torch.add(given, other, out=given)
        torch._foreach_add_([given, other], 1.0)
    assert live.peak == 0
    assert given[0] == 3


def test_several_results_of_one_operator_all_count():
    with LivePeak() as live:
        values, indices = torch.sort(torch.arange(256.0))
        assert live.bytes == 256 * (4 + 8)
    del values, indices
    assert live.bytes == 0


def test_scalars_and_empty_tensors_are_told_apart():
    with LivePeak() as live:
        held = [torch.empty(0) for _ in range(3)] + [torch.zeros(())]
        assert live.bytes == 4
        assert len({tensor.untyped_storage()._cdata for tensor in held}) == 4
    held.clear()
    assert live.bytes == 0


def test_an_address_that_is_used_again_counts_again():
    addresses = set()
    with LivePeak() as live:
        for _ in range(50):
            tensor = kib(1)
            addresses.add(tensor.data_ptr())
            del tensor
        assert (live.bytes, live.peak) == (0, KIB)
    assert len(addresses) < 50


def test_outside_of_the_context_it_is_seen_only_what_is_freed():
    live, kept = LivePeak(), [kib(1)]
    with live:
        inside = kib(1)
    kept.append(kib(2))
    assert (live.bytes, live.peak) == (KIB, KIB)
    del inside
    assert live.bytes == 0


def test_an_error_inside_closes_the_context():
    live = LivePeak()
    kept = []

    def fail() -> None:
        with live:
            kept.append(kib(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    kept.append(kib(1))
    assert live.bytes == KIB
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_operator_that_fails_makes_nothing():
    with LivePeak() as live:
        with pytest.raises(RuntimeError):
            torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))
        assert live.bytes == 0


class Pair(torch.Tensor):
    """A tensor made of two others, like a quantised weight."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.clone.default:
            return cls(arguments[0].codes.clone(), arguments[0].scales.clone())
        raise NotImplementedError


def test_the_parts_of_tensor_subclasses_are_what_counts():
    pair = Pair(torch.zeros(512, dtype=torch.uint8), torch.zeros(128))
    assert [storage.nbytes() for storage in storages([pair])] == [512, 512]
    nested = Pair(torch.zeros(64), pair)
    assert [storage.nbytes() for storage in storages([nested])] == [256, 512, 512]
    with LivePeak() as live:
        copy = pair.clone()
        assert live.bytes == KIB
        del copy
        assert live.bytes == 0


def test_serial_numbers_are_given_in_the_order_of_creation():
    born: list[tuple[int, int]] = []
    freed: list[int] = []
    before = kib(1)
    live = LiveStorages(lambda serial, size: born.append((serial, size)), freed.append)
    with live:
        first, second = kib(1), kib(2)
        sum_ = before + first
        view = second[:3]
    assert born == [(0, KIB), (1, 2 * KIB), (2, KIB)]
    assert [live.serial(tensor) for tensor in (first, second, sum_, view, before)] == [0, 1, 2, 1, None]
    assert (live.count, live.now >= 4) == (3, True)
    del second
    assert freed == []
    del view, first
    gc.collect()
    assert freed == [1, 0]


def test_live_bytes_of_a_step_are_what_torchs_profiler_sees_allocated():
    """The profiler sees scratch memory of operators too, so its peak can only be higher."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    inputs = torch.randn(128, 64)

    def step() -> None:
        model(inputs).logsumexp(-1).sum().backward()
        model.zero_grad(set_to_none=True)

    step()
    with LivePeak() as live:
        step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert live.bytes == 0
    assert live.peak <= allocated_peak(profile) <= 1.1 * live.peak


def softmax_peak(kind: str) -> int:
    """Bytes at the peak of a softmax's backward pass, above the 4 KiB each of its input and output."""
    with device_on_meta(DeviceOnMeta(kind)):
        scores = torch.zeros(8, 128, requires_grad=True)
        output = scores.softmax(-1)
        with LivePeak() as live:
            output.backward(torch.zeros(8, 128))
    return live.peak


def test_the_backward_pass_of_softmax_takes_its_gradient_once_more_on_cuda():
    assert softmax_peak("cuda") - softmax_peak("cpu") == 4096


def attention_peak(keys: int, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> int:
    """Bytes at the peak of attention's backward pass, above inputs and output: 2 x 8 heads of 256 tokens."""
    with device_on_meta(DeviceOnMeta("cuda")):
        query = torch.zeros(2, 8, 256, width, dtype=dtype, requires_grad=True)
        key, value = (torch.zeros(2, keys, 256, width, dtype=dtype, requires_grad=True) for _ in range(2))
        output = functional.scaled_dot_product_attention(query, key, value, enable_gqa=keys != 8)
        gradient = torch.zeros_like(output)
        with LivePeak() as live:
            torch.autograd.grad(output, (query, key, value), gradient)
    return live.peak


def test_flash_attention_sums_up_in_single_precision():
    tokens, half = 2 * 8 * 256, 2
    gradients = 3 * tokens * 64 * half
    sums = 4 * tokens * (64 + 1)
    assert attention_peak(8) == gradients + sums
    # With two heads of keys their gradients are four times smaller, and those of each head of the query are scratch.
    assert attention_peak(2) == gradients // 2 + sums + 2 * tokens * 64 * half


def test_the_efficient_kernel_sums_up_only_in_half_precision():
    tokens = 2 * 8 * 256
    assert attention_peak(8, torch.float32) == 3 * tokens * 64 * 4
    assert attention_peak(8, torch.float16, width=320) > 3 * tokens * 320 * 2 + 4 * tokens * 320


def test_a_product_with_four_bit_weights_makes_them_whole():
    pytest.importorskip("bitsandbytes")
    sizes = {}
    for kind in ("cpu", "cuda"):
        with device_on_meta(DeviceOnMeta(kind)):
            inputs = torch.zeros(64, 256, dtype=torch.bfloat16)
            codes, scales = torch.zeros(128 * 256 // 2, 1, dtype=torch.uint8), torch.zeros(128 * 256 // 64)
            with LivePeak() as live:
                torch.ops.bitsandbytes.gemm_4bit(inputs, codes, [128, 256], scales, 64, "nf4")
        sizes[kind] = live.peak
    assert sizes["cuda"] - sizes["cpu"] == 128 * 256 * 2
