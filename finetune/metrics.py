"""Writes the curves of a run while it trains, and shows its losses in the progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.files import append_json_line, read_json_lines, write_text
from ..errors import NonFiniteError
from ..memory.peak_meter import PeakMeter


class RunMetrics(TrainerCallback):  # type: ignore[misc]
    """Writes the curves of a run as JSON lines, and times its steps.

    Args:
        path: the file; a resumed run appends to it.
        meter: measures peaks in a run without RankPilotCallback, which measures them itself.

    Attributes:
        step_s: seconds of each step since the start or the resumption of the run.
    """

    def __init__(self, path: Path, meter: PeakMeter | None = None) -> None:
        self.path, self.meter = path, meter
        self.step_s: list[float] = []
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Delete what an interrupted run wrote after its last checkpoint."""
        rows = [row for row in read_json_lines(self.path) if row["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows if state.global_step > 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Start the clock, and measure this step if it is due."""
        if self.meter and self.meter.due(state.global_step):
            self.meter.begin(objects["model"], objects["optimizer"])
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Note the peak of the forward and backward passes."""
        if self.meter:
            self.meter.stepping()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Stop the clock, and write the peak if it was measured."""
        self.step_s.append(time.perf_counter() - self._started)
        peak = self.meter.end(state.global_step, objects["model"]) if self.meter else None
        if peak is not None:
            append_json_line(self.path, {"step": state.global_step, "peak_bytes": peak})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        """Write losses and accuracies.

        Raises:
            NonFiniteError: the gradient is NaN or infinite.
        """
        norm = (logs or {}).get("grad_norm", 0.0)
        if not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"The gradient norm is {norm} at step {state.global_step}: training diverged. Lower --learning-rate."
            )
        kept = {key: float(v) for key, v in (logs or {}).items() if key in ("loss", "eval_loss", "eval_accuracy")}
        if kept:
            append_json_line(self.path, {"step": state.global_step, **kept})


class LossInProgressBar(ProgressCallback):  # type: ignore[misc]
    """The progress bar of the Trainer, which shows the latest losses instead of printing a line for each log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        """Show the latest losses."""
        if self.training_bar is not None and logs:
            shown = {key: f"{float(logs[key]):.4f}" for key in ("loss", "eval_loss") if key in logs}
            self.training_bar.set_postfix(shown, refresh=False)
