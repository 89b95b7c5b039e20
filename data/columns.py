"""The task and the columns of a data set, with a check of every row.

Conversations and instructions come in several common formats, converted to the columns of TRL's SFTTrainer:

| columns | what they hold | become |
|---|---|---|
| `messages` | a list of {role, content} | themselves |
| `conversations` | a list of {from, value} (ShareGPT), or of {role, content} | `messages` |
| `prompt`, `completion` | texts, or lists of {role, content} | themselves |
| `instruction`, `input` (may be missing or empty), `output` | texts (Alpaca) | `prompt`, `completion` |

Conversations may call tools: the additional column `tools` holds the tool descriptions for the model (JSON, as a list
or as text), and messages may have `tool_calls`, `tool_call_id` and `name`. The column `chat_template_kwargs` holds
further variables of the chat template (a dictionary or its JSON text), such as `enable_thinking`.

Instructions become messages if the tokenizer has a chat template, and otherwise text under headings.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import datasets
from datasets import Dataset

from ..common.errors import ConfigError, DataError, UnknownNameError
from ..common.files import parse_json
from .batches import IGNORED
from .task import Task

TEXT, LABEL = "text", "label"
"""Default column names."""

CHATS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""Columns of conversations or instructions, in order of preference."""

_TEXTS: dict[Task, tuple[str, ...]] = {"token-classification": ("tokens",), "seq2seq": ("input", "source", "prompt")}
_TAGS, _TARGETS = ("tags", "ner_tags"), ("target", "output", "completion")
_LABELS: dict[Task, tuple[str, ...]] = {"token-classification": _TAGS, "seq2seq": _TARGETS}


@dataclass(frozen=True)
class Columns:
    """Task and columns of a data set.

    Attributes:
        task: the task to learn.
        text: column with the model's input; None if `chat` is given.
        label: column with the target; None for language modeling.
        chat: columns of conversations or instructions, one of `CHATS`; None for other data.
    """

    task: Task
    text: str | None
    label: str | None
    chat: tuple[str, ...] | None = None


def find_columns(part: Dataset, task: Task | None, text: str, label: str, *, reads_chats: bool = True) -> Columns:
    """Find the task and the columns of a data set.

    Args:
        part: some of its rows.
        task: the task; None to infer it from the columns.
        text: given name of the text column; `TEXT` if none was given.
        label: given name of the column with the class, the number, the tags or the target; `LABEL` if none was given.
        reads_chats: True if the tokenizer has a chat template. Otherwise, a text column is preferred over a
            conversation.

    Raises:
        UnknownNameError: the data set lacks a column.
        DataError: the task does not follow from the label column.
    """
    names = part.column_names
    task = task or _task_of(part, text, label)
    if task == "causal-lm":
        forms = CHATS if reads_chats or TEXT not in names else CHATS[2:]
        chat = next((columns for columns in forms if text == TEXT and set(columns) <= set(names)), None)
        return Columns(task, None if chat else _present("text", text, names, ()), None, chat)
    found = _present("text", text, names, _TEXTS.get(task, ()))
    return Columns(task, found, _present("label", label, names, _LABELS.get(task, ())))


def _present(kind: str, given: str, names: Sequence[str], others: Sequence[str]) -> str:
    """Return the given column, or if it is a missing default, the first existing one of the others."""
    candidates = [given, *others] if given in (TEXT, LABEL) else [given]
    for name in candidates:
        if name in names:
            return name
    raise UnknownNameError.of(f"{kind} column", given, names, f"Set --{kind}-column.")


def _task_of(part: Dataset, text: str, label: str) -> Task:
    """Infer the task from the columns; DataError for fractions, which may be classes or amounts."""
    names = set(part.column_names)
    if label in names and (text in names or label != LABEL):
        if is_list(part, label) and is_list(part, text):
            return "token-classification"
        if not is_list(part, label) and _dtype(part, label).startswith("float"):
            check_no_gaps(part, label)  # a common cause of fractions
            first = next(iter(part[label]), None)
            advice = "to treat each value as a class, pass --task classification"
            told = f"Column {label!r} contains fractions (row 1: {first})."
            raise DataError(f"{told} To predict numbers, pass --task regression; {advice}.")
        return "classification"
    if text == TEXT and label == LABEL:
        if any(set(columns) <= names for columns in CHATS):
            return "causal-lm"
        for other, texts in _TEXTS.items():
            if TEXT not in names and names & {*texts} and names & {*_LABELS[other]}:
                return other
    return "classification" if label in names else "causal-lm"


def is_list(part: Dataset, name: str) -> bool:
    """True if a column exists and holds lists."""
    feature = part.features.get(name)
    return isinstance(feature, list) or hasattr(feature, "feature")


def _dtype(part: Dataset, name: str) -> str:
    return str(getattr(part.features[name], "dtype", ""))


def values_of(part: Dataset, name: str) -> list[Any]:
    """Values of a column, one per row."""
    return list(part[name][:])


def check_no_gaps(part: Dataset, name: str, *, blanks: bool = True) -> None:
    """Raise DataError if a row lacks a value; with `blanks`, an empty text counts as a value."""
    values = values_of(part, name)
    given = values if blanks else [value.strip() or None if isinstance(value, str) else value for value in values]
    gaps = [row for row, value in enumerate(given, 1) if value is None]
    if gaps:
        told = f"Column {name!r} has no value in {len(gaps)} of {len(part)} rows, first in row {gaps[0]}."
        raise DataError(f"{told} Remove these rows, or fill them.")


def check_filled(part: Dataset, name: str, advice: str) -> None:
    """Raise DataError if all texts of a column are blank; `advice` is a sentence on the fix."""
    if not any(value.strip() for value in part[name]):
        raise DataError(f"Column {name!r} is blank in all {len(part)} rows, so there is nothing to learn. {advice}")


def check_rows(part: Dataset, name: str, flaw: Callable[[Any], str | None], advice: str) -> None:
    """Raise DataError at the first row with an invalid value in a column.

    Args:
        part: the rows.
        name: the column.
        flaw: describes an invalid value, for example "a number"; returns None for a valid one.
        advice: a sentence on the fix.
    """
    for row, value in enumerate(values_of(part, name), 1):
        wrong = flaw(value)
        if wrong is not None:
            raise DataError(f"Row {row}, column {name!r}: {shorten(value)} is {wrong}. {advice}")


def shorten(value: Any) -> str:
    """Shorten a value for an error: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def not_text(value: Any) -> str | None:
    """Describe a value if it is not a text."""
    return None if isinstance(value, str) else f"{kind_of(value)}, not text"


def not_list(value: Any) -> str | None:
    """Describe a value if it is not a list."""
    return None if isinstance(value, list) else kind_of(value)


def kind_of(value: Any) -> str:
    """Describe a value for an error."""
    words: dict[type, str] = {list: "a list", dict: "a record", bool: "true or false", str: "text", type(None): "empty"}
    words |= dict.fromkeys((int, float), "a number")
    return words.get(type(value), f"of type {type(value).__name__}")


def not_number(value: Any) -> str | None:
    """Describe a value if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "not a number"
    return None if math.isfinite(number) else "not a finite number"


logger = logging.getLogger(__name__)

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Chat-template roles of ShareGPT senders; any other sender is already a role."""

TOOLS = "tools"
"""Column with the descriptions of available tools, and the chat-template variable for them."""

VARIABLES = "chat_template_kwargs"
"""Column with further chat-template variables, as named in TRL."""

_CALLS = ("tool_calls", "tool_call_id", "name")
"""Optional keys of a message in addition to role and content."""

_WITH_INPUT = "Below is a task with an input that belongs to it. Write a response that completes the task."
_WITHOUT_INPUT = "Below is a task. Write a response that completes it."


def check_chats(part: Dataset, columns: tuple[str, ...], tokenizer: Any) -> None:
    """Check each row of conversations or instructions, and check that the tokenizer can read them.

    Raises:
        DataError: a row's values do not match its columns.
        ConfigError: there are conversations, and the tokenizer has no chat template.
    """
    for name in columns:
        check_no_gaps(part, name)
    first = part[0]
    if columns == ("instruction", "output"):
        for name in columns:
            check_rows(part, name, not_text, "Instructions and outputs must be text.")
        check_filled(part, "output", "Fill it with the answers the model should give.")
        if "input" in part.column_names:
            check_rows(part, "input", lambda value: None if value is None else not_text(value), "Inputs must be text.")
        return
    if columns == ("prompt", "completion") and isinstance(first["prompt"], str):
        for name in columns:
            check_rows(part, name, not_text, "Prompts and completions must be both text, or both lists of messages.")
        check_filled(part, "completion", "Fill it with the answers the model should give.")
        return
    keys = "the keys role and content (or from and value)"
    advice = f"A conversation must be a list of messages, each with {keys}, both text."
    for name in columns:
        check_rows(part, name, _not_messages, advice)
    if not tokenizer.chat_template:
        needs = "the model's tokenizer has no chat template to turn them into text"
        clone = "`trl.clone_chat_template(model, tokenizer, 'Qwen/Qwen3-0.6B')`, save both to a folder and pass that"
        advice = f"Use a model with one, such as an instruct version; or add ChatML with {clone}."
        raise ConfigError(f"Column {columns[0]!r} contains conversations, but {needs}. {advice}")
    _check_tools(part, columns, tokenizer)


def _check_tools(part: Dataset, columns: tuple[str, ...], tokenizer: Any) -> None:
    """Raise DataError if a row's tools or variables are invalid, ConfigError if the template ignores tools."""
    if TOOLS in part.column_names:
        advice = "rename the column if it contains something else"
        check_rows(part, TOOLS, _not_tools, f"Tools must be a list of JSON schemas, or its JSON text; {advice}.")
    if VARIABLES in part.column_names:
        check_rows(part, VARIABLES, _not_variables, "Chat template variables must be a dictionary, or its JSON text.")
    held = {TOOLS: _has_tools(part), _CALLS[0]: _has_calls(part, columns)}
    left_out = [name for name, there in held.items() if there and name not in str(tokenizer.chat_template)]
    if left_out:
        ignored = f"{' and '.join(left_out)}, which the chat template of the model's tokenizer ignores"
        advice = "Use a model whose template supports tools, or remove them from the data."
        raise ConfigError(f"The conversations have {ignored}. {advice}")


def _not_tools(value: Any) -> str | None:
    """Describe a value if it holds no tools."""
    try:
        tools = _tools_of(value)
    except ValueError:
        return "not JSON"
    return None if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools) else "not a list of tools"


def _not_variables(value: Any) -> str | None:
    """Describe a value if it holds no chat-template variables."""
    try:
        return None if isinstance(_variables_of(value), dict) else "not a dictionary"
    except ValueError:
        return "not JSON"


def _tools_of(value: Any) -> Any:
    """Tool descriptions in a list or its JSON text; an empty list if there are none."""
    tools = _from_json(value)
    return [] if tools is None else tools


def _variables_of(value: Any) -> Any:
    """Variables in a dictionary or its JSON text; an empty dictionary if there are none."""
    variables = _from_json(value)
    return {} if variables is None else variables


def _from_json(value: Any) -> Any:
    """Return a value, parsed if it is JSON text, without gaps; None for an empty text."""
    if isinstance(value, str):
        return parse_json(value) if value.strip() else None
    return _without_gaps(value)


def _without_gaps(value: Any) -> Any:
    """Drop keys with value None, added by a table if other rows have more keys."""
    if isinstance(value, dict):
        return {key: _without_gaps(inner) for key, inner in value.items() if inner is not None}
    return [_without_gaps(inner) for inner in value] if isinstance(value, list) else value


def _has_tools(part: Dataset) -> bool:
    return TOOLS in part.column_names and any(map(_tools_of, part[TOOLS]))


def _has_calls(part: Dataset, columns: tuple[str, ...]) -> bool:
    return any(message.get(_CALLS[0]) for name in columns for messages in part[name] for message in messages)


def _not_messages(value: Any) -> str | None:
    """Describe a value if it is not a conversation."""
    if not isinstance(value, list):
        return f"{kind_of(value)}, not a list of messages"
    if not value:
        return "an empty list"
    for message in value:
        if not isinstance(message, dict):
            return f"a list containing {shorten(message)}"
        role, content = _parts(message)
        if message.get(_CALLS[0]) and content is None:
            content = ""
        if not isinstance(role, str) or not isinstance(content, str):
            given = {key: part for key, part in message.items() if part is not None}
            return f"a list with the message {shorten(given)}"
    return None


def _parts(message: dict[str, Any]) -> tuple[Any, Any]:
    """Role and content of a message, or its sender and value."""
    if message.get("role") is not None or message.get("content") is not None:
        return message.get("role"), message.get("content")
    sender = message.get("from")
    return ROLES.get(sender, sender) if isinstance(sender, str) else sender, message.get("value")


def for_trl(part: Dataset, columns: tuple[str, ...], tokenizer: Any) -> Dataset:
    """Convert checked rows to the columns `messages`, or `prompt` and `completion`.

    Conversations keep their tools, as JSON text, and their chat-template variables, if any.
    """
    if columns == ("instruction", "output"):
        make = _as_messages if tokenizer.chat_template else _as_text
        old = part.column_names
        return part.map(lambda row: make(row["instruction"], row.get("input") or "", row["output"]), remove_columns=old)
    if isinstance(part[0][columns[0]], str):
        return part.select_columns(list(columns))
    names = {name: "messages" if name == "conversations" else name for name in columns}
    has_tools, has_calls = _has_tools(part), _has_calls(part, columns)
    has_variables = VARIABLES in part.column_names and any(map(_variables_of, part[VARIABLES]))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {names[name]: [_called(message) for message in row[name]] for name in columns}
        if has_tools:
            made[TOOLS] = json.dumps(_tools_of(row[TOOLS]))
        if has_variables:
            made[VARIABLES] = _variables_of(row[VARIABLES])
        return made

    features = None
    more_keys = any(message.get(key) for name in columns for row in part[name] for message in row for key in _CALLS)
    if (has_calls or has_variables) and hasattr(datasets, "Json"):  # a table would give all rows the same keys
        text = datasets.Value("string")
        message = datasets.Json() if more_keys else {"role": text, "content": text}
        kinds = {name: [message] for name in names.values()}
        more = {TOOLS: text} if has_tools else {}
        features = datasets.Features(kinds | more | ({VARIABLES: datasets.Json()} if has_variables else {}))
    return part.map(convert, features=features, remove_columns=part.column_names)


def _called(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its tool calls."""
    role, content = _parts(message)
    calls = {name: _without_gaps(message[name]) for name in _CALLS if message.get(name)}
    return {"role": role, "content": content or ""} | calls


def _as_messages(instruction: str, context: str, output: str) -> dict[str, Any]:
    """Convert an instruction to a user message, and the output to an assistant message."""
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    prompt, completion = {"role": "user", "content": asked}, {"role": "assistant", "content": output}
    return {"prompt": [prompt], "completion": [completion]}


def _as_text(instruction: str, context: str, output: str) -> dict[str, Any]:
    """Convert an instruction to text under headings, and the output to its continuation."""
    given = f"\n\n### Input:\n{context}" if context.strip() else ""
    lead = _WITH_INPUT if given else _WITHOUT_INPUT
    return {"prompt": f"{lead}\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n", "completion": output}


def encoded(rows: Dataset, tokenizer: Any, length: int) -> tuple[Dataset, Dataset]:
    """Tokenize rows of `for_trl` as SFTTrainer does: a prompt's labels are `IGNORED`, and long rows are truncated.

    Returns:
        The rows, and their tokens. Rows with nothing left to learn after truncation are dropped from both.

    Raises:
        DataError: no row is left.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids, shared = chat_tokens(row, tokenizer)
        return {"input_ids": ids[:length], "labels": ([IGNORED] * shared + ids[shared:])[:length]}

    tokens = rows.map(encode, remove_columns=rows.column_names)
    kept = [row for row, labels in enumerate(tokens["labels"]) if set(labels) - {IGNORED}]
    if not kept:
        raise DataError(f"No prompt leaves room for its completion within {length} tokens. Raise --max-length.")
    if len(kept) < len(rows):
        told = "%d of %d rows were dropped: their prompts alone take %d tokens. Raise --max-length to use them."
        logger.warning(told, len(rows) - len(kept), len(rows), length)
    return rows.select(kept), tokens.select(kept)


def chat_tokens(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """All tokens of a row of `for_trl`, and the number of prompt tokens."""
    variables = {TOOLS: _tools_of(row.get(TOOLS)) or None} | _variables_of(row.get(VARIABLES))
    if "messages" in row:
        return _ids(tokenizer, row["messages"], variables), 0
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, str):
        completion = completion.removesuffix(tokenizer.eos_token or "") + (tokenizer.eos_token or "")
    ids = _ids(tokenizer, prompt + completion, variables)
    pairs = zip(_ids(tokenizer, prompt, variables, asks=True), ids, strict=False)
    return ids, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


SAMPLED = 1000
"""Maximum rows tokenized to estimate the truncated share."""

MUCH_CUT = 0.05
"""Truncated share of tokens above which a message is logged."""


def tell_cut(counts: Iterable[int], length: int) -> None:
    """Log a message if a maximum length truncates much of some rows.

    Args:
        counts: tokens of each row before truncation.
        length: maximum tokens per row.
    """
    tokens = list(counts)
    cut = sum(max(count - length, 0) for count in tokens) / max(sum(tokens), 1)
    if cut > MUCH_CUT:
        told = "%.0f %% of the tokens are truncated: rows have at most %d, and the longest text has %d."
        told += " --max-length %d keeps all, but takes more memory."
        logger.warning(told, 100 * cut, length, max(tokens), max(tokens))


def _ids(tokenizer: Any, content: Any, variables: dict[str, Any], *, asks: bool = False) -> list[int]:
    """Tokens of a text, or of messages; with `asks`, including the template's generation prompt.

    `variables` are chat-template variables, tools included.
    """
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": asks}
    return list(tokenizer.apply_chat_template(content, **variables, **options)["input_ids"])
