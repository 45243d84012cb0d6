"""The formulas of llqr.NaturalGradient written out, block by block, with U as one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from explicit import F64, block_indices


class ByHand:
    """U from samples in model order; blocks and matrix views are those of ``explicit``."""

    def __init__(self, model, structure, block_size=None, *, damping, ema, power=1.0, period=1):
        self.blocks = block_indices(model, structure, block_size)
        self.size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.damping, self.ema, self.power, self.period = damping, ema, power, period
        self.known: dict[int, dict] = {}
        self.refreshes = 0

    def refresh(self, samples: Tensor, keep_moments: bool = False) -> None:
        """Average new samples (m, P); with ``keep_moments`` only the bases see them."""
        beta, k = self.ema, self.refreshes
        renewed = -(-k // self.period)
        keep, keep_bases = (beta * (1 - beta**n) / (1 - beta ** (n + 1)) for n in (k, renewed))
        if keep_moments and k:
            keep = 1.0
        renew = k % self.period == 0
        for i, (kind, _, _, index) in enumerate(self.blocks):
            w, old = samples[:, index], self.known.get(i)
            self.known[i] = _moments(kind, w, old, keep, keep_bases, renew)
        self.refreshes += 1
        self.invert()

    def observe(self, g: Tensor, beta: float) -> None:
        """Let M follow a gradient (P,)."""
        for (_, _, _, index), known in zip(self.blocks, self.known.values(), strict=True):
            square = (known["Q"].mT @ g[index].reshape(-1)).square()
            known["M"] = beta * known["M"] + (1 - beta) * square
        self.invert()

    def invert(self) -> None:
        """U = Q c (M + lambda)^-power Q', with mean of U = 1."""
        pairs = list(zip(self.blocks, self.known.values(), strict=True))
        moments = torch.cat([known["M"] for (kind, *_), known in pairs if kind != "identity"])
        lam = self.damping * moments.mean()
        c = 1 / (moments + lam).pow(-self.power).mean()
        self.U = torch.eye(self.size, dtype=F64)
        for (kind, _, _, index), known in pairs:
            if kind != "identity":
                flat, q = index.reshape(-1), known["Q"]
                values = c * (known["M"] + lam).pow(-self.power)
                self.U[flat[:, None], flat] = q @ torch.diag(values) @ q.mT


def _moments(kind, w, old, keep, keep_bases, renew):
    """Q and M (an entry each) of one block, with the averages behind them."""

    def mix(key, new, weight=keep):
        return new if old is None else weight * old[key] + (1 - weight) * new

    flat = w.reshape(len(w), -1)
    eye = torch.eye(flat.shape[1], dtype=F64)
    if kind == "dense":
        c = mix("C", flat.mT @ flat / len(w))
        values, q = torch.linalg.eigh(c)
        return {"Q": q, "M": values.clamp(min=0), "C": c}
    if kind in ("identity", "diagonal"):
        return {"Q": eye, "M": mix("M", flat.square().mean(0))}
    if kind == "scalar":
        return {"Q": eye, "M": mix("M", flat.square().mean().expand(flat.shape[1]))}
    if kind == "diag-kfac":
        square = w.square().mean(0)
        b, a = mix("b", square.mean(1)), mix("a", square.mean(0))
        return {"Q": eye, "M": torch.outer(b, a).reshape(-1) / b.mean(), "b": b, "a": a}
    new = dict(old or {})
    if renew or kind == "kfac":  # whose M are the eigenvalues of L and R
        weight = keep if kind == "kfac" else keep_bases
        new["L"] = mix("L", (w @ w.mT).mean(0), weight)
        new["R"] = mix("R", (w.mT @ w).mean(0), weight)
    if renew:
        new["QB"], new["QA"] = (
            _bases(new[s], old[q] if old and keep_bases else None)
            for s, q in (("L", "QB"), ("R", "QA"))
        )
        new["Q"] = torch.kron(new["QB"], new["QA"])
    if kind == "kfac":
        a, b = ((new[q] * (new[s] @ new[q])).sum(0) for s, q in (("L", "QB"), ("R", "QA")))
        return {**new, "M": torch.outer(a, b).reshape(-1) / b.sum()}
    assert kind == "e-kfac"
    m = (new["QB"].mT @ w @ new["QA"]).square().mean(0).reshape(-1)
    if old is not None:  # the diagonal of the old operator in the new bases
        before = old["Q"] @ torch.diag(old["M"]) @ old["Q"].mT
        m = keep * (new["Q"].mT @ before @ new["Q"]).diagonal() + (1 - keep) * m
    return {**new, "M": m}


def _bases(s, old):
    """Eigenvectors at first; then orthogonal iteration, the greatest first."""
    if old is None:
        return torch.linalg.eigh(s)[1].flip(-1)
    values = (old * (s @ old)).sum(0)
    y = s @ old + 1e-3 * values.mean() * old
    return torch.linalg.qr(y[:, values.argsort(descending=True)])[0]


def in_model_order(model: nn.Module, samples: dict[str, Tensor]) -> Tensor:
    """Samples {name: (m, *shape)} as (m, P)."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return torch.cat([samples[n].reshape(len(samples[n]), -1) for n in names], 1)
