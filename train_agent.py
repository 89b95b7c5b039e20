"""Train a policy: the same as `rankpilot policy train`, with the same options."""

import sys

from rankpilot.__main__ import main

if __name__ == "__main__":
    sys.argv[1:] = ["policy", "train", *sys.argv[1:]]
    main()
