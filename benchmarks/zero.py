"""`python -m benchmarks zero`: a LoRA step under DeepSpeed's ZeRO, predicted and measured on one rank of several.

torch's fake process group stands for the other ranks, and the profiler counts all bytes of the CPU's allocator. It
needs `pip install deepspeed`, which the package does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import UnsupportedError
from rankpilot.common.text import make_table
from rankpilot.cost.cost import moment_costs
from rankpilot.cost.forecast.configured_step import REDUCE_BUCKET_BYTES, LoadedAs, Shards
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from rich.console import Console

from .harness import Figures, with_progress

ROWS, LENGTH = 4, 128


@dataclass(frozen=True)
class Case:
    """A step of a small Llama in 16 bits, with adapters on all linear layers.

    Attributes:
        stage: of ZeRO, 2 or 3.
        checkpointed: whether all layers are.
        rank: of the adapters.
        cards: number of ranks.
    """

    stage: int
    checkpointed: bool
    rank: int = 8
    cards: int = 4

    @property
    def config(self) -> Any:
        """The model's."""
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}
        return t.LlamaConfig(**sizes, vocab_size=4096, max_position_embeddings=256, use_cache=False)


CASES = tuple(Case(stage, again, rank) for stage in (2, 3) for again in (True, False) for rank in (8, 32))


@dataclass(frozen=True)
class Options:
    """Measure ZeRO-2 and -3 on the CPU, with the settings that transformers fills in for "auto".

    Attributes:
        quick: two of the eight steps.
        json: also write the figures to this file.
    """

    quick: bool = False
    json: Path | None = None


def predicted_bytes(case: Case) -> float:
    """What one rank holds at the peak of a step; of ZeRO-2, with the bucket of these cases."""
    settings = StepConfig(
        batch_size=ROWS, max_length=LENGTH, gradient_checkpointing=case.checkpointed, exact_savers=False, bf16=True
    )
    step = from_config(case.config, settings, LoadedAs(device="cpu", dtype=torch.bfloat16))
    shared = Shards(case.cards, "zero2" if case.stage == 2 else "zero3").of(step)
    ranks = np.full(len(step.targets), case.rank)
    peak = float(moment_costs(shared.memory.cost(BatchShape(ROWS, LENGTH)), ranks).max()) + shared.model.frozen_bytes
    return peak - (REDUCE_BUCKET_BYTES - 2 * int(case.config.hidden_size) ** 2 if case.stage == 2 else 0)


def measured_bytes(case: Case) -> float:
    """The same of DeepSpeed, in a fresh process."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "RANK": "0", "LOCAL_RANK": "0"}
    environment |= {"WORLD_SIZE": str(case.cards), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def benchmark(options: Options, console: Console) -> Figures:
    """Print each step's bytes, predicted and measured.

    Raises:
        UnsupportedError: deepspeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise UnsupportedError("This benchmark measures DeepSpeed: pip install deepspeed.")
    figures, lines = Figures(), []
    for case in with_progress(CASES[::5] if options.quick else CASES, "steps"):
        predicted, measured = predicted_bytes(case), measured_bytes(case)
        how = "all layers checkpointed" if case.checkpointed else "no checkpointing"
        name = f"ZeRO-{case.stage}, {how}, rank {case.rank}"
        figures[name] = 100 * (predicted / measured - 1)
        lines.append((name, f"{predicted / 2**20:.2f}", f"{measured / 2**20:.2f}", f"{figures[name]:+.1f}"))
    console.print(make_table("One of 4 ranks, MiB", ("step", "predicted", "measured", "error, %"), lines))
    return figures


def _settings(case: Case) -> dict[str, Any]:
    """DeepSpeed's settings, as transformers fills them in."""
    width = case.config.hidden_size
    zero: dict[str, Any] = {"stage": case.stage, "overlap_comm": False, "reduce_bucket_size": width**2}
    if case.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": int(0.9 * width**2), "stage3_param_persistence_threshold": 10 * width}
    sizes = {"train_micro_batch_size_per_gpu": ROWS, "train_batch_size": ROWS * case.cards}
    return {"zero_optimization": zero, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True, **sizes}


def _step_of_rank(case: Case) -> int:
    """Train three steps as one rank; what it holds before the third, and the peak of that step."""
    import deepspeed  # type: ignore[import-not-found]
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=case.cards, store=FakeStore())
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)

    def profile() -> Any:
        return torch.profiler.profile(profile_memory=True)

    with profile() as before:
        torch.manual_seed(0)
        base = t.AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=case.rank, target_modules="all-linear")).train()
        if case.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_settings(case))
        del optimizer, trained
        tokens = torch.randint(0, case.config.vocab_size, (ROWS, LENGTH))

        def step() -> None:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

        step()
        step()
    with profile() as during:
        step()
    held, peak = _levels(before)[0], _levels(during)[1]
    return held + peak


def _levels(profile: Any) -> tuple[int, int]:
    """Bytes at the end, and at the most."""
    events = profile.profiler.kineto_results.events()
    levels = np.cumsum([0] + [event.nbytes() for event in events if event.name() == "[memory]"])
    return int(levels[-1]), int(levels.max())


if __name__ == "__main__":
    sys.stdout.write(f"{_step_of_rank(replace(CASES[0], **json.loads(sys.argv[1])))}\n")
    sys.stdout.flush()
    os._exit(0)  # without the engine's work at the end
