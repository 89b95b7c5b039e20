"""The command line: `rankpilot`, or `python -m rankpilot`."""

import sys

from .common.quiet import silence_libraries


def main() -> None:
    """Entry point of the `rankpilot` script; libraries are quieted before anything loads them, but those of a program."""
    if sys.argv[1:2] != ["run"]:
        silence_libraries()
    from .cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
