"""What a run has read, in words and as a digest: only runs of equal data are compared."""

from __future__ import annotations

import hashlib

from torch import Tensor

__all__ = ["describe_data"]


def describe_data(preparation: str, *parts: Tensor | str) -> dict[str, str]:
    """Return the preparation of the data in words, and a digest of both.

    Args:
        preparation: what was done to the data, as far as their values do not show it.
        *parts: the data before augmentation, and before labels are made wrong, which the seed
            draws: pixels, labels, sentences, names of files.

    Example:
        >>> import torch
        >>> one, other = torch.arange(2), torch.arange(1, 3)
        >>> describe_data("two numbers", one) == describe_data("two numbers", other)
        False
    """
    digest = hashlib.sha256(preparation.encode())
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(part.encode() + b"\n")
    return {"digest": digest.hexdigest()[:16], "preparation": preparation}
