"""What is published of cards and models, by name: a card's memory and rates, a model's configuration.

A model's configuration is found without its weights: in a folder or a file, by a short name or a Hugging Face id. The
configurations of common models ship with the package, so that neither they nor a network are needed: sizes are facts,
published on the models' pages. What a configuration says of a model of text is checked here as well: whether it reads
tokens at all, and how many of them a row can have.

A card's memory is what CUDA reports to a program, less than the size on the box: `torch.cuda.mem_get_info` tells it,
and torch's "out of memory" errors do. Newer drivers keep more for themselves, so the lowest figure seen counts. The
bytes of a CUDA context are those that such errors show as held by the process beside torch's allocator; a card of which
none was seen has `UNKNOWN_CONTEXT_BYTES`. Rates are those of data sheets for dense products with sums in fp32.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import StrictDataclassError

from ..errors import AssetError, BudgetError, ConfigError, UnknownNameError, first_line, shown
from .budget import Budget
from .step_config import Quantization

if TYPE_CHECKING:  # which loads torch: names are refused before that
    from transformers import PreTrainedConfig, PreTrainedModel

_CARDS = Path(__file__).with_name("devices.json")
_MIB = 2**20

UNKNOWN_CONTEXT_BYTES = 500 * _MIB
"""Bytes of the CUDA context of a card of which no error has shown them."""

USUAL_CARD = "RTX 4090"
"""Times on a card of which only the memory is known are by the rates of this one. They are told as shares."""

WORKSPACE_BYTES = 8_519_680
"""What cuBLAS takes through the allocator for each thread that calls it (its default `:4096:2:16:8`)."""

HOPPER_WORKSPACE_BYTES = 32 * _MIB
"""The same on data centres' cards from Hopper on, compute capability 9 and 10."""

_BRANDS = {"nvidia", "geforce", "tesla", "gpu"}
_FORMS = {"pcie", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"} | {
    *("generation", "blackwell", "workstation", "server", "edition"),
}
"""Words of the driver's names that say how a card is built; they count only where a card of the table has them."""


@dataclass(frozen=True)
class DeviceRates:
    """What a card does in a second at best, as published.

    Attributes:
        bytes_per_s: reads and writes of its memory.
        flops_per_s: by dtype, as in "bf16", floating-point operations of dense products, two for product and sum. A
            precision that the card has no units for is missing.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]


@dataclass(frozen=True)
class DeviceSpec:
    """A card.

    Attributes:
        name: as in the table; what was given ("24GiB") for a card of which only the memory is known.
        memory_bytes: what CUDA reports to programs as the card's memory.
        context_bytes: what a CUDA context takes of it, beside torch's allocator.
        capability: compute capability, such as (8, 9); None if only the memory is known.
        rates: as published; None if only the memory is known.
    """

    name: str
    memory_bytes: int
    context_bytes: int
    capability: tuple[int, int] | None = None
    rates: DeviceRates | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16 (Ampere and later); taken to be so where only the memory is known."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """Whether torch has flash attention for it (Ampere and later); see `has_bf16`."""
        return self.has_bf16

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS takes through the allocator: a workspace each for the forward and the backward pass's thread."""
        large = self.capability is None or self.capability[0] in (9, 10)
        return 2 * (HOPPER_WORKSPACE_BYTES if large else WORKSPACE_BYTES)


@cache
def device_table() -> dict[str, DeviceSpec]:
    """The cards of the table by name."""
    return {name: _spec(name, row) for name, row in _rows().items()}


def find_device_spec(name: str) -> DeviceSpec:
    """A card by its name, or by its memory alone.

    Args:
        name: "RTX 4090", "a100 80gb" or what the driver calls it ("NVIDIA A100-SXM4-80GB"); "24GiB" is a card of which
            only the memory is known, all of which CUDA reports to programs.

    Raises:
        UnknownNameError: no card of the table has this name, or several have.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A card is its name or its memory ('RTX 4090', '24GiB'); got {shown(name)}.")
    if re.match(r"\s*[0-9.,_]+\s*[kmgt]i?b\s*$", name, re.IGNORECASE):
        return _of_memory(name)
    words = set(re.findall(r"[a-z0-9]+", re.sub(r"(\d)\s+(gi?b)\b", r"\1\2", name.lower()).replace("gib", "gb")))
    words -= _BRANDS
    distances: dict[str, int] = {}
    for card, row in _rows().items():
        own = {*card.lower().split(), f"{row['nominal_gb']}gb"}
        if words & own and words <= own | _FORMS:
            distances[card] = len(words ^ own)
    nearest = [card for card, distance in distances.items() if distance == min(distances.values())]
    if len(nearest) == 1:
        return device_table()[nearest[0]]
    number = re.fullmatch(r"([0-9.]+)\s*g?", name.strip(), re.IGNORECASE)
    if number and not nearest:
        raise UnknownNameError(f"The memory of a device needs a unit; got {name!r}. Did you mean '{number[1]}GiB'?")
    hint = "The card's memory alone, as in '24GiB', works too."
    if nearest:
        raise UnknownNameError(f"{name!r} stands for several cards: {', '.join(map(repr, nearest))}. Give one of them.")
    raise UnknownNameError.of("device", name, device_table(), hint)


def _of_memory(given: str) -> DeviceSpec:
    try:
        memory = int(Budget.parse(given).value)
    except BudgetError as error:
        raise UnknownNameError(f"Cannot read the device memory {given!r}. Give it as '24GiB' or '24564MiB'.") from error
    if memory <= UNKNOWN_CONTEXT_BYTES:
        raise UnknownNameError(
            f"A device of {given!r} would not hold the CUDA context, {UNKNOWN_CONTEXT_BYTES // _MIB} MiB. "
            "Give its memory as '24GiB', or its name."
        )
    return DeviceSpec(given.strip(), memory, UNKNOWN_CONTEXT_BYTES)


@cache
def _rows() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(_CARDS.read_text())
    return rows


def _spec(name: str, row: dict[str, Any]) -> DeviceSpec:
    return DeviceSpec(
        name,
        row["memory_mib"] * _MIB,
        row["context_mib"] * _MIB,
        (row["capability"][0], row["capability"][1]),
        DeviceRates(row["gb_per_s"] * 1e9, {precision: rate * 1e12 for precision, rate in row["tflops"].items()}),
    )


_MODELS = Path(__file__).with_name("published_models.json")

_VARIANTS = ("-instruct", "-it", "-pt", "-chat", "-base")
"""Ends of names of models that have the sizes of the model without them."""


_MIRRORS = ("nousresearch", "unsloth")
"""Owners of copies of others' models, with the same sizes and names."""


@cache
def published_models() -> dict[str, dict[str, Any]]:
    """The models of the table by short name ("llama-3.1-8b").

    Each has "owner" (of the Hugging Face id), "parameters" (their published number, without the head of a classifier)
    and "config" (fields of the configuration).
    """
    table: dict[str, dict[str, Any]] = json.loads(_MODELS.read_text())
    return table


def check_known(name: str) -> None:
    """Raise UnknownNameError or AssetError for a model whose configuration is neither known nor a path or an id."""
    if Path(name).expanduser().exists():
        return
    if name.startswith((".", "/", "~")) or name.endswith(".json"):
        path = Path(name).expanduser()
        raise AssetError(f"There is no configuration at {path}. Give a folder with a config.json, or the file itself.")
    if "/" not in name and not _short_name(name):
        hint = "A folder with a config.json or a Hugging Face id works too."
        raise UnknownNameError.of("model", name, published_models(), hint)


def find_configuration(name: str) -> PreTrainedConfig:
    """A model's configuration.

    Args:
        name: a local folder or config.json; a short name of the table, such as "qwen3-8b"; or a Hugging Face id. The
            ids of the table's models, and of their variants for chat, need no network.

    Raises:
        UnknownNameError: there is no such model.
        AssetError: a path that does not exist, or an id that cannot be read, as without a network.
        ConfigError: the configuration names no model that transformers knows.
    """
    check_known(name)
    path, short = Path(name).expanduser(), _short_name(name)
    if not path.exists() and short:
        from transformers import AutoConfig

        fields = dict(published_models()[short]["config"])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return _read(name, path if path.exists() else name)


def _short_name(name: str) -> str:
    """The name in the table that an id or a name would have."""
    owner, _, model = name.lower().rpartition("/")
    model = model.removeprefix("meta-").replace("-instruct-", "-")
    for candidate in (model, *(model.removesuffix(variant) for variant in _VARIANTS)):
        entry = published_models().get(candidate)
        if entry is not None and owner in ("", entry["owner"].lower(), *_MIRRORS):
            return candidate
    return ""


@cache
def try_hub_once() -> None:
    """Ask the hub once whether it answers; if not, what is cached serves, and the rest fails at once.

    Its client would try again for half a minute for each file.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the library that speaks HTTP, which differs between versions
        constants.HF_HUB_OFFLINE = True


def _read(name: str, place: str | Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not Path(place).exists():
        try_hub_once()
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except OSError as error:
        raise AssetError(
            f"The configuration of {name!r} could not be read: {first_line(error)} Check the id or path and the "
            f"network; without one, a local config.json works, or one of {', '.join(list(published_models())[:5])}, ..."
        ) from error
    except (*UNUSABLE, ValueError) as error:
        raise unusable(name, error) from error


UNUSABLE = (StrictDataclassError, ArithmeticError, AttributeError, KeyError, TypeError, RecursionError)
"""What reading a configuration ends with where its fields make no model, besides ValueError."""


def unusable(name: str, error: Exception) -> ConfigError:
    """The error for a configuration that makes no model, or only with code that comes with it."""
    if needs_code(error):
        return ConfigError(
            f"The model {name!r} needs Python code that comes with it (`auto_map`), and rankpilot never runs such "
            "code. Take a model whose class is part of transformers."
        )
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    said = first_line(cause if isinstance(cause, Exception) else error)
    return ConfigError(f"The configuration of {name!r} cannot be used: {said}")


def needs_code(error: Exception) -> bool:
    """Whether transformers has refused to run what a model brings."""
    return "trust_remote_code" in str(error)


_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_MOST_SIZES = dict.fromkeys(_WIDTHS, 2**24) | {"num_hidden_layers": 2**10}
"""The largest sizes that are taken, far above those of any model: with more, no answer would come."""


def check_sizes(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a size that no model has."""
    for name, most in _MOST_SIZES.items():
        size = getattr(config.get_text_config(), name, None)
        if isinstance(size, int) and not 1 <= size <= most:
            raise ConfigError(
                f"The configuration of {config.name_or_path or config.model_type!r} has {name}={shown(size)}. "
                f"Give a whole number from 1 to {most:,}."
            )


_TOKENS = ("input_ids", "inputs")
"""The main input of models that read tokens, as transformers calls it; the second is Perceiver's, of any kind."""


def check_reads_tokens(config: PreTrainedConfig, name: str = "") -> None:
    """Raise ConfigError for a model that reads pictures or sound, and no tokens.

    Args:
        config: of the model.
        name: of the model, for the error; by default the place from which the configuration was read.
    """
    name = name or config.name_or_path
    main = _main_input(config)
    if main in _TOKENS and hasattr(config.get_text_config(), "vocab_size"):
        return
    what = f"The model {name!r} ({type(config).__name__})" if name else f"The model ({type(config).__name__})"
    raise ConfigError(
        f"{what} reads no tokens{'' if main in _TOKENS else f' but {main}'}: rankpilot plans and trains models of text."
    )


def check_experts(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a mixture that sends a token to more experts than it has, or to none."""
    text: Any = config.get_text_config()
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(text, name, None), int)), 0)
    chosen = getattr(text, "num_experts_per_tok", None)
    if experts > 1 and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise ConfigError(
            f"The configuration of {config.model_type!r} sends each token to num_experts_per_tok={chosen} of its "
            f"{experts} experts. Give 1 to {experts}."
        )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of experts that a router chooses from."""


def stored_method(config: PreTrainedConfig, quantization: Quantization) -> str:
    """How a checkpoint stores its weights in fewer bits, such as "mxfp4"; empty if it does not.

    Raises:
        ConfigError: it does, and other bits are asked for.
    """
    stored: Any = getattr(config, "quantization_config", None) or {}
    given: Any = stored.get("quant_method", "") if isinstance(stored, dict) else stored.quant_method
    method = str(getattr(given, "value", given))
    if method not in ("", "bitsandbytes") and quantization != "none":
        raise ConfigError(
            f"The weights of this {config.model_type!r} are stored in {method}, which transformers does not turn into "
            f"{quantization}. Leave --quantization out, or take a checkpoint in bf16."
        )
    return method


def _main_input(config: PreTrainedConfig) -> str:
    """The name of the main input of the model's own class, or of its base where the configuration names no class."""
    import transformers

    kinds = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    kinds.append(transformers.AutoModel._model_mapping.get(type(config), None))
    names: list[Any] = [getattr(kind, "main_input_name", None) for kind in kinds]
    return str(next(filter(None, names), _TOKENS[0]))


def positions_of(config: Any) -> int | None:
    """The positions that a configuration names; None if it names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def most_positions(model: PreTrainedModel) -> int | None:
    """The most tokens of a row for which the model has positions; None where its class or configuration sets no limit.

    Args:
        model: without adapters, or inside them.
    """
    most = positions_of(model.config) or 0
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token's number.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most if most > 0 else None


def check_length(length: int, model: PreTrainedModel) -> None:
    """Raise ConfigError for rows that are longer than the model has positions."""
    most = most_positions(model)
    if most is not None and length > most:
        raise ConfigError(f"The model has {most} positions, and max_length is {length}. Lower --max-length.")
