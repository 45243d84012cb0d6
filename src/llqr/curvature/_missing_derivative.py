"""Which derivative is missing: what decides that another way is tried."""

from __future__ import annotations

import re

__all__ = ["MissingDerivative", "ReplacementsDisagree", "missing_derivative_in"]


class MissingDerivative(RuntimeError):
    """A derivative that came out wrong, because something hides a dependence."""

    def __init__(self, operation: str) -> None:
        super().__init__(f"{operation}: a dependence is missing")
        self.operation = operation


class ReplacementsDisagree(MissingDerivative):
    """Replaced operations give other derivatives than torch's own: a user need not know."""

    def __init__(self) -> None:
        super().__init__("")


def missing_derivative_in(error: BaseException) -> str | None:
    """Return the operation that an error says has no such derivative; None for other errors.

    It is empty if another way must be taken without a word.
    """
    if isinstance(error, MissingDerivative):
        return error.operation
    text = str(error)
    known = isinstance(error, NotImplementedError)  # what torch raises for most
    # CTC and Functions of users raise other errors, and so does forward mode within forward mode.
    unusual = r"once_differentiable|derivative for \S+ is not implemented|Nested forward mode AD"
    known = known or (isinstance(error, RuntimeError) and re.search(unusual, text) is not None)
    if not known:
        return None
    quoted = re.search(r"derivative for '?(?:aten::)?([\w.]+)'?|forward AD with (\w+)", text)
    if quoted is None:
        return "an operation"
    return str(quoted.group(1) or quoted.group(2)).removeprefix("_").removesuffix("_backward")
