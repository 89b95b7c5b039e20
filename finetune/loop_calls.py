"""Notices a loop that leaves out one of the calls of a step, or makes them at other times than once an optimizer step.

Such a loop would train on with less than was asked for. What the optimizer does is seen by a hook on its steps.
"""

import logging

from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError
from ..lora.optimizer_state import unwrap_optimizer
from .run import TrainingRun

logger = logging.getLogger(__name__)

_MISSING = {
    "before_step": "`pilot.before_step(batch)`, so its peak is not measured and its batch not looked at: call it "
    "before the model sees the batches of the step",
    "before_optimizer_step": "`pilot.before_optimizer_step(loss)`, so its gradients are not seen: call it after "
    "`loss.backward()` and before `optimizer.step()`",
}
"""What a step lacks without a call, and where the call belongs."""


class LoopCalls:
    """Which calls of the optimizer step that is under way have been made; each may be made more than once."""

    def __init__(self) -> None:
        self._made: set[str] = set()
        self._called = False  # since the run began
        self._over = False
        self._optimizer_steps = 0  # since the latest end of a step
        self._without = 0  # ends of steps since the optimizer's latest one
        self._uneven = 0  # steps of the optimizer in a row that had more than one end
        self._hook: RemovableHandle | None = None

    def begin(self, run: TrainingRun) -> None:
        """Begin to count the steps of a run's optimizer."""
        self._total, self._warns = run.total_steps, run.replicas.processes.first
        inner = unwrap_optimizer(run.optimizer)
        self._hook = inner.register_step_post_hook(lambda *_: self._stepped())

    def finish(self) -> None:
        """Stop counting them."""
        if self._hook:
            self._hook.remove()
            self._over = True
        self._hook = None

    def made(self, call: str) -> None:
        """Note a call, a key of `_MISSING`.

        Raises:
            ConfigError: the run is over, or the optimizer has made several steps, and none was told to have ended.
        """
        if self._over:
            raise ConfigError(
                f"`pilot.{call}` was called after the run's `finish`, from which on nothing is measured: call `begin` "
                "again, or `rankpilot.load_checkpoint`, and `finish` after the last step."
            )
        self._called = True
        self._made.add(call)
        if self._optimizer_steps > 1:
            raise ConfigError(
                f"The optimizer has made {self._optimizer_steps} steps since the last `pilot.after_step()`, so no peak "
                "is compared with the budget and no later plan is made: call it once after each `optimizer.step()`."
            )

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
        if self._hook is None:
            return
        if step == self._total + 1:
            self._warn(
                f"Step {step} ends in a run of total_steps={self._total}, by which its plans were timed. Give "
                "TrainingRun the number of steps that the optimizer makes, and make the calls once for each."
            )
        self._count()

    def _count(self) -> None:
        """Notice calls that are made once a batch, where several batches make a step."""
        if not self._optimizer_steps:  # a scaler of losses may leave one out now and then
            self._without += 1
            return
        self._uneven = self._uneven + 1 if self._without else 0
        if self._uneven == 2:
            batches = self._without + 1
            self._warn(
                f"`pilot.after_step()` was called {batches} times for one step of the optimizer, again and again. With "
                "accumulation make the calls once for each optimizer step, with all of its batches in `before_step`, "
                f"and give TrainingRun accumulation={batches}."
            )
        self._optimizer_steps = self._without = 0

    def _stepped(self) -> None:
        self._optimizer_steps += 1
        if self._optimizer_steps == 2 and not self._called:
            self._warn(
                "The optimizer has made 2 steps, and no call was made since `pilot.begin(run)`: the first plan stays. "
                "Call `pilot.before_step(batch)`, `pilot.before_optimizer_step(loss)` and `pilot.after_step()` in each "
                "step, or `pilot.finish()` now."
            )

    def _warn(self, text: str) -> None:
        if self._warns:
            logger.warning("%s", text)
