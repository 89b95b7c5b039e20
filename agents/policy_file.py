"""Trained policies, and their folders with `policy.safetensors` and `card.json`.

Loading a policy never unpickles anything and never runs code from the folder.
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

from ..common.arrays import BoolArray, FloatArray
from ..common.checks import is_count
from ..common.devices import without_autocast
from ..common.errors import MOST_NAME, ConfigError, DataError, PolicyFileError, UnknownNameError, first_line, shown
from ..common.files import atomic_path, check_tensor_file, from_json, read_json, sha256, write_json
from ..decide.chooser import DEFAULT, PlanChooser
from ..decide.groups import GROUP_FEATURES, GROUP_RULES, NOTHING, RATE_CHANGES, GroupView, Steering
from ..decide.log import POLICY, DecisionLog
from ..decide.observation import RUN_FEATURES, Observation, learns_labels
from ..decide.policy import Decision, Policy
from ..decide.rules import FILE_SUFFIXES, RULES, AsConfigured, PlanFile, find_rule
from ..decide.settings import ONCE, DecisionSchedule
from ..lora.spec import DEFAULT_RANKS

MOST_WIDTH = 8192
"""Maximum width of a hidden layer: a policy's card requests it before weights are read."""


@dataclass(frozen=True)
class NetworkConfig:
    """Configuration of a network.

    Attributes:
        width: width of every hidden layer.

    Raises:
        ConfigError: a value out of range.
    """

    width: int = 64

    def __post_init__(self) -> None:
        if not is_count(self.width) or self.width > MOST_WIDTH:
            given = shown(self.width)
            raise ConfigError(f"The width of a network must be a whole number from 1 to {MOST_WIDTH}; got {given}.")


class GroupNetwork(nn.Module):
    """Compute the scores of all actions and the value of the run.

    Args:
        config: configuration of the network.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, group, run = config.width, len(GROUP_FEATURES), len(RUN_FEATURES)
        self.config = config
        self.token = nn.Sequential(nn.Linear(group + run, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.context = nn.Sequential(nn.Linear(2 * width + run, width), nn.Tanh())
        self.moves = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1))
        self.rate = nn.Linear(width, len(RATE_CHANGES))
        self.worth = nn.Sequential(nn.Linear(2 * width + run, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(
        self, groups: torch.Tensor, present: torch.Tensor, run: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (batch, 4 + groups), in the order of `GroupView`'s actions, and values (batch, 1).

        Args:
            groups: features of each group, (batch, groups, len(GROUP_FEATURES)).
            present: 1 for groups in layers, (batch, groups); the others are excluded from the context.
            run: features of the run, (batch, len(RUN_FEATURES)).
        """
        beside = run[:, None].expand(-1, groups.shape[1], -1)
        tokens = self.token(torch.cat([groups, beside], dim=2))
        there = present[:, :, None].to(tokens.dtype)
        mean = (tokens * there).sum(dim=1) / there.sum(dim=1).clamp_min(1.0)
        most = tokens.masked_fill(there == 0, -1.0).amax(dim=1)
        seen = torch.cat([mean, most, run], dim=1)
        context = self.context(seen)
        moves = self.moves(torch.cat([tokens, context[:, None].expand(-1, groups.shape[1], -1)], dim=2))
        return torch.cat([self.rate(context), moves[:, :, 0]], dim=1), self.worth(seen)


logger = logging.getLogger(__name__)

FORMAT = "rankpilot-policy"
SCHEMA = 7
WEIGHTS, CARD = "policy.safetensors", "card.json"

MOST_CARD_BYTES, MOST_WEIGHT_BYTES = 2**24, 2**30
"""Maximum size of a card and of a weights file, in bytes."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Takes the allowed action with the highest score of its network; on labels, none.

    There an agent's moves of ranks lost 8 to 12 % in three of six real runs (benchmarks/EXPERIMENTS.md).

    Attributes:
        name: the name in logs and tables.
        network: the network, on the CPU and in evaluation mode.
        schedule: decision schedule used in training.
        sha256: hash of the weights file; None for a policy not loaded from a file.
        folder: folder the policy was loaded from, or None.
    """

    steers_rate = True
    name: str
    network: GroupNetwork
    schedule: DecisionSchedule
    sha256: str | None = None
    folder: Path | None = None

    @staticmethod
    def allowed(view: GroupView) -> BoolArray:
        """Mask of the actions it may take, bool (actions,)."""
        found = view.allowed.copy()
        found[NOTHING + 1 :] &= not learns_labels(view.run.tolist())
        return found

    @torch.no_grad()
    def scores(self, view: GroupView) -> torch.Tensor:
        """Score of each action, (actions,); minus infinity for masked actions."""
        seen = (torch.from_numpy(each)[None] for each in (view.features, view.groups.repeated, view.run))
        scores: torch.Tensor = self.network(*seen)[0][0]
        return scores.masked_fill(~torch.from_numpy(self.allowed(view)), -torch.inf)

    @without_autocast()
    def probabilities(self, view: GroupView) -> FloatArray:
        """Probability of each action if drawn by its score, float64 (actions,); 0 for masked ones."""
        found: FloatArray = self.scores(view).double().softmax(dim=0).numpy()
        return found

    @without_autocast()
    def act(self, view: GroupView) -> int:
        """See `Actor`."""
        return int(self.scores(view).argmax())

    def decide(self, observation: Observation) -> Decision:
        """Decide on one observation, deterministically."""
        view = GroupView.of(observation)
        return view.decision(self.act(view))


def save_policy(folder: Path, network: GroupNetwork, schedule: DecisionSchedule, provenance: dict[str, Any]) -> Path:
    """Save a policy, overwriting an existing one.

    Args:
        folder: folder of the policy.
        network: network of the policy.
        schedule: decision schedule used in training.
        provenance: further keys of the card: training details and results, as JSON values.

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
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("rankpilot", "torch")}},
        **provenance,
    }
    write_json(folder / CARD, card)
    return folder


SHIPPED = Path(__file__).with_name("shipped") / "agent"
"""The trained policy included in the package, named after its folder; for its training see docs/train-policy.md."""


def _folder(given: str | Path) -> Path:
    """Folder of a policy; a local folder takes precedence over an included policy of the same name."""
    return SHIPPED if str(given) == SHIPPED.name and not Path(given).exists() else Path(given)


def load_policy(given: str | Path | Policy) -> Policy:
    """Load a policy by name or folder.

    Args:
        given: "default" for the policy that chooses a plan, "agent" for the trained one included in the package, the
            name of a rule ("signal-mean", "union"), the folder of a trained policy, a plan in a .yaml file, or a policy
            object, returned unchanged.

    Raises:
        PolicyFileError: the folder is incomplete, corrupt, or of another format, schema, feature set or ladder.
        UnknownNameError: neither a rule nor a folder.
        ConfigError: not a name, a path or a policy; or the file holds no plan.
    """
    if not isinstance(given, str | Path):
        named = isinstance(getattr(given, "name", None), str)
        if isinstance(given, type) or not named or not callable(getattr(given, "decide", None)):
            raise ConfigError(
                "policy must be 'default', a policy folder, the name of a rule, a plan's .yaml file, or an "
                f"object with `name` and `decide`; got {given!r}."
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
            f"Policy folder {folder} does not exist. Pass one written by `rankpilot policy train`, "
            f"{DEFAULT!r}, {SHIPPED.name!r}, or a rule: {', '.join((*RULES, *GROUP_RULES))}."
        )
    if folder.is_file():
        raise PolicyFileError(
            f"{folder} is a file. A policy is a folder with {WEIGHTS} and {CARD}, or a plan's .yaml file; "
            "pickles and zips are never read."
        )
    card = read_card(folder)
    try:
        config = from_json(NetworkConfig, card.get("network"), complete=True)
    except ConfigError as error:
        raise PolicyFileError(f"The card in {folder} does not describe the network: {first_line(error)}") from error
    weights = _read_weights(folder, card)
    with torch.device("meta"):
        _check_weights(folder, GroupNetwork(config), weights)
    with torch.random.fork_rng(devices=[]):  # networks draw initial weights, overwritten by the file
        network = GroupNetwork(config)
    network.load_state_dict(weights)
    return LearnedPolicy(_name(folder, card), network.eval(), _schedule(folder, card), card["sha256"], folder)


def _name(folder: Path, card: dict[str, Any]) -> str:
    """Display name of a policy: one line of text, for people and logs; never a path.

    Raises:
        PolicyFileError: the card has an invalid name.
    """
    name = card.get("name", folder.resolve().name)
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise PolicyFileError(
            f"The card in {folder} has the policy name {shown(name)}; a name must be one line of 1 to "
            f"{MOST_NAME} characters."
        )
    return name


def _check_weights(folder: Path, network: nn.Module, weights: Weights) -> None:
    """Check weights against a network on the meta device, which takes no memory.

    Raises:
        PolicyFileError: a name, shape or type differs, or a weight is NaN or infinite.
    """
    needed = network.state_dict()
    for name in sorted(needed.keys() | weights.keys()):
        wanted, found = ((each[name].shape, each[name].dtype) if name in each else None for each in (needed, weights))
        if wanted != found:
            raise PolicyFileError(
                f"The weights in {folder} do not match its card: {shown(name)} is {found}, not {wanted}."
            )
        if not weights[name].isfinite().all():
            raise PolicyFileError(f"The weights in {folder} contain NaN or infinity: {name}. Train the policy again.")


def read_card(folder: Path) -> dict[str, Any]:
    """Read and check the card of a policy folder.

    Raises:
        PolicyFileError: it is missing, unreadable, or belongs to another format, schema, feature set or ladder.
    """
    path = folder / CARD
    try:
        card = read_json(path, MOST_CARD_BYTES)
    except FileNotFoundError as error:
        raise PolicyFileError(f"{folder} is not a policy folder: {CARD} is missing.") from error
    except DataError as error:
        raise PolicyFileError(str(error)) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise PolicyFileError(f"{path} is not the card of a rankpilot policy.")
    lists = {"group_features": GROUP_FEATURES, "run_features": RUN_FEATURES, "ladder": DEFAULT_RANKS}
    for key, value in {"schema": SCHEMA, **lists}.items():
        if card.get(key) != (list(value) if isinstance(value, tuple) else value):
            raise PolicyFileError(
                f"The policy in {folder} has {key} {shown(card.get(key))}; this version of rankpilot reads {value!r}. "
                "Train it again, or install the version that made it."
            )
    return card


def policy_of(log: DecisionLog) -> Policy | None:
    """Load the policy of a run: its copy next to the log, or the one named there; None if it cannot be read.

    Args:
        log: log of the run, with at least one decision.
    """
    folder = log.folder / POLICY
    try:
        return load_policy(folder if folder.is_dir() else log.logged(0).policy)
    except (PolicyFileError, UnknownNameError, ConfigError):
        return None


def policy_schedule(given: str | Path | Policy) -> DecisionSchedule:
    """Decision schedule of a trained policy or a plan file; the default schedule for all others."""
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
        raise PolicyFileError(f"{path} is corrupt: its sha256 differs from the one in {CARD}. Copy or train it again.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise PolicyFileError(f"{path} is not a safetensors file: {first_line(error)}") from error
