"""Which pass of a step is running, for code that must act in one of them only."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal

__all__ = ["PassName", "RunningPass", "current_pass"]

PassName = Literal["clean", "perturbed", "refresh"]


class RunningPass:
    """A pass from its start to its end, or to that of its ``with`` block.

    The end is noted on the object, not only in the context variable: an iterator that was left
    open may be closed from another thread, or after a newer pass began.

    Args:
        name: what current_pass() answers meanwhile.
    """

    def __init__(self, name: PassName) -> None:
        self.name, self._ended = name, False
        self._around = find_running()
        _latest.set(self)

    def __enter__(self) -> RunningPass:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End it; again does nothing."""
        self._ended = True
        if _latest.get() is self:
            _latest.set(self._around)

    def resolve(self) -> RunningPass | None:
        """Return this pass if it still runs, else the one around it that does."""
        found: RunningPass | None = self
        while found is not None and found._ended:
            found = found._around
        return found


_latest: ContextVar[RunningPass | None] = ContextVar("llqr.current_pass", default=None)


def find_running() -> RunningPass | None:
    """Return the innermost pass that runs in this context."""
    latest = _latest.get()
    return None if latest is None else latest.resolve()


def current_pass() -> PassName | None:
    """Tell which pass of an llqr optimizer the calling code runs in.

    A step runs the forward up to three times; what counts or logs there can count once. The answer
    is that of the calling thread (or asyncio task): other threads, such as those that run
    backward hooks for an accelerator, get None.

    Returns:
        ``"clean"`` in the first pass or the only one (which :class:`llqr.MSAM` runs at theta +
        eps), ``"perturbed"`` in the second, where the weights are theta + eps, ``"refresh"`` while
        the geometry is refreshed, and None elsewhere: in evaluation, and in a clean backward of
        one's own before
        :meth:`llqr.Optimizer.perturbed`.

    Example:
        >>> import torch, llqr
        >>> model, x, losses = torch.nn.Linear(2, 1), torch.ones(3, 2), []
        >>> def forward():
        ...     loss = model(x).square().mean()
        ...     if llqr.current_pass() in ("clean", None):  # once per step
        ...         losses.append(loss.detach())
        ...     return loss
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.SAM(0.05))
        >>> _ = [optimizer.minimize(forward) for _ in range(5)]
        >>> len(losses)
        5
    """
    running = find_running()
    return None if running is None else running.name
