"""`rankpilot study`: what can be learned from logged runs. The first word may name a part; else it is the page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

PARTS = {
    "branch": "a fine-tune run once more with another plan from one step on",
    "off-policy": "what other policies would have gained in the runs of one that explored",
    "page": "a page about one or several runs, for a browser; what `rankpilot study RUN...` writes",
    "policy": "a page about a policy over a suite, from a comparison with --logs",
    "replay": "what another policy would have decided at the decisions of a run",
}
"""What each part does; the module that runs it has its name, with _ for -. A folder of that name is given as ./NAME."""


def main(arguments: Sequence[str]) -> int | None:
    """Run the part that the first word names, or else the page; returns the exit status."""
    part, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in PARTS else ("page", arguments)
    status: int | None = import_module(f".{part.replace('-', '_')}", __package__).main(rest)
    return status
