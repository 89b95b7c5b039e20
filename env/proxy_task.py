"""Proxy tasks: short fine-tunes of small pretrained transformers that stand for the real ones; their bases and suites.

* *planted*: a teacher is the base plus known low-rank changes on some modules; the student learns its outputs. The
  loss is the divergence KL(teacher || student) in nats a token: where the rank is needed is known.
* *shift*: the base, pretrained on documentation, is fine-tuned on text of another kind; the loss is the cross-entropy
  of the next byte, or of masked bytes, in nats.
* *classify*: the base learns to name the class of a text; the loss is the cross-entropy of the class in nats.

A description holds no model and no data, and this module imports neither torch nor PEFT: `ProxyFineTune` trains.

Suites: fixed sets of tasks, split by base, domain and budget, each with the results of fixed allocations.

| split | bases | texts of shifts | classification |
|---|---|---|---|
| train | Llama and BERT of 4 layers | code, reviews, german, tables | sentiment |
| validation | those; Llama and BERT of 8 layers, width 32 | newsgroups, spanish | newsgroups |
| test | those of train; Llama and BERT of 8 layers, width 64; GPT-2 | five others, see `make_suites` | topics |

No seed, and no text except the planted teachers' (documentation), is in two splits. Learning rates are tuned for the
uniform run of each task, and its result and the oracle's (planted) or full rank's (shift) are kept with it.
`python -m tools.make_suites` makes them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from ..common.checks import is_count, is_positive, is_real
from ..common.files import read_json
from ..cost.budget import Budget
from ..cost.cost import UntimedCost
from ..cost.step_config import check_seed
from ..data.task import SPLITS, SUITES
from ..errors import ConfigError, UnknownNameError, first_line, shown

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ..lora.targets import TargetModule

Unit = Literal["bytes", "parameters"]
"""What a budget of a proxy task counts."""


MASK_TOKEN = 256
"""What masked language models read in place of a hidden byte."""


@dataclass(frozen=True)
class ProxyBase:
    """One proxy architecture, a language model over bytes.

    Attributes:
        name: folder below `env/weights`.
        family: "llama", "bert" or "gpt2", as transformers calls it.
        depth: layers.
        target_modules: the linear layers that carry an adapter, as in `peft.LoraConfig`.
        config: keyword arguments of the transformers configuration.
    """

    name: str
    family: str
    depth: int
    target_modules: tuple[str, ...]
    config: dict[str, Any]

    @property
    def masked(self) -> bool:
        """Whether it fills in masked bytes, instead of predicting the next one."""
        return self.family == "bert"


POSITIONS = 128
"""The longest window that a base can read."""


def _llama(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": {32: 88, 64: 176}[width],
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return ProxyBase(f"llama-{depth}x{width}", "llama", depth, targets, config)


def _bert(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": MASK_TOKEN + 1,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.06,  # for narrow layers; the usual 0.02 learns nothing here
        "pad_token_id": None,
    }
    targets = ("query", "key", "value", "output.dense", "intermediate.dense")
    return ProxyBase(f"bert-{depth}x{width}", "bert", depth, targets, config)


def _gpt2(depth: int, width: int) -> ProxyBase:
    config = {
        "vocab_size": 256,
        "n_embd": width,
        "n_layer": depth,
        "n_head": 4,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return ProxyBase(f"gpt2-{depth}x{width}", "gpt2", depth, ("c_attn", "c_proj", "c_fc"), config)


PROXY_BASES = {
    base.name: base
    for base in (make(depth, width) for make in (_llama, _bert, _gpt2) for depth in (4, 8) for width in (32, 64))
}
"""Bases by name."""


def find_base(name: str) -> ProxyBase:
    """The proxy base of that name; UnknownNameError if there is none."""
    if name not in PROXY_BASES:
        raise UnknownNameError.of("proxy base", name, PROXY_BASES)
    return PROXY_BASES[name]


@dataclass(frozen=True)
class Reference:
    """What fixed allocations of a task achieve, held-out losses in nats.

    Attributes:
        initial: before training.
        uniform: after the run of `uniform_ranks` within the task's budget.
        best: after the run of the oracle (planted tasks) or of rank 32 everywhere, whatever it costs; None if unknown.
    """

    initial: float
    uniform: float
    best: float | None = None

    @property
    def gain(self) -> float:
        """What the uniform run gained; at least 1 % of the initial loss, so that it can be divided by."""
        return max(self.initial - self.uniform, 0.01 * self.initial, 1e-6)

    @property
    def headroom(self) -> float:
        """What a better allocation could gain over uniform, nearly; at least 5 % of what uniform gained.

        Where `best` is unknown, a tenth of what uniform gained.
        """
        if self.best is None:
            return 0.1 * self.gain
        return max(self.uniform - self.best, 0.05 * self.gain)


class FineTune(Hashable, Protocol):
    """What an episode needs of a fine-tune; `ProxyFineTune` and `OwnTask` are the two there are."""

    @property
    def seed(self) -> int:
        """Decides data and adapters."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def batch_size(self) -> int:
        """Rows a step."""

    @property
    def learning_rate(self) -> float:
        """Peak of a linear decay."""

    @property
    def id(self) -> str:
        """A readable name."""

    @property
    def limit(self) -> Budget:
        """The budget."""

    @property
    def predicted(self) -> float:
        """Share of the tokens whose prediction the loss counts, above 0."""

    @property
    def reference(self) -> Reference | None:
        """What fixed allocations achieve, if it is known already."""

    @property
    def known(self) -> dict[Hashable, Any]:
        """What episodes have found out about it, such as its probe; the same object each time."""

    def adapted(self) -> tuple[PeftModel, list[TargetModule]]:
        """The model with a LoRA pair on every target module; the same object each time."""

    def cost(self) -> UntimedCost:
        """What a plan costs."""

    def train_loss(self, model: torch.nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """Loss of the batch of one step, or of its first rows, in nats."""

    def held_out_loss(self, model: torch.nn.Module) -> float:
        """Loss on the held-out set, in nats."""


Kind = Literal["planted", "shift", "classify"]
Placement = Literal["low", "high", "spread"]
CostKind = Literal["bytes", "checkpointed", "large batch", "parameters"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(frozen=True)
class ProxyTask:
    """One proxy fine-tune, fully determined by its fields.

    Attributes:
        kind: "planted", "shift" or "classify".
        seed: of data, teacher and adapters.
        base: name of a proxy base.
        budget: share of what rank 8 on all modules takes, > 0.
        unit: what is counted: "bytes" at the peak of a step, or "parameters" of the adapter.
        checkpointing: whether bytes are those of a step with gradient checkpointing. Losses do not depend on it.
        priced_rows: rows of the step whose bytes are counted, more than batch_size; batch_size if None. A proxy can
            afford few tokens a step, which makes ranks dear beside activations; with more rows ranks are as cheap as in
            large fine-tunes. Losses do not depend on it.
        placement: which layers a planted teacher changes; unused otherwise.
        corpus: the text (one of `CORPORA`) that a planted teacher is queried on or a shift leads to, or the labelled
            texts (one of `LABELS`) of a classification.
        steps: optimizer steps.
        batch_size: rows a step.
        length: tokens a row.
        eval_rows: rows of the held-out set.
        learning_rate: peak of a linear decay; on instances of suites tuned for uniform rank.
        reference: what uniform and the best known allocation achieve; measured when it is needed if it is None.

    Raises:
        ConfigError: a value out of range.
    """

    kind: Kind
    seed: int
    base: str = "llama-4x64"
    budget: float = 0.7
    unit: Unit = "bytes"
    checkpointing: bool = False
    priced_rows: int | None = None
    placement: Placement = "spread"
    corpus: str = "code"
    steps: int = 100
    batch_size: int = 4
    length: int = 32
    eval_rows: int = 192
    learning_rate: float = 5e-3
    reference: Reference | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("placement", self.placement, PLACEMENTS),
            ("unit", self.unit, get_args(Unit)),
        ):
            if value not in allowed:
                raise ConfigError(f"The {name} of a task is one of {allowed}; got {value!r}.")
        find_base(self.base)
        check_seed(self.seed)
        counts = (self.steps, self.batch_size, self.eval_rows, self.length)
        if not all(map(is_count, counts)) or not 2 <= self.length <= POSITIONS:
            raise ConfigError(
                f"Steps, batch_size and eval_rows of a task are whole numbers of at least 1, and length is one from 2 "
                f"to {POSITIONS}; got {', '.join(map(repr, counts[:-1]))} and {self.length!r}."
            )
        if self.priced_rows is not None and not (is_count(self.priced_rows) and self.priced_rows > self.batch_size):
            raise ConfigError(
                f"The priced_rows of a task are None or a whole number above its batch_size of {self.batch_size}; got "
                f"{self.priced_rows!r}."
            )
        if not is_positive(self.budget) or not is_positive(self.learning_rate):
            raise ConfigError(
                "Budget and learning rate of a task are above 0, and finite numbers; got "
                f"{self.budget!r} and {self.learning_rate!r}."
            )

    @property
    def id(self) -> str:
        """A readable name, unique among tasks that differ in kind, place, budget or seed."""
        where = self.placement if self.kind == "planted" else self.corpus
        counted = self.cost_kind if self.priced_rows is None else f"{self.cost_kind} of {self.priced_rows}"
        return f"{self.base}/{self.kind}-{where}/{self.budget:.3g} {counted}/{self.seed}"

    @property
    def stack(self) -> tuple[str, int, int]:
        """What tasks have in common whose episodes can share a stack: base, rows of a step, and tokens of a row."""
        return self.base, self.batch_size, self.length

    @property
    def cost_kind(self) -> CostKind:
        """What is counted: "bytes", "checkpointed" bytes, those of a "large batch", or "parameters"."""
        if self.unit == "parameters" or not (self.checkpointing or self.priced_rows):
            return self.unit
        return "checkpointed" if self.checkpointing else "large batch"


VERSION = 4
"""Rises when a suite's tasks or results change."""

FOLDER = Path(__file__).parent / "suite_cards"

FRESH_SEEDS = 10_000_000
"""Seeds of fresh tasks lie above this, those of suites below."""


@lru_cache(maxsize=len(SUITES) * len(SPLITS))
def load_suite(name: str, split: str) -> tuple[ProxyTask, ...]:
    """The tasks of one split of a suite, each with its `reference`.

    Raises:
        UnknownNameError: no such suite or split.
    """
    if name not in SUITES:
        raise UnknownNameError.of("suite", name, SUITES)
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    return tuple(_task(card) for card in read_json(FOLDER / f"{name}-{split}.json")["tasks"])


def _task(card: dict[str, Any]) -> ProxyTask:
    return ProxyTask(**{**card, "reference": Reference(**card["reference"])})


def find_tasks(
    suites: Sequence[str], split: str, bases: Sequence[str] | None = None, overrides: dict[str, Any] | None = None
) -> tuple[ProxyTask, ...]:
    """The tasks of some suites, in a fixed order.

    Args:
        suites: names of `SUITES`; each counts once.
        split: one of `SPLITS`.
        bases: only those on these proxy bases.
        overrides: fields of `ProxyTask` that each gets; their references are dropped then, and measured when needed.

    Raises:
        UnknownNameError: no such suite, split or base.
        ConfigError: there are none.
    """
    for base in bases or ():
        find_base(base)
    tasks = [
        task for suite in dict.fromkeys(suites) for task in load_suite(suite, split) if not bases or task.base in bases
    ]
    if not tasks:
        raise ConfigError(
            f"No task of the {split} split of {tuple(suites)} is on {tuple(bases or ())}. Suites are {SUITES}; bases "
            f"are {tuple(PROXY_BASES)}, of which each split has some."
        )
    return tuple(_overridden(tasks, overrides) if overrides else tasks)


def _overridden(tasks: Sequence[ProxyTask], overrides: dict[str, Any]) -> list[ProxyTask]:
    """The tasks with other fields."""
    if not isinstance(overrides, dict):
        raise ConfigError(f"task_overrides are a dictionary of fields of ProxyTask; got {overrides!r}.")
    names = [field.name for field in fields(ProxyTask)]
    for name in overrides:
        if name not in names:
            raise UnknownNameError.of("field of ProxyTask", str(name), names)
    try:
        return [replace(task, **{"reference": None, **overrides}) for task in tasks]
    except TypeError as error:
        raise ConfigError(f"task_overrides hold a value of a wrong type, {overrides!r}: {first_line(error)}") from error


def evenly(tasks: Sequence[ProxyTask], count: int) -> tuple[ProxyTask, ...]:
    """So many of some tasks, evenly spread over their order; all of them if there are fewer."""
    count = min(count, len(tasks))
    return tuple(tasks[index * len(tasks) // count] for index in range(count))


def check_task(task: object) -> None:
    """Raise ConfigError if it is neither None nor a task of any kind."""
    if task is not None and not isinstance(task, ProxyTask) and not callable(getattr(task, "adapted", None)):
        raise ConfigError(f"task is a ProxyTask or an OwnTask; got {task!r}.")


def fresh_task(template: ProxyTask, generator: np.random.Generator) -> ProxyTask:
    """The template with a seed that no suite has: another teacher, data and adapters.

    It keeps the template's reference, as a measure of how the headroom compares with what uniform gains.
    """
    return replace(template, seed=FRESH_SEEDS + int(generator.integers(2**30)))


class TaskStream:
    """Tasks drawn without end, each as likely as the others.

    Args:
        tasks: to draw from.
        generator: draws.
        fresh_seeds: whether each drawn task gets a fresh seed; only proxy tasks can.
    """

    def __init__(
        self, tasks: Sequence[ProxyTask | FineTune], generator: np.random.Generator, *, fresh_seeds: bool = False
    ) -> None:
        self._tasks, self._generator, self._fresh_seeds = tasks, generator, fresh_seeds

    def take(self, options: Mapping[str, Any] | None = None) -> ProxyTask | FineTune:
        """The task of the next episode.

        Args:
            options: of `reset`: "task" in place of a drawn one; "budget", as a share of what rank 8 on all modules
                takes.

        Raises:
            ConfigError: an unknown option, or a budget that the task cannot have.
        """
        options = options or {}
        unknown = sorted(set(options) - {"task", "budget"})
        if unknown:
            raise ConfigError(f"Options of reset are 'task' and 'budget'; got {unknown}.")
        given = options.get("task")
        check_task(given)
        task: ProxyTask | FineTune = self._draw() if given is None else given
        if "budget" not in options:
            return task
        budget = options["budget"]
        if not is_real(budget):
            raise ConfigError(
                f"The option budget is a share of what rank 8 on all modules takes, such as 0.5; got {shown(budget)}."
            )
        if not isinstance(task, ProxyTask):
            raise ConfigError(f"The option budget is for proxy tasks; give task {task.id} its budget when you make it.")
        return replace(task, budget=float(budget), reference=None)

    def _draw(self) -> ProxyTask | FineTune:
        task = self._tasks[int(self._generator.integers(len(self._tasks)))]
        return fresh_task(task, self._generator) if self._fresh_seeds and isinstance(task, ProxyTask) else task
