"""When the geometry is refreshed, on which forwards, and what is told about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ._autocast import autocast_off, autocast_overruled
from ._current_pass import RunningPass
from ._module_state import ForwardState
from ._parameters import NamedParameters
from ._progress import Progress
from ._random_state import RandomState
from ._refresh_modes import refresh_modes
from ._step_modules import StepModules
from .distributed import Ranks
from .geometry import Geometry, RefreshError, RefreshReport

__all__ = [
    "Forward",
    "HookHandle",
    "RefreshHook",
    "Refresher",
    "as_forwards",
    "call_and_unpack",
]

#: A function without arguments that returns the loss or (loss, outputs).
Forward = Callable[[], Any]
RefreshHook = Callable[[Any, RefreshReport], None]


class HookHandle(RemovableHandle):
    """Remove a hook, by ``remove()`` or by a call; again does nothing."""

    __call__ = RemovableHandle.remove


class Refresher:
    """Refresh a geometry when it is due, without a trace in the model.

    Args:
        geometry: what is refreshed, or None.
        parameters: of the base optimizer.
        ranks: the processes that train together.
        progress: the counters of the training.
        modules: what the forwards may leave a trace in.
        default_forward: used if no forward is given.
        autocast: whether autocast stays as the forward has it.

    Attributes:
        hooks: called by the optimizer after a refresh.
    """

    def __init__(
        self,
        geometry: Geometry | None,
        parameters: NamedParameters,
        ranks: Ranks,
        progress: Progress,
        modules: StepModules,
        *,
        default_forward: Forward | None,
        autocast: bool,
    ) -> None:
        self._geometry, self._parameters = geometry, parameters
        self._ranks, self._progress, self._modules = ranks, progress, modules
        self.default_forward, self.autocast = default_forward, autocast
        self.last_report: RefreshReport | None = None
        self._untold: RefreshReport | None = None
        self.hooks: OrderedDict[int, RefreshHook] = OrderedDict()

    @property
    def due(self) -> bool:
        """Whether the geometry wants a refresh before the next step."""
        return self._geometry is not None and self._geometry.due(self._progress.step)

    def refresh(
        self,
        forward: Forward | Sequence[Forward] | None,
        weights: Sequence[float] | None,
    ) -> RefreshReport:
        """Refresh the geometry now, due or not; return and keep the report."""
        if self._geometry is None:
            raise RuntimeError("refresh: this optimizer has no geometry (geometry=None)")
        forward = self.default_forward if forward is None else forward
        if forward is None:
            raise ValueError("refresh: no forward; pass one, or refresh_forward to llqr.Optimizer")
        forwards = as_forwards(forward)
        device = self._parameters.device
        precision = nullcontext() if self.autocast else autocast_off(device, self._warn_of_autocast)
        evaluated = [partial(call_in_evaluation, f) for f in forwards]
        trace = self._without_trace(self._geometry, forwards)
        try:
            with trace, precision, self._ranks.bypassed(), RunningPass("refresh"):
                report = self._geometry.refresh(
                    evaluated, step=self._progress.step, weights=weights
                )
        except RefreshError as error:
            self._untold = self.last_report = error.report
            raise
        self._untold = self.last_report = report
        return report

    def call_hooks(self, optimizer: Any) -> None:
        """Show the report of the refresh that just ran to the hooks, once."""
        report, self._untold = self._untold, None
        if report is None:  # the refresh did not get that far
            return
        for hook in list(self.hooks.values()):
            hook(optimizer, report)

    @contextmanager
    def _without_trace(self, geometry: Geometry, forwards: Sequence[Forward]) -> Iterator[None]:
        """Evaluate the model in the body; its state and the random numbers are put back."""
        named, modules = self._parameters.named, self._modules.all(forwards)
        watched = [p for module in modules for p in module.parameters(recurse=False)]
        if self._ranks.sharded:  # the modules of fully_shard swap their parameters
            watched = []
        values = self._modules.written.values_of(watched, "refresh", named.values())
        before = ForwardState(modules, values)
        random = RandomState(*self._parameters.devices)
        try:
            with ExitStack() as modes:
                for root in self._modules.roots:
                    modes.enter_context(
                        refresh_modes(root, geometry.batch_norm, self._warn_of_running_statistics)
                    )
                yield
        finally:
            lost = before.learn()
            before.restore()
            random.restore()
        if lost:
            self._modules.warn_of_lost(lost, "a refresh", self._progress)

    def _warn_of_autocast(self) -> None:
        self._progress.warn_once(
            "the forward's autocast is switched off during a refresh, since curvature products in "
            "low precision are wrong in the third digit; refresh_autocast=True leaves it on"
        )

    def _warn_of_running_statistics(self) -> None:
        self._progress.warn_once(
            "a BatchNorm met one value per channel in a refresh, which has no variance, and used "
            "its running statistics; give the refresh a larger minibatch"
        )

    def register_hook(self, hook: RefreshHook) -> HookHandle:
        """Keep a hook; return its handle."""
        handle = HookHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks stay behind in copies.
        return {**self.__dict__, "hooks": OrderedDict()}


def as_forwards(forward: Forward | Sequence[Forward]) -> list[Forward]:
    """Return one forward or several as a list; refuse what is not one."""
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards or not all(map(callable, forwards)):
        raise TypeError(
            f"forward: expected a function without arguments or a list of them, got {forward!r}"
        )
    return forwards


#: Told where a forward fails in a refresh.
EVALUATION_NOTE = (
    "llqr: this was raised in a refresh, which runs the model in evaluation mode (as model.eval() "
    "does, norm layers excepted); if the forward needs what the model returns in training mode "
    "only, hand over one for the refresh: minimize(forward, refresh=...) or "
    "llqr.Optimizer(refresh_forward=...)"
)


def call_in_evaluation(forward: Forward) -> Any:
    """Call a forward, as :func:`call_and_unpack`; what it raises tells of evaluation mode."""
    try:
        return call_and_unpack(forward)
    except Exception as error:
        add_note(error, EVALUATION_NOTE)
        raise


def add_note(error: Exception, note: str) -> None:
    """Add a note to an error, once; before Python 3.11 to its message."""
    if hasattr(error, "add_note"):
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    elif error.args and isinstance(error.args[0], str) and note not in error.args[0]:
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


def call_and_unpack(forward: Forward) -> Any:
    """Call a forward; a model output with ``loss`` and ``logits`` becomes that pair.

    Such are transformers' ModelOutput and dataclasses of one's own.
    """
    with autocast_overruled():
        result = forward()
    if type(result) is tuple and len(result) == 2 and isinstance(result[1], Tensor):
        return result  # as mostly
    if hasattr(result, "loss") and hasattr(result, "logits"):
        return result.loss, result.logits
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        return result
    loss, outputs = result
    if outputs is None or isinstance(outputs, Tensor):
        return result
    if any(isinstance(z, Tensor) for z in pytree.tree_leaves(outputs)):
        return result
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return loss, outputs.logits
    raise ValueError(
        f"forward: no tensor found in `outputs` of type {type(outputs).__name__}; return (loss, "
        "outputs) with a tensor, or a list, tuple or dict of tensors, or an object whose `logits` "
        "is one"
    )
