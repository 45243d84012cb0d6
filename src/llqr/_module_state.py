"""Save and restore what a second pass or a refresh changes.

That is: buffers, and parameters that a forward writes to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._vectors import copies_of, copy_all
from .distributed._sharded import WHOLE

__all__ = [
    "Buffers",
    "ForwardState",
    "ParameterValues",
    "TensorValues",
    "WrittenParameters",
]


# Attributes that are read of many tensors or modules in a row, without a loop in Python.
LAYOUT, SHAPE, VERSION = attrgetter("layout"), attrgetter("shape"), attrgetter("_version")
QUANTIZED, META = attrgetter("is_quantized"), attrgetter("is_meta")
BUFFERS = attrgetter("_buffers")

# -- values of tensors -----------------------------------------------------------------------------


class TensorValues:
    """The values of some tensors at one moment.

    Args:
        tensors: of any layout; one that is given twice is kept once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._plain, self._memory, self._copies = list[Tensor](), list[Tensor](), list[Tensor]()
        self._versions, self._others = list[int](), list[tuple[Tensor, Tensor]]()
        unique = list({id(t): t for t in tensors if not is_lazy(t)}.values())
        if not unique:
            return
        self._plain = plain_among(unique)
        # The memory they lie in, since `tensor.data = other` makes them point elsewhere.
        self._memory = [t.data for t in self._plain]
        self._places = places_of(self._memory)
        self._versions = list(map(VERSION, self._plain))
        self._copies = copies_of(self._memory)
        plain = len(self._plain) == len(unique)
        others = () if plain else [t for t in unique if not is_plain(t)]
        self._others = [(t, t.detach().clone()) for t in others]

    def restore(self) -> None:
        """Write the values back, into the very tensors and the very memory that held them."""
        if not (self._plain or self._others):
            return
        with torch.no_grad():
            if places_of(self._plain) != self._places:
                for tensor, memory in zip(self._plain, self._memory, strict=True):
                    if not lies_in(tensor, memory):
                        tensor.data = memory
            # A write through .data is not counted. Where nothing else was counted either, the
            # graphs that saved the tensor stay valid.
            kept = zip(self._plain, self._memory, self._versions, strict=True)
            targets = [m if tensor._version == v else tensor for tensor, m, v in kept]
            copy_all(targets, self._copies)
            for tensor, value in self._others:
                write_to_any(tensor, value)

    def changed(self, *, by_value: bool) -> list[Tensor]:
        """Return the tensors that were written to since; those of other layouts are not told.

        Args:
            by_value: compare entries too, which finds what was written through ``.data``.
        """
        kept = zip(self._plain, self._memory, self._versions, self._copies, strict=True)
        return [
            tensor
            for tensor, memory, version, copy in kept
            if tensor._version != version
            or not lies_in(tensor, memory)
            or (by_value and not torch.equal(tensor, copy))
        ]


def is_plain(tensor: Tensor) -> bool:
    """Tell whether many such tensors may be copied in one call."""
    return (
        type(tensor) in WHOLE
        and tensor.layout is torch.strided
        and not tensor.is_inference()
        and not (tensor.is_quantized or tensor.is_meta)
        and 0 not in tensor.stride()
    )


def plain_among(tensors: list[Tensor]) -> list[Tensor]:
    """Return those of some tensors that are plain."""
    usual = (
        WHOLE.issuperset(map(type, tensors))
        and {torch.strided}.issuperset(map(LAYOUT, tensors))
        and not any(map(Tensor.is_inference, tensors))
        and not any(map(QUANTIZED, tensors))
        and not any(map(META, tensors))
        and not any(0 in stride for stride in map(Tensor.stride, tensors))
    )
    return tensors if usual else [t for t in tensors if is_plain(t)]


def places_of(tensors: list[Tensor]) -> tuple[list[int], list[Any], list[Any]]:
    """Return where tensors lie, with which shapes and strides."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(SHAPE, tensors)),
        list(map(Tensor.stride, tensors)),
    )


def lies_in(tensor: Tensor, memory: Tensor) -> bool:
    """Tell whether a tensor has the place, shape and strides that it had."""
    return (
        tensor.data_ptr() == memory.data_ptr()
        and tensor.shape == memory.shape
        and tensor.stride() == memory.stride()
    )


def write_to_any(tensor: Tensor, value: Tensor) -> None:
    """Write to a tensor that is sparse, expanded, of inference mode, or of a class of its own."""
    # Outside of it a tensor that was made in inference mode refuses to be written to.
    with torch.inference_mode(tensor.is_inference()):
        if tensor.layout is not torch.strided:
            tensor.copy_(value)
            return
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        # Along expanded dimensions all entries are one, which torch does not write to twice.
        once = tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())
        tensor[once].copy_(value[once])


# -- buffers ---------------------------------------------------------------------------------------


class Buffers:
    """All buffers of some modules at one moment, and the states of torchmetrics among them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._names, self._tensors, self._counts = entries_of(self._modules)
        self._metrics = metrics_among(self._modules)
        tensors = [b for b in self._tensors if b is not None]
        for metric in self._metrics:
            tensors += metric.tensors()
        self._values = TensorValues(tensors) if tensors else NOTHING

    def restore(self) -> None:
        """Put the very tensors back, with the values that they had."""
        names, tensors, counts = entries_of(self._modules)
        if (
            counts != self._counts
            or names != self._names
            or not all(map(is_, tensors, self._tensors))
        ):
            self._put_back_entries()
        for metric in self._metrics:
            metric.restore()
        self._values.restore()

    def _put_back_entries(self) -> None:
        """Give each module the buffers that it had, and no others."""
        entries = zip(self._names, self._tensors, strict=True)
        for module, count in zip(self._modules, self._counts, strict=True):
            put_back_entries(module, dict(islice(entries, count)))


def entries_of(modules: list[nn.Module]) -> tuple[list[str], list[Tensor | None], list[int]]:
    """Return the names of all buffers, the buffers, and how many each module has."""
    tables = list(map(BUFFERS, modules))
    if not any(tables):
        return [], [], [0] * len(modules)
    # In a ScriptModule they are in no dict, and read from C++.
    tables = [b if type(b) is dict else dict(b.items()) for b in tables]
    names = list(chain.from_iterable(tables))
    return names, list(chain.from_iterable(map(dict.values, tables))), list(map(len, tables))


def put_back_entries(module: nn.Module, named: Mapping[str, Tensor | None]) -> None:
    """Give a module the buffers that it had, and no others."""
    present = dict(module._buffers.items())  # in a ScriptModule no dict, and read from C++
    for name, buffer in named.items():
        if name not in present or present[name] is not buffer:
            module._buffers[name] = buffer
    for name in present:
        if name not in named:
            del module._buffers[name]


class MetricState:
    """What a metric of torchmetrics has counted, which it keeps beside its buffers.

    Args:
        metric: a module whose ``metric_state`` has tensors and lists of them.
    """

    def __init__(self, metric: Any) -> None:
        self._metric, self._state = metric, dict(metric.metric_state)
        self._lists = {n: list(v) for n, v in self._state.items() if isinstance(v, list)}
        self._others = {n: v for n, v in vars(metric).items() if n in METRIC_FLAGS}

    def tensors(self) -> list[Tensor]:
        """Return those that may be written to."""
        whole = [v for v in self._state.values() if isinstance(v, Tensor)]
        listed = [t for values in self._lists.values() for t in values if isinstance(t, Tensor)]
        return [*whole, *listed]

    def restore(self) -> None:
        """Put the very objects back."""
        for name, values in self._lists.items():
            self._state[name][:] = values
        for name, value in {**self._state, **self._others}.items():
            setattr(self._metric, name, value)


#: What torchmetrics remembers of a metric's updates.
METRIC_FLAGS = ("_update_count", "_computed")


def metrics_among(modules: Iterable[nn.Module]) -> list[MetricState]:
    """Return the states of the metrics of torchmetrics."""
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return []
    return [MetricState(m) for m in modules if isinstance(m, torchmetrics.Metric)]


# -- parameters ------------------------------------------------------------------------------------


#: Bytes that the first look copies however few are trained.
COPIED_ANYWAY = 2**27


class WrittenParameters:
    """Learns which parameters the forwards write to, and keeps the values of those.

    An EMA teacher, ``Embedding(max_norm=...)`` and the like change parameters within a forward.
    What will be written to cannot be known before, and copies of all parameters in every step would
    cost their memory. So the first look copies all; later ones copy what was seen to change.
    """

    def __init__(self) -> None:
        self._known: list[Tensor] = []
        self._looked: set[str] = set()

    def values_of(
        self, parameters: Iterable[Tensor], moment: str, held: Iterable[Tensor]
    ) -> ParameterValues:
        """Keep the values of those among some parameters that may be written to.

        Args:
            parameters: those that a forward may write to.
            moment: where in a step this is; the first look at each moment copies all.
            held: the parameters that are trained. The first look copies up to twice their size: a
                teacher as large as they are, but not the large frozen body under an adapter.
        """
        watched = [p for p in parameters if is_plain(p)]
        if not watched:
            return NO_PARAMETERS
        copy_of_all = False
        if moment not in self._looked:
            self._looked.add(moment)
            limit = max(COPIED_ANYWAY, 2 * sum(p.nbytes for p in held))
            copy_of_all = sum(p.nbytes for p in watched) <= limit
        return ParameterValues(self, watched, copy_of_all=copy_of_all)

    def learn(self, parameters: Iterable[Tensor]) -> None:
        """Remember parameters that were written to."""
        for parameter in parameters:
            if id(parameter) not in self.known_ids:
                self._known.append(parameter)

    @property
    def known_ids(self) -> set[int]:
        """The ids of the parameters that were seen to be written to."""
        return {id(p) for p in self._known}


#: The values of no tensors.
NOTHING = TensorValues(())


class ParameterValues:
    """The values of parameters at one moment, as far as they were copied.

    Args:
        written: which parameters are known to be written to; it learns of others.
        parameters: all that are watched.
        copy_of_all: whether all are copied.
    """

    def __init__(
        self, written: WrittenParameters, parameters: list[Tensor], *, copy_of_all: bool
    ) -> None:
        self._written, self._all_copied = written, copy_of_all
        known = written.known_ids
        copied = [p for p in parameters if copy_of_all or id(p) in known]
        self._copied = TensorValues(copied) if copied else NOTHING
        kept = {id(p) for p in copied}
        self._not_copied = [(p, p._version, p.data_ptr()) for p in parameters if id(p) not in kept]

    def learn(self) -> list[Tensor]:
        """Remember which were written to since; return those of which there is no copy."""
        if self._copied is NOTHING and not self._not_copied:
            return []
        # The first look compares entries, since writes through .data are not counted.
        self._written.learn(self._copied.changed(by_value=self._all_copied))
        lost = [p for p, v, at in self._not_copied if p._version != v or p.data_ptr() != at]
        self._written.learn(lost)
        return lost

    def restore(self) -> None:
        """Write the copied values back."""
        self._copied.restore()


#: The values of no parameters.
NO_PARAMETERS = ParameterValues(WrittenParameters(), [], copy_of_all=False)


class ForwardState:
    """All that a forward may write to, at one moment.

    Args:
        modules: whose buffers are kept.
        parameters: the values of parameters.
    """

    def __init__(self, modules: Iterable[nn.Module], parameters: ParameterValues) -> None:
        self._buffers, self._parameters = Buffers(modules), parameters

    def learn(self) -> list[Tensor]:
        """Remember which parameters were written to; return those that cannot be put back."""
        return self._parameters.learn()

    def restore(self) -> None:
        """Put everything back."""
        self._buffers.restore()
        self._parameters.restore()
