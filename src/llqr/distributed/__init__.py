"""Several processes: what they agree on, and how U is shared out among them."""

from ._ranks import Ranks as Ranks
