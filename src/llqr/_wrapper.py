"""A torch optimizer whose parameter groups and state are those of the one it wraps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = [
    "OptimizerWrapper",
    "attributes_to_copy",
    "call_if_there",
    "clear_gradients",
    "load_with_hooks",
    "save_with_hooks",
    "step_base",
    "with_step_hooks",
]

F = TypeVar("F", bound=Callable[..., Any])
#: Tells whether a profiler runs in this thread.
profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled
#: As torch has it: what was put in its place since must run.
ZERO_GRAD = torch.optim.Optimizer.zero_grad


class OptimizerWrapper(torch.optim.Optimizer):
    """Wrap a base optimizer: its parameter groups, state and defaults are also ours (base class).

    The objects are the base's own, looked up anew each time, since ``load_state_dict`` of the base
    replaces them. Hooks are kept here.
    """

    base: torch.optim.Optimizer

    def __init__(self, base: torch.optim.Optimizer) -> None:
        # torch's own path for an optimizer that is not built from parameters (unpickling): it
        # sets up the hooks and leaves state and param_groups alone.
        super().__setstate__({"base": base})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups, the very list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state, the very mapping."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's default options."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base's parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return attributes_to_copy(self)


def attributes_to_copy(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the attributes without hooks and what schedulers put on `step`, as torch does."""
    kept = {k: v for k, v in vars(optimizer).items() if not k.startswith("_optimizer_")}
    kept.pop("step", None)
    return kept


def call_if_there(optimizer: torch.optim.Optimizer, method: str) -> None:
    """Call a method that not all optimizers have, such as ``train`` of schedule-free ones."""
    found = getattr(optimizer, method, None)
    if callable(found):
        found()


def save_with_hooks(
    optimizer: torch.optim.Optimizer, save: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``save`` returns, between the hooks of ``state_dict``."""
    for pre in optimizer._optimizer_state_dict_pre_hooks.values():
        pre(optimizer)
    result = save()
    for post in optimizer._optimizer_state_dict_post_hooks.values():
        changed = post(optimizer, result)
        result = result if changed is None else changed
    return result


def load_with_hooks(
    optimizer: torch.optim.Optimizer, state_dict: Any, load: Callable[[Any], None]
) -> None:
    """Load a copy of the state dict, between the hooks of ``load_state_dict``."""
    # A container of several optimizers may have saved a list.
    given: Any = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for pre in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre(optimizer, given)
        given = given if changed is None else changed
    load(given)
    for post in optimizer._optimizer_load_state_dict_post_hooks.values():
        post(optimizer)


def with_step_hooks(step: F) -> F:
    """Decorate the step of an optimizer with torch's hooks and its range for a profiler.

    The range takes as long as the update of a small network, so it is opened only if a profiler
    runs.
    """
    hooked = torch.optim.Optimizer.profile_hook_step(step)

    @wraps(step)
    def run(self: torch.optim.Optimizer, *args: Any, **options: Any) -> Any:
        # Around the step of a subclass torch itself has put the hooks.
        outside = type(self).step is not run
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        anyone = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        needed = not outside and (own or anyone or profiled())
        return (hooked if needed else step)(self, *args, **options)

    run.hooked = True  # type: ignore[attr-defined]  # so torch does not do it again
    return run  # type: ignore[return-value]


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Call ``zero_grad``; torch's own without its range for a profiler, if none runs."""
    own = type(optimizer).zero_grad is ZERO_GRAD and "zero_grad" not in vars(optimizer)
    if not own or profiled():
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def step_base(base: torch.optim.Optimizer) -> None:
    """Step the base with its own hooks, but without those of all optimizers: they saw our step.

    The hooks of ``register_optimizer_step_pre_hook`` and its sister count or log steps, and the
    base's step is a part of one.
    """
    hooked = type(base).step
    step = vars(base).get("step", hooked)
    # What else has put a step of its own on the instance must run, hooks and all.
    known = step is hooked or hasattr(step, "_wrapped_by_lr_sched")
    if not (known and getattr(hooked, "hooked", False)):
        base.step()
        return
    if step is not hooked:  # a scheduler of the base, which asks whether it stepped
        base._opt_called = True  # type: ignore[attr-defined]
    own = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
    if not own and not profiled():
        hooked.__wrapped__(base)  # type: ignore[attr-defined]
        return
    args: tuple[Any, ...] = (base,)
    options: dict[str, Any] = {}
    with torch.autograd.profiler.record_function(f"Optimizer.step#{type(base).__name__}.step"):
        for pre_hook in base._optimizer_step_pre_hooks.values():
            changed = pre_hook(base, args, options)
            args, options = (args, options) if changed is None else changed
        hooked.__wrapped__(*args, **options)  # type: ignore[attr-defined]
        for post_hook in base._optimizer_step_post_hooks.values():
            post_hook(base, args, options)
