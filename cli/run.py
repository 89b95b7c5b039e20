"""`rankpilot run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from ..finetune.options import PilotOptions
from ..integrations.flags import attach_options
from .options import parse
from .progress import tell

USAGE = """rankpilot run [OPTIONS] -- COMMAND ARGS...

Runs any program that trains with transformers' Trainer, or one derived from it (TRL, axolotl, LLaMA-Factory, ms-swift),
with `rankpilot.attach` on its Trainer. Nothing in the program is edited.

  rankpilot run --budget 80% -- python train.py
  rankpilot run --budget 80% -- trl sft --model_name_or_path ...
  rankpilot run --budget 24GiB -- accelerate launch train.py
  rankpilot run --budget 24GiB -- torchrun --nproc-per-node 2 train.py
  rankpilot run --budget 80% -- axolotl train config.yaml
  rankpilot run --budget 80% -- llamafactory-cli train config.yaml
  rankpilot run --budget 80% -- swift sft --model ...
  rankpilot run --dry -- python train.py        the plan and what it takes, without training

It never changes the program's data, LoRA, rate, loss, optimizer, output, exit status or signals: what makes a step
smaller loses nothing, and ranks shrink only if nothing else fits. What trains no LoRA trains as it
is, as does a script that attaches by itself. If rankpilot cannot attach, or cannot begin, the run goes on without it;
only a budget in bytes that cannot be kept ends it, with status 1. Each of these is one line on standard error. If a
command succeeds without a Trainer, the status is 3. The status is 127 if the command is not found.
"""


@dataclass(frozen=True, kw_only=True)
class Run(PilotOptions):
    """Options of `rankpilot.attach`; docs/options.md has more.

    Attributes:
        policy: what chooses other ranks than those of the LoraConfig: "default", "agent", the folder of a trained
            policy, a rule, or a plan edited by you (plan.yaml). By default they stay.
        budget: limit that no training step may exceed: "24GiB" for everything on the device, frozen model included;
            "6GiB step" for a step on top of the frozen model; "80%" of the memory of a step with the LoRA as
            configured; "auto" for nine tenths of the free device memory; or "300k params" of the adapter.
        bounds: ranks of single modules, or their minimum and maximum rank: q_proj=8 down_proj=0:4.
        schedule: when to decide, as shares of the run from 0 on: 0 0.25 0.5. By default as the policy was trained.
        log: folder of the decision log. Defaults to `decisions` in the Trainer's output folder.
        dry: end the command before its first step; tell the limit, the plan and what a step takes.
    """

    policy: str | None = None
    budget: str = str(PilotOptions.budget)
    bounds: tuple[str, ...] = ()  # type: ignore[assignment]
    schedule: tuple[float, ...] = ()  # type: ignore[assignment]
    log: Path | None = None
    dry: bool = False

    def __post_init__(self) -> None:
        PilotOptions.of(None, {name: value for name, value in attach_options(self.given).items() if name != "policy"})

    @property
    def given(self) -> dict[str, Any]:
        """Options that differ from their defaults, as JSON values; paths are absolute."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "dry"}
        changed = {each.name: own[each.name] for each in fields(self) if own.get(each.name) not in (None, each.default)}
        for name in ("log", "policy"):
            if name in changed and (name == "log" or Path(changed[name]).exists()):
                changed[name] = str(Path(changed[name]).absolute())
        return changed


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status.

    Raises:
        ConfigError: there is no command.
    """
    words = [*arguments]
    at = words.index("--") if "--" in words else len(words)
    own, command = words[:at], words[at + 1 :]
    asks = {"-h", "--help"} & {*own}
    if asks:
        tell(USAGE)
    if not command and not asks:
        raise ConfigError("No command given. Put it after two dashes: rankpilot run --budget 80% -- python train.py")
    options = parse(Run, own, Run(), "rankpilot run")
    if options.policy is not None:
        from ..agents.policy_file import load_policy

        load_policy(options.policy)
    from ..integrations.launch import launch

    return launch(command, options.given, dry=options.dry)
