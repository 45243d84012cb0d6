"""The error for data that is missing or damaged: it names the path and how to get the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["DataError", "explain_errors", "required_path"]


class DataError(RuntimeError):
    """Data that is missing or damaged."""


def required_path(path: Path, how: str) -> Path:
    """Return the path if it is there.

    Args:
        path: of a file or a folder.
        how: a sentence that says how to get the data.

    Raises:
        DataError: nothing is there.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder. {how}")
    return path


@contextmanager
def explain_errors(path: Path, how: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that names it.

    Raises:
        DataError: the body raised anything; the cause stays attached.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as cause:
        what = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        raise DataError(f"{path}: damaged, or not of the expected form ({what}). {how}") from cause
