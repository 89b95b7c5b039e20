"""What a run measures of itself: its device at the start, its curves while it trains, its losses in the bar."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.devices import EnergyCounter
from ..common.files import append_json_line, read_json_lines, write_text
from ..cost.budget import free_bytes
from ..cost.peak_meter import PeakMeter
from ..errors import NonFiniteError

_PROCESSORS = Path("/proc/cpuinfo")


class RunMetrics(TrainerCallback):  # type: ignore[misc]
    """Writes the curves of a run as JSON lines, and measures its time and energy, from when this object is made.

    Args:
        path: the file; a resumed run appends to it.
        meter: measures peaks in a run without RankPilotCallback, which measures them itself.
        energy: of the device; None where the hardware does not count it.

    Attributes:
        step_s: seconds of each step, those before a resumption included.
    """

    meter: PeakMeter | None
    path: Path
    energy: EnergyCounter | None

    def __init__(self, path: Path, meter: PeakMeter | None = None, energy: EnergyCounter | None = None) -> None:
        self.path, self.meter, self.energy = path, meter, energy
        self.step_s: list[float] = []
        self._written = 0
        self._evaluated: set[int] = set()
        self._started = 0.0
        self._made, self._before_s = time.perf_counter(), 0.0
        self._joules_made, self._before_joules = energy.joules() if energy else 0.0, 0.0

    @property
    def train_s(self) -> float:
        """Seconds that the run has taken, those before a resumption included."""
        return self._before_s + time.perf_counter() - self._made

    @property
    def energy_joules(self) -> float | None:
        """The energy that the device has taken meanwhile, before a resumption included; None if it is not counted."""
        return self._before_joules + self.energy.joules() - self._joules_made if self.energy else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Delete what an interrupted run wrote after its last checkpoint, and go on with its times."""
        rows = [row for row in read_json_lines(self.path) if 0 < row["step"] <= state.global_step]
        if self.meter is None:  # RankPilotCallback knows all peaks of the run, and they are written at its end
            rows = [row for row in rows if "peak_bytes" not in row]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.step_s = [seconds for row in rows for seconds in row.get("step_s", ())]
        self._written = len(self.step_s)
        self._before_s = max((row.get("train_s", 0.0) for row in rows), default=0.0)
        self._before_joules = max((row.get("energy_joules") or 0.0 for row in rows), default=0.0)
        if self.meter and state.global_step > 0:  # as in a run that nothing has interrupted
            self.meter.requested = False
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Start the clock, and measure this step if it is due."""
        if self.meter and self.meter.due(state.global_step):
            self.meter.begin(objects["model"], objects["optimizer"])
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Stop the clock, and write the peak if it was measured."""
        self.step_s.append(time.perf_counter() - self._started)
        peak = self.meter.end(state.global_step) if self.meter else None
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
        """Write losses, accuracies and times; one evaluation for each step.

        Raises:
            NonFiniteError: the gradient is NaN or infinite, and none is expected to be.
        """
        norm = (logs or {}).get("grad_norm", 0.0)
        # In float16 the scaler leaves such steps out, and lowers its factor.
        if not math.isfinite(float(norm)) and not args.fp16:
            raise NonFiniteError(
                f"The gradient norm is {norm} at step {state.global_step}: training diverged. Lower --learning-rate."
            )
        kept: dict[str, Any] = {
            key: float(value) for key, value in (logs or {}).items() if key in ("loss", "eval_loss", "eval_accuracy")
        }
        if "loss" in kept:
            kept |= {"step_s": self.step_s[self._written :], "train_s": self.train_s}
            kept |= {"energy_joules": self.energy_joules} if self.energy else {}
            self._written = len(self.step_s)
        elif kept and state.global_step in self._evaluated:
            return
        if "eval_loss" in kept:
            self._evaluated.add(state.global_step)
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


def hardware_facts(device: torch.device) -> dict[str, Any]:
    """Name of a device, the share of it that is busy, and its free and whole memory in bytes, as JSON values.

    The share is that of all cores over the last minute; of a GPU as the driver tells it, None where it does not.

    Args:
        device: where the run trains.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total, busy = properties.name, int(properties.total_memory), _busy_gpu(device)
    else:
        cores = psutil.cpu_count() or 1
        name, total = f"{_processor()}, {cores} cores", int(psutil.virtual_memory().total)
        busy = min(psutil.getloadavg()[0] / cores, 1.0)
    return {"device": name, "busy": busy, "free_bytes": free_bytes(device), "total_bytes": total}


def _busy_gpu(device: torch.device) -> float | None:
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # torch asks NVIDIA's library, which may be absent or refuse
        return None


def _processor() -> str:
    """The name of the processor, as Linux gives it; elsewhere its kind."""
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
