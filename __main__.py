"""The command line: `rankpilot`, or `python -m rankpilot`."""

import signal
import sys

from .common.quiet import silence_libraries


def main() -> None:
    """Entry point of the `rankpilot` script; libraries are silenced before anything loads them, save those of `run`."""
    if sys.argv[1:2] != ["run"]:
        silence_libraries()
    from .cli.main import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a command in order, as Ctrl-C does
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
