"""``python -m llqr_lab``: the command line ``llqr``."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
