"""Silence libraries, so the command line and its workers print only rankpilot's messages."""

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
    "TQDM_DELAY": "1",  # no bar for work done within a second, such as loading a small model's weights
}
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers with warnings on missing kernels when PEFT imports torchao and bitsandbytes; these kernels are not used."""


def silence_libraries() -> None:
    """Silence the libraries imported by this process and its children; call this before the imports."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)


def silence_missing_kernels() -> None:
    """Suppress warnings on unused kernels at every start, unless the user has set a log level."""
    for name in _NOISY:
        if not (found := logging.getLogger(name)).level:
            found.setLevel(logging.ERROR)


def silence_worker() -> None:
    """Silence a quiet process's worker the same way as `silence_libraries`."""
    if "RANKPILOT_QUIET" in os.environ:
        silence_libraries()
