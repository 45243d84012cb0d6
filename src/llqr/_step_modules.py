"""The modules that a step runs: the model, those beside it, and those that a forward names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter, is_
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ._module_state import WrittenParameters
from ._progress import Progress

__all__ = ["StepModules", "modules_named_in", "refuse_meta"]

CHILDREN, META = attrgetter("_modules"), attrgetter("is_meta")
#: Kinds of values that hold no modules, and are not called.
HOLDING_NONE = frozenset({Tensor, nn.Parameter, str, bool, int, float, type(None), torch.device})
#: Kinds of attributes that hold none; some are called, but what they name is of other files.
HOLDING_NONE_AS_ATTRIBUTES = HOLDING_NONE | {FunctionType, BuiltinFunctionType, ModuleType, type}


class StepModules:
    """The modules that a step runs.

    Args:
        model: the network.
        beside: modules outside it that the step changes.

    Attributes:
        roots: the model, and those beside it.
        written: which of their parameters the forwards were seen to write to.
    """

    def __init__(self, model: nn.Module, beside: Iterable[nn.Module]) -> None:
        self.roots = [model, *checked_modules(beside)]
        self.written = WrittenParameters()
        self._walk: ModuleWalk | None = None

    def all(self, functions: Iterable[Any] = ()) -> list[nn.Module]:
        """Return the modules and what is inside them, each once.

        Args:
            functions: forwards or closures; the modules that they name are among the result.
        """
        named = [module for function in functions for module in modules_named_in(function)]
        roots = list({id(root): root for root in [*self.roots, *named]}.values())
        if self._walk is None or not self._walk.is_current(roots):
            self._walk = ModuleWalk(roots)
        return self._walk.modules

    def __getstate__(self) -> dict[str, Any]:
        # A copied module may keep its children in other tables than the copies of these.
        return {**self.__dict__, "_walk": None}

    def warn_of_lost(self, parameters: Iterable[Tensor], where: str, progress: Progress) -> None:
        """Say which parameters were written to without a copy, and so were not put back."""
        names = {id(p): n for root in self.roots for n, p in root.named_parameters()}
        listed = ", ".join(repr(names.get(id(p), tuple(p.shape))) for p in parameters)
        progress.warn_once(
            f"{where} wrote to parameters in place: {listed}. They were not put back, since only "
            "the first step copies all parameters, and only if they are not much larger than "
            "those that are trained; from now on they are"
        )


class ModuleWalk:
    """The modules inside some roots, as found by a walk, until a module is put in or taken out.

    Args:
        roots: where the walk starts.

    Attributes:
        modules: each once.
    """

    def __init__(self, roots: list[nn.Module]) -> None:
        self._roots = roots
        self.modules = list({id(m): m for root in roots for m in root.modules()}.values())
        self._tables = list(map(CHILDREN, self.modules))
        # The tables of TorchScript are no dicts; its modules are walked through each time.
        self._plain = all(type(table) is dict for table in self._tables)
        self._children = self._find_children() if self._plain else []

    def _find_children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def is_current(self, roots: list[nn.Module]) -> bool:
        """Tell whether a walk from these roots would find the same."""
        # Mapped without a loop in Python, since this runs in every step over all modules.
        return (
            self._plain
            and len(roots) == len(self._roots)
            and all(map(is_, roots, self._roots))
            and all(map(is_, map(CHILDREN, self.modules), self._tables))
            and len(children := self._find_children()) == len(self._children)
            and all(map(is_, children, self._children))
        )


def refuse_meta(named: Mapping[str, Tensor]) -> None:
    """Refuse parameters that have no memory yet."""
    if not any(map(META, named.values())):
        return
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

    Names are those of globals, closures and bound arguments, and of attributes and entries of the
    objects, lists and dicts among them. What is wrapped (by a decorator, by torch.compile) is
    looked at in the place of the wrapper.
    """
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}  # the objects too, since an id is used again
    waiting = [function]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
        elif (inner := unwrap_callable(value)) is not value:
            waiting.append(inner)
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            names = names_in(getattr(value.__func__, "__code__", None))
            waiting += [value.__func__, *attributes_of(value.__self__, names)]
        elif isinstance(value, FunctionType):
            waiting += values_named_in(value)
        elif isinstance(value, (list, tuple, dict)):
            entries = value.values() if isinstance(value, dict) else value
            found += [v for v in entries if isinstance(v, nn.Module)]
    return found


def unwrap_callable(value: Any) -> Any:
    """Return the function that a decorator or torch.compile wraps, and an object's ``__call__``."""
    inner = value.__func__ if type(value) is MethodType else value
    if type(inner) is FunctionType and not inner.__dict__:
        return value  # as most are
    for _ in range(16):
        if isinstance(value, nn.Module):
            return value
        inner = getattr(value, "_torchdynamo_orig_callable", None)
        inner = getattr(value, "__wrapped__", None) if inner is None else inner
        if inner is None:
            break
        value = inner
    known = (FunctionType, MethodType, partial, type)
    # An object that is called runs its class's method of that name.
    method = None if isinstance(value, known) else getattr(value, "__call__", None)  # noqa: B004
    return method if isinstance(method, MethodType) else value


def attributes_of(value: Any, names: frozenset[str]) -> list[Any]:
    """Return the attributes of an object, as far as they are named and may hold modules."""
    kinds = (nn.Module, list, tuple, dict)
    held = getattr(value, "__dict__", None)
    if not held:
        return [value] if isinstance(value, nn.Module) else []
    found: list[Any] = [value] if isinstance(value, nn.Module) else []
    for name in names:
        if name in held and type(v := held[name]) not in HOLDING_NONE_AS_ATTRIBUTES:
            if isinstance(v, kinds):
                found.append(v)
            else:
                found += _modules_within(v, names)
    return found


def _modules_within(value: Any, names: frozenset[str]) -> list[nn.Module]:
    """Return the modules among the named attributes of an object."""
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, (type, ModuleType, FunctionType)):
        return []
    return [v for n in names if isinstance(v := attributes.get(n), nn.Module)]


def values_named_in(function: FunctionType) -> list[Any]:
    """Return what a function's names stand for; of other files only what its closure holds."""
    names, globals_of = names_in(function.__code__), function.__globals__
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    for name in names:
        if name in globals_of:
            value = globals_of[name]
            if not (type(value) is FunctionType and value.__globals__ is not globals_of):
                held.append(value)
    found: list[Any] = []
    for value in held:
        if type(value) not in HOLDING_NONE:
            found += attributes_of(value, names)
            if type(value) is not ModuleType:
                found.append(value)
    return found


@lru_cache(maxsize=256)
def names_in(code: CodeType | None) -> frozenset[str]:
    """Return the global and attribute names of a function's code, and of functions inside it."""
    if code is None:
        return frozenset()
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)
