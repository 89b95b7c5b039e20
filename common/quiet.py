"""Quiet libraries, so that the command line and its workers print only rankpilot's messages."""

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
    "TQDM_DELAY": "1",  # no bar for what is done in a second, such as loading the weights of a small model
}
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that warn of missing kernels when PEFT imports torchao and bitsandbytes; nothing here uses these kernels."""


def silence_libraries() -> None:
    """Quiet the libraries that this process and its children will import; call this before they do."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)


def silence_missing_kernels() -> None:
    """Keep libraries from warning at every start of kernels that are not used, unless their user has set a level."""
    for name in _NOISY:
        if not (found := logging.getLogger(name)).level:
            found.setLevel(logging.ERROR)


def silence_worker() -> None:
    """Quiet the libraries of a worker of a quiet process as `silence_libraries` does."""
    if "RANKPILOT_QUIET" in os.environ:
        silence_libraries()
