"""The modules that a step runs: the model, those beside it, and those that a forward names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    """Return the modules that a function names, and those that functions named in it name.

    Names are those of globals, closures and arguments already bound; what is reached through an
    attribute of something else is found on the object of a method only.
    """
    found: dict[int, nn.Module] = {}
    if isinstance(function, partial) and is_ours(function.func):
        function = function.args[0]  # the user's, in our wrapper
    for value in values_named_in(function):
        inner = [value] if isinstance(value, nn.Module) else []
        if isinstance(value, (FunctionType, MethodType, partial)):
            inner = [v for v in values_named_in(value) if isinstance(v, nn.Module)]
        found.update({id(module): module for module in inner})
    return list(found.values())


def is_ours(function: Any) -> bool:
    """Tell a function of this library."""
    return (getattr(function, "__module__", None) or "").startswith("llqr.")


def values_named_in(function: Any) -> Iterator[Any]:
    """Yield the values of the names that a function uses."""
    if isinstance(function, nn.Module):
        yield function
    elif isinstance(function, partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield part
            yield from values_named_in(part)
    elif isinstance(function, MethodType):
        owner = function.__self__
        yield owner
        yield from getattr(owner, "__dict__", {}).values()
        yield from values_named_in(function.__func__)
    elif isinstance(function, FunctionType):
        yield from [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        names = function.__globals__
        yield from (names[n] for n in names_in(function.__code__) if n in names)


@lru_cache(maxsize=256)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the global names of a function's code, those of functions inside it included."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)
