"""A trained policy, and policies as folders with `policy.safetensors` and `card.json`.

Loading one never unpickles and runs no code of it.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..common.devices import without_autocast
from ..common.files import atomic_path, check_tensor_file, from_json, read_json, sha256, write_json
from ..decide.chooser import DEFAULT, PlanChooser
from ..decide.group_rules import GROUP_RULES
from ..decide.groups import GROUP_FEATURES, GroupView, Steering
from ..decide.log import POLICY, DecisionLog
from ..decide.observation import RUN_FEATURES, Observation
from ..decide.policy import Decision, Policy
from ..decide.rules import FILE_SUFFIXES, RULES, AsConfigured, PlanFile, find_rule
from ..decide.settings import ONCE, DecisionSchedule
from ..errors import MOST_NAME, ConfigError, DataError, PolicyFileError, UnknownNameError, first_line, shown
from ..lora.spec import DEFAULT_RANKS
from .networks import GroupNetwork, NetworkConfig

logger = logging.getLogger(__name__)

FORMAT = "rankpilot-policy"
SCHEMA = 6
WEIGHTS, CARD = "policy.safetensors", "card.json"

MOST_CARD_BYTES, MOST_WEIGHT_BYTES = 2**24, 2**30
"""Bytes of a card and of a file of weights, at most."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Takes the action that its network scores highest, among those that are allowed.

    Attributes:
        name: the name in logs and tables.
        network: on the CPU and in evaluation mode.
        schedule: when it was trained to decide.
        sha256: of the file of weights; None for a policy that was not loaded from a file.
        folder: from which it was loaded; None for one that was not.
    """

    steers_rate = True
    name: str
    network: GroupNetwork
    schedule: DecisionSchedule
    sha256: str | None = None
    folder: Path | None = None

    @torch.no_grad()
    def scores(self, view: GroupView) -> torch.Tensor:
        """The score of each action, (actions,); minus infinity for those that are not allowed."""
        groups, run = torch.from_numpy(view.features)[None], torch.from_numpy(view.run)[None]
        scores: torch.Tensor = self.network(groups, torch.ones(groups.shape[:2]), run)[0][0]
        return scores.masked_fill(~torch.from_numpy(view.allowed), -torch.inf)

    @without_autocast()
    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return int(self.scores(view).argmax())

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation; the same observation always leads to the same decision."""
        view = GroupView.of(observation)
        return view.decision(self.act(view))


def save_policy(
    folder: Path,
    network: GroupNetwork,
    schedule: DecisionSchedule,
    provenance: dict[str, Any],
) -> Path:
    """Write a policy. The files of one that is there already are replaced.

    Args:
        folder: of the policy.
        network: of the policy.
        schedule: when the policy was trained to decide.
        provenance: further keys of the card: how the policy was trained, and with what result, as JSON values.

    Returns:
        The folder.
    """
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, temporary)
        temporary.chmod(0o644)
    card = {
        "format": FORMAT,
        "schema": SCHEMA,
        "sha256": sha256(folder / WEIGHTS),
        "group_features": list(GROUP_FEATURES),
        "run_features": list(RUN_FEATURES),
        "ladder": list(DEFAULT_RANKS),
        "schedule": asdict(schedule),
        "network": asdict(network.config),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rankpilot", "torch")},
        },
        **provenance,
    }
    write_json(folder / CARD, card)
    return folder


SHIPPED = Path(__file__).with_name("shipped") / "agent"
"""The trained policy that ships, under the name of its folder; docs/train-policy.md says how it was made."""


def _folder(given: str | Path) -> Path:
    """The folder of a policy; one that is here goes before the one of that name that ships."""
    return SHIPPED if str(given) == SHIPPED.name and not Path(given).exists() else Path(given)


def load_policy(given: str | Path | Policy) -> Policy:
    """A policy by name or folder.

    Args:
        given: "default" for the policy that chooses a plan, "agent" for a trained one that ships, the name of a rule
            ("signal-mean", "union"), the folder of a trained policy, a plan in a .yaml file, or a policy object, which
            is returned.

    Raises:
        PolicyFileError: the folder is incomplete, corrupt, or of another format, schema, feature set or ladder.
        UnknownNameError: neither a rule nor a folder.
        ConfigError: something else than a name, a path or a policy; or the file holds no plan.
    """
    if not isinstance(given, str | Path):
        named = isinstance(getattr(given, "name", None), str)
        if isinstance(given, type) or not named or not callable(getattr(given, "decide", None)):
            raise ConfigError(
                "policy is 'default', the folder of a policy, the name of a rule, a plan in a .yaml file, or an object "
                f"with `name` and `decide`; got {given!r}."
            )
        return given
    if str(given) == DEFAULT:
        return PlanChooser()
    folder = _folder(given)
    if folder.suffix in FILE_SUFFIXES and not folder.is_dir():
        return PlanFile(folder)
    if not folder.exists():
        if folder.name == str(given):
            return GROUP_RULES.get(str(given)) or find_rule(str(given), (SHIPPED.name, *GROUP_RULES))
        raise UnknownNameError(
            f"There is no policy folder {folder}. Pass one made by `rankpilot policy train`, {DEFAULT!r}, "
            f"{SHIPPED.name!r}, or a rule: {', '.join((*RULES, *GROUP_RULES))}."
        )
    if folder.is_file():
        raise PolicyFileError(
            f"{folder} is a file. A policy is a folder with {WEIGHTS} and {CARD}, a plan a .yaml file; pickles and "
            "zips are never read."
        )
    card = read_card(folder)
    try:
        config = from_json(NetworkConfig, card.get("network"), complete=True)
    except ConfigError as error:
        raise PolicyFileError(f"The card in {folder} does not describe the network: {first_line(error)}") from error
    weights = _read_weights(folder, card)
    with torch.device("meta"):
        _check_weights(folder, GroupNetwork(config), weights)
    with torch.random.fork_rng(devices=[]):  # networks draw weights, which the file replaces
        network = GroupNetwork(config)
    network.load_state_dict(weights)
    return LearnedPolicy(_name(folder, card), network.eval(), _schedule(folder, card), card["sha256"], folder)


def _name(folder: Path, card: dict[str, Any]) -> str:
    """What a policy is called: a line of text, for people and logs; never a path.

    Raises:
        PolicyFileError: the card has another name.
    """
    name = card.get("name", folder.resolve().name)
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise PolicyFileError(
            f"The card in {folder} names the policy {shown(name)}; a name is a line of 1 to {MOST_NAME} characters."
        )
    return name


def _check_weights(folder: Path, network: nn.Module, weights: Weights) -> None:
    """Refuse weights that are not those of a network on the meta device, which takes no memory.

    Raises:
        PolicyFileError: a name, shape or type differs, or a weight is NaN or infinite.
    """
    needed = network.state_dict()
    for name in sorted(needed.keys() | weights.keys()):
        wanted, found = ((each[name].shape, each[name].dtype) if name in each else None for each in (needed, weights))
        if wanted != found:
            raise PolicyFileError(
                f"The weights in {folder} do not fit its card: {shown(name)} is {found}, not {wanted}."
            )
        if not weights[name].isfinite().all():
            raise PolicyFileError(f"The weights in {folder} hold NaN or infinity: {name}. Train the policy again.")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a policy folder, checked.

    Raises:
        PolicyFileError: it is missing, unreadable, or belongs to another format, schema, feature set or ladder.
    """
    path = folder / CARD
    try:
        card = read_json(path, MOST_CARD_BYTES)
    except FileNotFoundError as error:
        raise PolicyFileError(f"{folder} is no policy folder: {CARD} is missing.") from error
    except DataError as error:
        raise PolicyFileError(str(error)) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise PolicyFileError(f"{path} is not the card of a rankpilot policy.")
    if card.get("schema") != SCHEMA:
        raise PolicyFileError(
            f"The policy in {folder} has schema {shown(card.get('schema'))}; this version of rankpilot reads {SCHEMA}. "
            "Train it again, or install the version that made it."
        )
    expected = {"group_features": GROUP_FEATURES, "run_features": RUN_FEATURES, "ladder": DEFAULT_RANKS}
    for key, value in expected.items():
        if card.get(key) != list(value):
            raise PolicyFileError(
                f"The policy in {folder} has {key} {shown(card.get(key))}; this version of rankpilot reads {value!r}. "
                "Train it again, or install the version that made it."
            )
    return card


def policy_of(log: DecisionLog) -> Policy | None:
    """Who decided in a run: the policy beside its log, or who has the name there; None where that cannot be read.

    Args:
        log: of the run, with a decision at least.
    """
    folder = log.folder / POLICY
    try:
        return load_policy(folder if folder.is_dir() else log.logged(0).policy)
    except (PolicyFileError, UnknownNameError, ConfigError):
        return None


def policy_schedule(given: str | Path | Policy) -> DecisionSchedule:
    """When a policy was trained to decide, or a plan file is read; the default schedule for all others."""
    if str(given) == DEFAULT or isinstance(given, PlanChooser):
        return ONCE
    policy = load_policy(given) if Path(str(given)).suffix in FILE_SUFFIXES else given
    if isinstance(policy, PlanFile | AsConfigured | LearnedPolicy | Steering):
        return policy.schedule
    if isinstance(policy, str) and policy in GROUP_RULES:
        return GROUP_RULES[policy].schedule
    folder = _folder(given) if isinstance(given, str | Path) else None
    return _schedule(folder, read_card(folder)) if folder and folder.is_dir() else DecisionSchedule()


def _schedule(folder: Path, card: dict[str, Any]) -> DecisionSchedule:
    try:
        return from_json(DecisionSchedule, card.get("schedule"), complete=True)
    except ConfigError as error:
        raise PolicyFileError(f"The card in {folder} does not describe the schedule: {error}") from error


def _read_weights(folder: Path, card: dict[str, Any]) -> Weights:
    path = folder / WEIGHTS
    if not path.is_file():
        raise PolicyFileError(f"{folder} is incomplete: {WEIGHTS} is missing.")
    try:
        check_tensor_file(path, MOST_WEIGHT_BYTES)
    except DataError as error:
        raise PolicyFileError(str(error)) from error
    if sha256(path) != card.get("sha256"):
        raise PolicyFileError(f"{path} is corrupt: its sha256 is not the one in {CARD}. Copy or train it again.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise PolicyFileError(f"{path} is not a safetensors file: {first_line(error)}") from error
