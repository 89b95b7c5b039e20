"""Cards by name: what people and drivers call them, and what nobody does."""

from __future__ import annotations

import pytest
from rankpilot.common.errors import UnknownNameError
from rankpilot.cost.cards import UNKNOWN_CONTEXT_BYTES, device_table, find_device_spec


def test_cards_of_the_table_are_found_and_their_figures_are_possible():
    for name in device_table():
        spec = find_device_spec(name)
        assert spec.name == name, name
        assert 5 * 2**30 < spec.memory_bytes < 192 * 10**9, name
        assert 100 * 2**20 <= spec.context_bytes <= 710 * 2**20, name
        assert spec.capability is not None, name
        assert spec.rates is not None, name
        assert 1.6e11 <= spec.rates.bytes_per_s <= 8e12, name
        flops = spec.rates.flops_per_s
        assert flops["fp16"] > 1.5 * flops["fp32"] > 1e13, name
        assert spec.has_bf16 == ("bf16" in flops) == spec.has_flash_attention, name
        assert flops.get("bf16", flops["fp16"]) == flops["fp16"], name


def test_names_of_people_and_of_the_driver_are_understood():
    for given, name in [
        ("rtx 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("RTX5060ti 16gb", "RTX 5060 Ti 16GB"),
        ("4070tisuper", "RTX 4070 Ti SUPER"),
        ("4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("RTX 3060 12 GB", "RTX 3060 12GB"),
        ("4060", "RTX 4060"),
        ("rtxa6000", "RTX A6000"),
        ("RTX 5090 32G", "RTX 5090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("a100-80gb", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100 80 GiB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
    ]:
        assert find_device_spec(given).name == name, given


def test_other_names_are_refused():
    for given, says in [
        ("rtx 4095", "Did you mean: .*'RTX 4090'"),
        ("24,5GiB", "Cannot read the device memory"),
        ("999999999TiB", "exceeds any card"),
        ("RTX 4090 Laptop GPU", "Unknown device"),
        ("rtx4095", "Did you mean: .*'RTX 4090'"),
        ("RTX 2080 Ti", "Unknown device"),
        ("RTX 3060", "several cards: 'RTX 3060 8GB', 'RTX 3060 12GB'"),
        ("RTX 3060 Laptop GPU", "Unknown device"),
        ("rtx 6000", "several cards: 'RTX 6000 Ada', 'RTX PRO 6000'"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "Unknown device"),
        ("a100", "several cards: 'A100 40GB', 'A100 80GB'"),
        ("T4 80GB", "Unknown device"),
        ("", "Unknown device ''.* '24GiB'"),
        ("300MiB", "CUDA context"),
        ("0GiB", "Cannot read"),
        ("1.2.3GB", "Cannot read"),
    ]:
        with pytest.raises(UnknownNameError, match=says):
            find_device_spec(given)


def test_a_card_of_which_only_the_memory_is_known_has_no_rates():
    spec = find_device_spec("24 GiB")
    assert (spec.name, spec.memory_bytes, spec.context_bytes) == ("24 GiB", 24 * 2**30, UNKNOWN_CONTEXT_BYTES)
    assert (spec.capability, spec.rates, spec.has_bf16) == (None, None, True)
    assert find_device_spec("24564MiB").memory_bytes == 24564 * 2**20


def test_workspaces_are_larger_from_hopper_on():
    assert find_device_spec("H100").workspace_bytes == 64 * 2**20
    assert find_device_spec("T4").workspace_bytes == 2 * 8_519_680
