"""`python -m stepfold`."""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command line; an interruption while it is still being imported is one line too."""
    try:
        from stepfold.cli import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written.\n")
        return 1


if __name__ == "__main__":
    sys.exit(run())
