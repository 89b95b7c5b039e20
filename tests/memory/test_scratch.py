"""Scratch memory of CUDA kernels, counted where the meta device stands for CUDA and nowhere else."""

from __future__ import annotations

import pytest
import torch
from rankpilot.memory.hollow_device import HollowDevice, hollow_device
from rankpilot.memory.live_storages import LivePeak
from torch.nn import functional


def softmax_peak(kind: str) -> int:
    """Bytes at the peak of a softmax's backward pass, above the 4 KiB each of its input and output."""
    with hollow_device(HollowDevice(kind)):
        scores = torch.zeros(8, 128, requires_grad=True)
        output = scores.softmax(-1)
        with LivePeak() as live:
            output.backward(torch.zeros(8, 128))
    return live.peak


def test_the_backward_pass_of_softmax_takes_its_gradient_once_more_on_cuda():
    assert softmax_peak("cuda") - softmax_peak("cpu") == 4096


def attention_peak(keys: int, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> int:
    """Bytes at the peak of attention's backward pass, above inputs and output: 2 x 8 heads of 256 tokens."""
    with hollow_device(HollowDevice("cuda")):
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
        with hollow_device(HollowDevice(kind)):
            inputs = torch.zeros(64, 256, dtype=torch.bfloat16)
            codes, scales = torch.zeros(128 * 256 // 2, 1, dtype=torch.uint8), torch.zeros(128 * 256 // 64)
            with LivePeak() as live:
                torch.ops.bitsandbytes.gemm_4bit(inputs, codes, [128, 256], scales, 64, "nf4")
        sizes[kind] = live.peak
    assert sizes["cuda"] - sizes["cpu"] == 128 * 256 * 2
