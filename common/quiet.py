"""Only our own words on the screen, in the command line's process and its workers."""

from __future__ import annotations

import logging
import os
import warnings

_SETTINGS = {
    "RANKPILOT_QUIET": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""They speak while PEFT imports torchao and bitsandbytes, of kernels and internals that nothing here uses."""


def silence_libraries() -> None:
    """Quiet what this process and those that it starts will load; call before they load it."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_worker() -> None:
    """The same in a process that was started by a quiet one."""
    if "RANKPILOT_QUIET" in os.environ:
        silence_libraries()
