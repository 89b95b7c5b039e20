"""What is published of cards, by name: memory, rates, and what CUDA takes of it.

A card's memory is what CUDA reports to a program, less than the size on the box: `torch.cuda.mem_get_info` tells it,
and torch's "out of memory" errors do. Newer drivers keep more for themselves, so the lowest figure seen counts. The
bytes of a CUDA context are those that such errors show as held by the process beside torch's allocator; a card of which
none was seen has `UNKNOWN_CONTEXT_BYTES`. Rates are those of data sheets for dense products with sums in fp32.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BudgetError, ConfigError, UnknownNameError, shown
from .budget import Budget

_CARDS = Path(__file__).with_name("devices.json")


_MIB = 2**20


UNKNOWN_CONTEXT_BYTES = 500 * _MIB
"""Bytes of the CUDA context of a card of which no error has shown them."""


MOST_MEMORY = 2**50
"""The largest memory of a device that is taken, in bytes."""


USUAL_CARD = "RTX 4090"
"""Times on a card of which only the memory is known are by the rates of this one. They are told as shares."""

WORKSPACE_BYTES = 8_519_680
"""What cuBLAS takes through the allocator for each thread that calls it (its default `:4096:2:16:8`)."""


HOPPER_WORKSPACE_BYTES = 32 * _MIB
"""The same on data centres' cards from Hopper on, compute capability 9 and 10."""


_BRANDS = {"nvidia", "geforce", "tesla", "gpu"}


_FORMS = {"pcie", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"} | {
    *("generation", "blackwell", "workstation", "server", "edition"),
}
"""Words of the driver's names that say how a card is built; they count only where a card of the table has them."""


@dataclass(frozen=True)
class DeviceRates:
    """What a card does in a second at best, as published.

    Attributes:
        bytes_per_s: reads and writes of its memory.
        flops_per_s: by dtype, as in "bf16", floating-point operations of dense products, two for product and sum. A
            precision that the card has no units for is missing.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]


@dataclass(frozen=True)
class DeviceSpec:
    """A card.

    Attributes:
        name: as in the table; what was given ("24GiB") for a card of which only the memory is known.
        memory_bytes: what CUDA reports to programs as the card's memory.
        context_bytes: what a CUDA context takes of it, beside torch's allocator.
        capability: compute capability, such as (8, 9); None if only the memory is known.
        rates: as published; None if only the memory is known.
    """

    name: str
    memory_bytes: int
    context_bytes: int
    capability: tuple[int, int] | None = None
    rates: DeviceRates | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16 (Ampere and later); taken to be so where only the memory is known."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """Whether torch has flash attention for it (Ampere and later); see `has_bf16`."""
        return self.has_bf16

    @property
    def bus_bytes_per_s(self) -> float:
        """What 16 lanes of its bus (PCI Express 3, 4 from Ampere, 5 from Hopper on) move one way; 4 if not known."""
        major = 8 if self.capability is None else self.capability[0]
        return 15.75e9 * (1 if major < 8 else 2 if major == 8 else 4)

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS takes through the allocator: a workspace each for the forward and the backward pass's thread."""
        large = self.capability is None or self.capability[0] in (9, 10)
        return 2 * (HOPPER_WORKSPACE_BYTES if large else WORKSPACE_BYTES)


@cache
def device_table() -> dict[str, DeviceSpec]:
    """The cards of the table by name."""
    return {name: _spec(name, row) for name, row in _rows().items()}


def find_device_spec(name: str) -> DeviceSpec:
    """A card by its name, or by its memory alone.

    Args:
        name: "RTX 4090", "4060ti 16gb" or what the driver calls it ("NVIDIA A100-SXM4-80GB"); "24GiB" is a card of
            which only the memory is known, all of which CUDA reports to programs.

    Raises:
        UnknownNameError: no card of the table has this name, or several have.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A card is its name or its memory ('RTX 4090', '24GiB'); got {shown(name)}.")
    if re.match(r"\s*[0-9.,_]+\s*[kmgt]i?b\s*$", name, re.IGNORECASE):
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
    hint = "The card's memory alone, as in '24GiB', works too."
    if nearest:
        raise UnknownNameError(f"{name!r} stands for several cards: {', '.join(map(repr, nearest))}. Give one of them.")
    raise UnknownNameError.of("device", name, device_table(), hint)


def _of_memory(given: str) -> DeviceSpec:
    try:
        memory = int(Budget.parse(given).value)
    except BudgetError as error:
        raise UnknownNameError(f"Cannot read the device memory {given!r}. Give it as '24GiB' or '24564MiB'.") from error
    if not UNKNOWN_CONTEXT_BYTES < memory <= MOST_MEMORY:
        small = f"would not hold the CUDA context, {UNKNOWN_CONTEXT_BYTES // _MIB} MiB"
        why = small if memory <= MOST_MEMORY else "is larger than any"
        raise UnknownNameError(f"A device of {shown(given)} {why}. Give its memory as '24GiB', or its name.")
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
