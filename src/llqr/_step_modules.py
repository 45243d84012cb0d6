"""The modules that a step runs: the model, those beside it, and those that a forward names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ._module_state import WrittenParameters
from ._progress import Progress

__all__ = ["StepModules", "modules_named_in", "refuse_meta"]


class StepModules:
    """The modules that a step runs.

    Args:
        model: the network.
        beside: modules outside it that the step changes.

    Attributes:
        written: which of their parameters the forwards were seen to write to.
    """

    def __init__(self, model: nn.Module, beside: Iterable[nn.Module]) -> None:
        self._roots = [model, *checked_modules(beside)]
        self.written = WrittenParameters()

    def all(self, functions: Iterable[Any] = ()) -> list[nn.Module]:
        """Return the modules and what is inside them, each once.

        Args:
            functions: forwards or closures; the modules that they name are among the result.
        """
        named = [module for function in functions for module in modules_named_in(function)]
        roots = {id(root): root for root in [*self._roots, *named]}.values()
        return list({id(m): m for root in roots for m in root.modules()}.values())

    def warn_of_lost(self, parameters: Iterable[Tensor], where: str, progress: Progress) -> None:
        """Say which parameters were written to without a copy, and so were not put back."""
        names = {id(p): n for root in self._roots for n, p in root.named_parameters()}
        listed = ", ".join(repr(names.get(id(p), tuple(p.shape))) for p in parameters)
        progress.warn_once(
            f"{where} wrote to parameters in place: {listed}. They were not put back, since only "
            "the first step copies all parameters, and only if they are not much larger than "
            "those that are trained; from now on they are"
        )


def refuse_meta(named: Mapping[str, Tensor]) -> None:
    """Refuse parameters that have no memory yet."""
    for name, parameter in named.items():
        if parameter.is_meta:
            raise RuntimeError(
                f"base: its parameter {name!r} is on the meta device, without values; "
                "model.to_empty(device=...) makes other parameters, so give the model its memory "
                "and its values first, and then make the base and the llqr.Optimizer"
            )


def checked_modules(modules: Any) -> list[nn.Module]:
    """Return the argument ``modules`` as a list, or refuse it."""
    if isinstance(modules, nn.Module):
        raise TypeError(
            f"modules: expected a list of modules, got one {type(modules).__name__}; "
            "write modules=[module]"
        )
    try:
        found = list(modules)
    except TypeError:
        raise TypeError(f"modules: expected a list of modules, got {modules!r}") from None
    for module in found:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules: expected torch.nn.Modules, got {module!r}")
    return found


def modules_named_in(function: Any) -> list[nn.Module]:
    """Return the modules that a function names, also through functions of its file that it names.

    Names are those of globals, closures and bound arguments. What is an attribute of something
    else is found only on the object whose method, or which itself, is called.
    """
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}  # the objects too, since an id is used again
    waiting = [method_of(function)]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, partial):
            waiting += map(method_of, [value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, MethodType):
            attributes = [value.__self__, *getattr(value.__self__, "__dict__", {}).values()]
            found += [v for v in attributes if isinstance(v, nn.Module)]
            waiting.append(value.__func__)
        elif isinstance(value, FunctionType):
            waiting += values_named_in(value)
    return found


def method_of(value: Any) -> Any:
    """Return the method that a call of an object runs; anything else as it is."""
    known = isinstance(value, (FunctionType, MethodType, partial, nn.Module))
    return value.__call__ if callable(value) and not known else value


def values_named_in(function: FunctionType) -> list[Any]:
    """Return what a function's names stand for, functions of other files left out."""
    names = function.__globals__
    values = [
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *(names[n] for n in names_in(function.__code__) if n in names),
    ]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return [v for v in values if not (isinstance(v, FunctionType) and v.__globals__ is not names)]


@lru_cache(maxsize=256)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the global names of a function's code, those of functions inside it included."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)
