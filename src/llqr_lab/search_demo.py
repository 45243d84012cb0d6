"""``python -m llqr_lab.search_demo``: search settings of the demo's methods."""

import sys

from .demo.search import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
