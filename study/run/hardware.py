"""What a run was measured on: its device, how free that was at the start, and who counted its energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...common.units import format_bytes

NOT_MEASURED = 'not measured: no counter can be read (on NVIDIA: pip install -e ".[energy]")'


def hardware_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Device and energy in words, by name; empty for runs before 0.2.

    Args:
        result: of one run, as `summary.json` has it.
    """
    facts = result.get("hardware")
    if not facts:
        return {}
    busy = "" if facts.get("busy") is None else f", {facts['busy']:.0%} busy"
    free, total = (format_bytes(facts.get(name) or 0) for name in ("free_bytes", "total_bytes"))
    return {
        "device": f"{facts.get('device')}; at the start {free} of {total} free{busy}",
        "energy": result.get("energy_source") or NOT_MEASURED,
    }
