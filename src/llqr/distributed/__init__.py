"""Several processes: what they agree on, and how U is sharded among them."""

from ._ranks import Ranks as Ranks
