"""Settings of a run, compared with those of a resumed run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..common.checks import counted, finite
from ..common.errors import RankPilotError, RunFolderError, first_line, shown
from ..cost.budget import Budget
from ..decide.policy import Policy
from ..decide.settings import DecisionSchedule
from ..lora.peft_config import adapter_ranks
from ..lora.resize import is_trained
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import TargetModule
from .options import PilotOptions


def run_settings(options: PilotOptions, budget: Budget, policy: Policy, schedule: DecisionSchedule) -> dict[str, Any]:
    """Return the settings to compare on resume, as JSON values, with the last budget read."""
    bounds = options.bounds or {}
    goal = getattr(policy, "goal", None)  # only of learned policies, like the sha256
    return {
        "budget": str(budget),
        "policy": policy.name,
        "policy_sha256": getattr(policy, "sha256", None),
        "goal": str(goal) if goal and goal.saves else None,
        "schedule": repr(schedule),
        "bounds": {name: list(bound) if isinstance(bound, tuple) else bound for name, bound in bounds.items()},
        "exact_savers": options.exact_savers,
        "gradient_checkpointing": options.gradient_checkpointing,
        "parts": options.parts,
        "scaling": options.scaling,
        "learning_rate": list(rate) if isinstance(rate := options.learning_rate, list | tuple) else rate,
        "keep_rate": options.keep_rate,
        "control": options.control,
        **({"stream": options.stream} if options.stream != "auto" else {}),
    }


def adapter_settings(targets: Sequence[TargetModule]) -> dict[str, Any]:
    """Return the ranks of adapters, their scaling at a common reference rank, by module name, and if any is trained."""
    scalings = {target.name: target.scaling_at(REFERENCE_RANK) for target in targets}
    return {"ranks": adapter_ranks(targets), "scalings": scalings, "trained": any(map(is_trained, targets))}


_LOAD = "In your own loop, load what was saved of the model and of the optimizer before `pilot.load_state_dict`."


def check_same(now: Mapping[str, Any], state: Mapping[str, Any], targets: Sequence[TargetModule]) -> dict[str, Any]:
    """Reject resuming a run with settings or adapters of another run; the budget may differ.

    Args:
        now: the current settings.
        state: the result of `RankPilot.state_dict`; those of earlier versions have no ranks and no scalings.
        targets: the model's adapters.

    Returns:
        The saved settings.

    Raises:
        RunFolderError: they differ from those of the state.
    """
    if "settings" not in state:
        raise RunFolderError(
            f"Not the state of a run: its keys are {shown([*state])}. Pass what `state_dict` returned."
        )
    before, adapters = state["settings"], adapter_settings(targets)
    ranks, scalings = adapters["ranks"], adapters["scalings"]
    there, scaled = state.get("ranks", ranks), state.get("scalings", scalings)
    differing = [key for key in now if key != "budget" and now[key] != before.get(key)]
    if differing:
        each = "; ".join(f"{key}: {shown(before.get(key))} then, {now[key]!r} now" for key in differing)
        raise RunFolderError(
            f"The resumed run had other settings ({each}). Resume with those, or start a new run; only the "
            "budget may change."
        )
    other = [name for name in {**there, **ranks} if there.get(name) != ranks.get(name)]
    if other:
        raise RunFolderError(
            f"{len(other)} adapters of the model differ in rank from the resumed run, such as "
            f"{shown(other[0])}: {shown(there.get(other[0]))} then, {ranks.get(other[0])} now. {_LOAD}"
        )
    if state.get("trained") and not adapters["trained"]:
        raise RunFolderError(f"The adapters of the model are new, those of the resumed run were trained. {_LOAD}")
    other = [name for name in scalings if not math.isclose(finite(scaled[name]), scalings[name], rel_tol=1e-6)]
    if other:
        raise RunFolderError(
            f"The resumed run used another scaling: at rank {REFERENCE_RANK}, {shown(other[0])} was "
            f"multiplied by {finite(scaled[other[0]]):g}, now by {scalings[other[0]]:g}. Create the "
            "LoraConfig with the same lora_alpha and use_rslora."
        )
    return dict(before)


def predictions_of(state: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return the steps of a state with a predicted plan cost, and the costs."""
    return [(counted(step), finite(cost)) for step, cost in state["predictions"]]


@contextmanager
def readable_state() -> Iterator[None]:
    """Turn errors on a damaged or foreign state in the block into RunFolderError."""
    try:
        yield
    except RankPilotError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RunFolderError(
            f"The state of the resumed run is corrupt, or belongs to another model: {first_line(error)}. Use "
            "an earlier checkpoint."
        ) from error
