"""The quadratic model of the loss on flat vectors, averaged over the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...curvature import QuadraticModel
from ...distributed import Ranks
from ..layout import Layout

__all__ = ["FlatModel", "pack_mean"]


def pack_mean(
    values: Sequence[Tensor], layout: Layout, names: Sequence[str], ranks: Ranks | None
) -> Tensor:
    """Return this process's shard of the mean of tensors over all processes, flat."""
    # The vectors of all shards, one behind the other, so that one all-reduce averages them.
    joined = layout.pack_all_shards(dict(zip(names, values, strict=True)))
    if ranks is not None:
        joined = ranks.mean_(joined)
    return layout.shard_of_this_rank(joined)


class FlatModel:
    """A quadratic model in the flat order of a layout: the mean of those of all processes.

    Args:
        model: the model of this process.
        layout: of the flat vectors.
        names: of the model's parameters, in its order.
        ranks: the processes; None: this one.
        on_product: is called after each product.

    Attributes:
        gradient: g, flat.
        model: the model of this process, on lists of tensors.
    """

    def __init__(
        self,
        model: QuadraticModel,
        layout: Layout,
        names: Sequence[str],
        ranks: Ranks | None = None,
        on_product: Callable[[], None] | None = None,
    ) -> None:
        self._on_product = on_product
        self.model, self._layout, self._names, self._ranks = model, layout, names, ranks
        self.gradient = self._pack_mean(model.gradient)
        model.gradient = []  # one copy is enough while directions fill the memory

    def _pack_mean(self, values: Sequence[Tensor]) -> Tensor:
        return pack_mean(values, self._layout, self._names, self._ranks)

    def product(self, d: Tensor) -> Tensor:
        """Return C d."""
        # flat d -> tensors -> C d of this process -> mean over processes -> flat, our shard
        tensors = self._layout.unpack(d)
        image = self._pack_mean(self.model.product([tensors[n] for n in self._names]))
        if self._on_product is not None:
            self._on_product()
        return image
