"""``python -m llqr_lab.cli``: the command line, for ``torchrun -m``."""

import sys

from .commands.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
