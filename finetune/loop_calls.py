"""Notices a loop that leaves out one of the calls of a step, which would train on with less than was asked for."""

from __future__ import annotations

from ..errors import ConfigError

_MISSING = {
    "before_step": "`pilot.before_step(batch)`, so its peak is not measured and its batch not looked at: call it "
    "before the model sees the batches of the step",
    "before_optimizer_step": "`pilot.before_optimizer_step(loss)`, so its gradients are not seen: call it after "
    "`loss.backward()` and before `optimizer.step()`",
}
"""What a step lacks without a call, and where the call belongs."""


class LoopCalls:
    """Which calls of the optimiser step that is under way have been made; each may be made more than once."""

    def __init__(self) -> None:
        self._made: set[str] = set()

    def made(self, call: str) -> None:
        """Note a call, a key of `_MISSING`."""
        self._made.add(call)

    def end_step(self, step: int) -> None:
        """Begin the calls of the next step.

        Args:
            step: the number of the step that ends, for the error.

        Raises:
            ConfigError: a call of the step was left out.
        """
        missing = next((text for call, text in _MISSING.items() if call not in self._made), None)
        self._made.clear()
        if missing:
            raise ConfigError(f"Step {step} had no {missing}. `pilot.after_step()` follows both, once a step.")
