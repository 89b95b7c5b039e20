"""Published data of cards, by name: memory, rates, and CUDA's overhead.

A card's memory is the figure that CUDA reports, below the nominal size. It comes from `torch.cuda.mem_get_info` and
torch's "out of memory" errors. Newer drivers reserve more, so the lowest observed figure is used. The bytes of a CUDA
context come from such errors too: the process's memory outside torch's allocator. Cards without such an observation use
`UNKNOWN_CONTEXT_BYTES`. Rates are from data sheets, for dense products with fp32 accumulation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..common.errors import BudgetError, ConfigError, UnknownNameError, shown
from .budget import Budget
from .step_time import LAUNCH_SECONDS, Rates

_CARDS = Path(__file__).with_name("devices.json")


_MIB = 2**20


UNKNOWN_CONTEXT_BYTES = 500 * _MIB
"""Bytes of the CUDA context on a card without an observed figure."""


MOST_MEMORY = 2**50
"""Largest accepted memory of a device, in bytes."""


USUAL_CARD = "RTX 4090"
"""Card whose rates stand in when only the memory is known; times are then reported as shares."""

WORKSPACE_BYTES = 8_519_680
"""Bytes of cuBLAS workspace in the allocator per calling thread (its default `:4096:2:16:8`)."""


HOPPER_WORKSPACE_BYTES = 32 * _MIB
"""The same on data centre cards from Hopper on, compute capability 9 and 10."""

MOST_WORKSPACE_BYTES = 2 * HOPPER_WORKSPACE_BYTES
"""Maximum bytes of cuBLAS workspaces in torch's allocator: one per thread of two (Hopper; less on older cards)."""


_BRANDS = {"nvidia", "geforce", "tesla", "gpu"}


_FORMS = {"pcie", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"} | {
    *("generation", "blackwell", "workstation", "server", "edition"),
}
"""Words for a card's form factor in driver names; they only count if the table lists them for a card."""


@dataclass(frozen=True)
class DeviceRates:
    """Published peak rates of a card.

    Attributes:
        bytes_per_s: memory bandwidth, reads and writes.
        flops_per_s: floating-point operations of dense products by dtype, such as "bf16"; a multiply-add counts as two.
            A precision without hardware support is missing.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]


@dataclass(frozen=True)
class DeviceSpec:
    """A card.

    Attributes:
        name: name in the table; the given text ("24GiB") if only the memory is known.
        memory_bytes: the card's memory as CUDA reports it.
        context_bytes: bytes of a CUDA context, outside torch's allocator.
        capability: compute capability, such as (8, 9); None if only the memory is known.
        rates: published rates; None if only the memory is known.
    """

    name: str
    memory_bytes: int
    context_bytes: int
    capability: tuple[int, int] | None = None
    rates: DeviceRates | None = None

    @property
    def has_bf16(self) -> bool:
        """True if the card computes in bfloat16 (Ampere and later); assumed if only the memory is known."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """True if torch has flash attention for the card (Ampere and later); see `has_bf16`."""
        return self.has_bf16

    @property
    def bus_bytes_per_s(self) -> float:
        """One-way rate of 16 bus lanes (PCI Express 3, 4 from Ampere, 5 from Hopper on); 4 if not known."""
        major = 8 if self.capability is None else self.capability[0]
        return 15.75e9 * (1 if major < 8 else 2 if major == 8 else 4)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of cuBLAS workspaces in the allocator: one each for the forward and the backward thread."""
        large = self.capability is None or self.capability[0] in (9, 10)
        return 2 * (HOPPER_WORKSPACE_BYTES if large else WORKSPACE_BYTES)


@cache
def device_table() -> dict[str, DeviceSpec]:
    """Return the cards of the table by name."""
    return {name: _spec(name, row) for name, row in _rows().items()}


def find_device_spec(name: str) -> DeviceSpec:
    """Find a card by its name, or create one from its memory alone.

    Args:
        name: "RTX 4090", "4060ti 16gb" or the driver's name ("NVIDIA A100-SXM4-80GB"); "24GiB" is a card with only its
            memory known, all of it available to programs.

    Raises:
        UnknownNameError: no card of the table has this name, or several have.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A card must be its name or its memory ('RTX 4090', '24GiB'); got {shown(name)}.")
    if re.match(r"\s*-?[0-9.,_]+\s*[kmgt]i?b\s*$", name, re.IGNORECASE):
        return _of_memory(name)
    spelled = re.sub(r"(?<=[\s-])(\d+)\s*gi?b?\b", r"\1gb", name.lower().strip())
    spelled = re.sub(r"(rtx|\d{4}|ti)(?=a?\d{4}|ti|super)", r"\1 ", spelled)  # "rtx4090", "4070tisuper"
    words = set(re.findall(r"[a-z0-9]+", spelled))
    words -= _BRANDS
    distances: dict[str, int] = {}
    for card, row in _rows().items():
        own = {*card.lower().split(), f"{row['nominal_gb']}gb"}
        if words & own and words <= own | _FORMS:
            distances[card] = len(words ^ own)
    nearest = [card for card, distance in distances.items() if distance == min(distances.values())]
    if len(nearest) == 1:
        return device_table()[nearest[0]]
    number = re.fullmatch(r"([0-9.]+)\s*g?", name.strip(), re.IGNORECASE)
    if number and not nearest:
        raise UnknownNameError(f"The memory of a device needs a unit; got {name!r}. Did you mean '{number[1]}GiB'?")
    hint = "The card's memory alone also works, such as '24GiB'."
    if nearest:
        raise UnknownNameError(f"{name!r} matches several cards: {', '.join(map(repr, nearest))}. Choose one of them.")
    raise UnknownNameError.of("device", name, device_table(), hint)


def _of_memory(given: str) -> DeviceSpec:
    try:
        memory = int(Budget.parse(given).value)
    except BudgetError as error:
        raise UnknownNameError(
            f"Cannot read the device memory {given!r}. Write it as '24GiB' or '24564MiB'."
        ) from error
    if not UNKNOWN_CONTEXT_BYTES < memory <= MOST_MEMORY:
        small = f"cannot hold even the CUDA context, {UNKNOWN_CONTEXT_BYTES // _MIB} MiB"
        why = small if memory <= MOST_MEMORY else "exceeds any card"
        raise UnknownNameError(f"A device memory of {shown(given)} {why}. Pass its memory as '24GiB', or its name.")
    return DeviceSpec(given.strip(), memory, UNKNOWN_CONTEXT_BYTES)


@cache
def _rows() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(_CARDS.read_text())
    return rows


def _spec(name: str, row: dict[str, Any]) -> DeviceSpec:
    return DeviceSpec(
        name,
        row["memory_mib"] * _MIB,
        row["context_mib"] * _MIB,
        (row["capability"][0], row["capability"][1]),
        DeviceRates(row["gb_per_s"] * 1e9, {precision: rate * 1e12 for precision, rate in row["tflops"].items()}),
    )


REACHED_BYTES, REACHED_SHARE = 0.83e12, 0.41
"""Bytes per second that the operators of a step reach on any card with a higher published rate, and the least share of
the published rate that they reach while matrix products reach theirs (benchmarks/EXPERIMENTS.md).
"""


def card_rates(rates: DeviceRates, dtype: str) -> Rates:
    """Return a card's rates for a frozen model of this dtype; falls back to the fp32 rate for products."""
    products = rates.flops_per_s.get(dtype, rates.flops_per_s["fp32"])  # torch leaves TF32 off
    moved = max(REACHED_SHARE * rates.bytes_per_s, min(rates.bytes_per_s, REACHED_BYTES))
    return Rates(products, moved, launch_seconds=LAUNCH_SECONDS)
