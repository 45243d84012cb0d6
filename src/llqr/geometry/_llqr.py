"""LLQR: its settings, how U is laid out and applied, and what of it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Schedule
from ..curvature import Curvature, as_curvature
from ._base import Gradients
from ._blocks import BlockDiagonal, States
from ._layers import Layout
from ._learning import Learning
from ._modules import layers_of, unwrap
from ._reduced import REDUCIBLE
from ._refresh import basis_capacity
from ._settings import StructureOf, check_settings, check_structure

__all__ = ["LLQR"]


class LLQR(Learning):
    r"""Learn a structured inverse preconditioner U from the layerwise LQR objective.

    .. math::
        \begin{aligned}
        &\textbf{refresh, every } n \textbf{ steps, on one minibatch:} \\
        &\quad g \leftarrow \nabla L(\theta), \quad C \leftarrow \text{curvature of } L \\
        &\quad J(U) = g^\top u + \tfrac12 u^\top C u + \tfrac12 \lambda |u|^2, \qquad u = -U g \\
        &\quad U_T \leftarrow T \text{ steps of momentum on } J \text{ from the current } U \\
        &\quad U \leftarrow \beta U + (1 - \beta)\, U_T, \quad
              u_{\min} I \preceq U \preceq u_{\max} I
        \end{aligned}

    U is block diagonal, one block a layer (the parameters one module owns); C is the full
    curvature with all terms across layers. Defaults are for users; :meth:`paper` gives the
    paper's settings (paper, equation 9, algorithm 2 and appendix C).

    Args:
        structure: "diagonal", "kfac", "e-kfac", "diag-kfac", "dense", "scalar", "identity", or a
            callable (name, parameter) -> name. 1-D parameters are elementwise in all Kronecker
            structures.
        curvature: "fisher" (the paper's NGD; the forward must return outputs), "newton", or a
            :class:`llqr.Curvature`.
        every: optimizer steps between refreshes; a number or a function of the step.
        steps: inner steps T.
        lr: inner learning rate; a number or a function of the step.
        momentum: inner momentum, in [0, 1).
        clip: each leaf's inner gradient is clipped to this norm; None: not clipped.
        ema: beta, in [0, 1); a number or a function of the step. It averages the factors, which
            is not the average of the operators.
        damping: lambda, added to C.
        scale: factor on C: "mean" (1), "sum" (the number of output rows), or a number.
        bases: of e-kfac: "learned" with the eigenvalues, or "gradient": eigenvectors of running
            averages of X X' and X'X of the refresh gradients, renewed every ``renew_every``
            refreshes.
        constraint: "positive" keeps U within ``bounds``; "none" is the authors' arithmetic, in
            which U may become indefinite; "square" (e-kfac only) their psd-e-kfac.
        bounds: (u_min, u_max), eigenvalues of U under "positive".
        block_size: sides of matrices wider than this are cut into blocks; None: whole.
        tolerance: relative error in g + C u at which a product C u is answered from earlier ones,
            as far as those tell (not below rounding: 32 eps C u); 0 computes every product.
        solver: "momentum", "sgd", "adam" or "lbfgs" (then at most ``steps`` evaluations).
        start: first optimizer step before which a refresh is due.
        max_failures: refused refreshes in a row that are tolerated; one more raises.
        renew_every: accepted refreshes between new bases (``bases="gradient"``).
        shard: with several processes, each keeps and applies its share of U, so that memory falls
            by their number and a gather comes with each application. Always so with
            ``fully_shard``.
        micro_batch: of several forwards, how many keep their graph at a time; None: all.
        application: "full", or "bfloat16": a step multiplies by kfac's factors in bfloat16, which
            is faster where the processor has instructions for it. What it rounds is U g - g, to
            some three parts in a thousand, never g itself; the solve and checkpoints stay in full.
            It holds a copy of the factors at half the size.

    Raises:
        ValueError: a value out of range; the message names argument and value.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(3, 2)
        >>> geometry = llqr.LLQR("kfac", every=100)
        >>> geometry.bind(model)
        >>> geometry.numel()  # 3 x 3, 2 x 2, and the bias
        15
        >>> geometry.spectrum()
        {'': (1.0, 1.0)}
    """

    def __init__(
        self,
        structure: StructureOf = "diagonal",
        *,
        curvature: str | Curvature = "fisher",
        every: Schedule = 500,
        steps: int = 50,
        lr: Schedule = 1e-2,
        momentum: float = 0.9,
        clip: float | None = 5.0,
        ema: Schedule = 0.95,
        damping: float = 0.0,
        scale: str | float = "mean",
        bases: str = "learned",
        constraint: str = "positive",
        bounds: tuple[float, float] = (1e-3, 1e3),
        block_size: int | None = 512,
        tolerance: float = 1e-2,
        solver: str = "momentum",
        start: int = 0,
        max_failures: int = 3,
        renew_every: int = 5,
        shard: bool = False,
        micro_batch: int | None = None,
        application: str = "full",
    ) -> None:
        settings: dict[str, Any] = {
            "every": every,
            "steps": steps,
            "lr": lr,
            "momentum": momentum,
            "clip": clip,
            "ema": ema,
            "damping": damping,
            "scale": scale,
            "bases": bases,
            "constraint": constraint,
            "bounds": tuple(bounds) if isinstance(bounds, (tuple, list)) else (bounds,),
            "block_size": block_size,
            "tolerance": tolerance,
            "solver": solver,
            "start": start,
            "max_failures": max_failures,
            "renew_every": renew_every,
            "shard": shard,
            "micro_batch": micro_batch,
            "application": application,
        }
        check_structure(structure)
        check_settings(**settings)
        self.structure = structure
        self.curvature = as_curvature(curvature)
        self.settings = settings
        self._refreshes = self._refused = self._failures = 0
        self._last = -1
        self._warned: set[str] = set()
        self._lowered: tuple[States, States] = [], []

    @classmethod
    def paper(
        cls, structure: StructureOf = "e-kfac", curvature: str = "fisher", **changes: Any
    ) -> LLQR:
        """Return the paper's settings: lr 1e-3, no bounds, no splitting, all products computed.

        Fisher is summed over the batch with EMA 0.95; Newton is the Hessian of the mean loss with
        EMA 0.9 (paper, appendix C). ``changes`` replace single settings.
        """
        settings: dict[str, Any] = {
            "lr": 1e-3,
            "ema": 0.95 if as_curvature(curvature).gauss_newton else 0.9,
            "scale": "sum" if as_curvature(curvature).gauss_newton else "mean",
            "constraint": "none",
            "block_size": None,
            "tolerance": 0,
        }
        return cls(structure, curvature=curvature, **{**settings, **changes})

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        return f"LLQR({self.structure!r}, curvature={self.curvature!r}, {shown})"

    # -- binding ------------------------------------------------------------------------------

    def bind(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Lay out the parameters in blocks; new ones start at the identity."""
        kept = self.state() if hasattr(self, "_states") else {}
        if kept and unwrap(model) is not unwrap(self.model):
            raise ValueError(
                "geometry: this LLQR holds what it learned of another model; make a new one for "
                "this model"
            )
        super().bind(model, parameters)
        devices = {p.device for p in self.parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"model: LLQR needs all parameters on one device, got {sorted(map(str, devices))}"
            )
        layers, transposed = layers_of(unwrap(model))
        structure = self.structure
        self.shared = self.ranks.sharded or (self.settings["shard"] and self.ranks.size > 1)
        if self.shared and self.settings["solver"] == "lbfgs":
            raise ValueError("solver: 'lbfgs' needs all of U in one process, but U is shared out")
        whole = partial(
            Layout,
            self.parameters,
            layers,
            structure if callable(structure) else lambda name, parameter: str(structure),
            self.settings["block_size"],
            transposed,
        )
        self.layout = whole(ranks=self.ranks) if self.shared else whole()
        square = self.settings["constraint"] == "square"
        others = set(self.layout.structures.values()) - {"e-kfac", "identity"}
        if square and others:
            raise ValueError(
                "constraint: 'square' is the authors' psd-e-kfac and defined for 'e-kfac' alone, "
                f"got structure {sorted(others)}"
            )
        learned = self.settings["bases"] == "learned"
        self._blocks = BlockDiagonal(self.layout, learned=learned, square=square)
        # What is stored where nothing is shared out, without memory for it.
        self._whole = self._blocks
        if self.shared:
            self._whole = BlockDiagonal(whole(), learned=learned, square=square)
        self._states = self._blocks.identity(next(iter(devices), torch.device("cpu")))
        if kept:
            self._blocks.load(self._states, kept, optional=self.parameters)
            meta = self._whole.identity(torch.device("meta"))
            wrong = self._whole.load(meta, kept, optional=self.parameters)
            lost = [text for text in wrong if text.partition(": ")[0] in self.parameters]
            if lost:
                warnings.warn(
                    "geometry: a parameter joined a layer that shares one block, so what was "
                    f"learned there is dropped and starts anew at the identity ({lost[0]})",
                    stacklevel=4,
                )

    # -- using U ------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, gradients: Gradients) -> dict[str, Tensor]:
        """Return U g as {name: tensor}, each in its gradient's dtype.

        Raises:
            KeyError: a name that is no parameter's.
            ValueError: another shape than the parameter's, or no floating-point dtype.
        """
        self._check(gradients)
        for g in gradients.values():
            self._follow(g.device)
            break
        if self.shared:
            moved = self._blocks.apply(self._applied(), self.layout.pack(gradients))
            result = self.layout.unpack_like(moved, gradients)
        else:
            result = self._blocks.transform(self._applied(), gradients)
        dtypes = {n: g.dtype for n, g in gradients.items()}
        return {n: x if x.dtype == dtypes[n] else x.to(dtypes[n]) for n, x in result.items()}

    def _applied(self) -> States:
        """Return the states that a step applies: U, or what stands for it in low precision."""
        if self.settings["application"] == "full":
            return self._states
        of, lowered = self._lowered
        if of is not self._states:  # new ones come in a new list
            lowered = self._blocks.lowered(self._states)
            self._lowered = self._states, lowered
        return lowered

    def _follow(self, device: torch.device) -> None:
        """Take U where the parameters were taken since: to another device or to double."""
        if self.layout.dtypes != {name: p.dtype for name, p in self.parameters.items()}:
            self.bind(self.model, self.parameters)
        if any(v.device != device for s in self._states for v in s.values()):
            self._states = [{k: v.to(device) for k, v in s.items()} for s in self._states]

    def spectrum(self) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest eigenvalue of U for each layer (decomposed)."""
        self._require_bound()
        return self._blocks.extremes(self._states, exact=True)

    def numel(self) -> int:
        """Return the number of stored scalars of U (of all processes)."""
        self._require_bound()
        return sum(v.numel() for entries in self._template().values() for v in entries.values())

    def _template(self) -> dict[str, dict[str, Tensor]]:
        """Return what :meth:`state` returns, without memory."""
        return self._whole.export(self._whole.identity(torch.device("meta")))

    def memory(self) -> dict[str, int]:
        """Return bytes in this process, before training: of U, of a refresh, of what it recycles.

        "preconditioner" is U. "refresh" is what a solve allocates beside the graph of its forward
        (the largest, if every direction is kept); "basis" the part of it that grows with the
        products used, a pair of vectors each, so that a refresh of k products takes
        ``refresh - basis + k * basis / directions``; "directions" how many are kept at most. The
        graph is about a training step's (``micro_batch`` bounds it).
        """
        self._require_bound()
        own = sum(v.numel() * v.element_size() for s in self._states for v in s.values())
        vector = self.layout.numel * self.layout.dtype.itemsize
        directions = basis_capacity(self.layout, self.settings["steps"])
        basis = 2 * directions * vector if self.settings["tolerance"] else 0
        # Nothing of U's size but the result where the solve runs on coefficients; else the new
        # state, its gradient and its momentum. And six flat work vectors.
        literal = not self.settings["tolerance"] or self.settings["solver"] not in REDUCIBLE
        copies = 3 if literal or not self._blocks.linear else 1
        return {
            "preconditioner": own,
            "refresh": copies * own + 6 * vector + basis,
            "basis": basis,
            "directions": directions if basis else 0,
        }

    def summary(self) -> str:
        """Return a table: which parameter got which structure, blocks and stored scalars."""
        self._require_bound()
        stored = {n: sum(v.numel() for v in e.values()) for n, e in self._template().items()}
        rows = [("parameter", "shape", "structure", "blocks", "stored")]
        for name, parameter in self.parameters.items():
            view, structure = self.layout.views[name], self.layout.structures[name]
            if view.matrix is None and structure.endswith("kfac"):
                structure = "diagonal"
            shape = "x".join(map(str, parameter.shape)) or "scalar"
            pieces = len(self._whole.layout.pieces(name))
            rows.append((name, shape, structure, str(pieces), f"{stored[name]:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        total = sum(p.numel() for p in self.parameters.values())
        return "\n".join([*(line.rstrip() for line in lines),
                          f"{total:,} parameters, {self.numel():,} scalars in U"])  # fmt: skip

    # -- checkpoints --------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return U per parameter: elementwise "U" in its shape, blocks as "A.0", "B.0", ...

        It is whole in every process; where U is shared out, all must call this together.
        """
        self._require_bound()
        if self.shared:
            return self._blocks.gather(self._states, self._template())
        return self._blocks.export(self._states)

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`state` returned; raise if anything is missing or does not fit.

        torch.distributed.checkpoint drops the state of parameters that do not require a gradient;
        their blocks may be missing and stay as they are.
        """
        self._require_bound()
        states = [{k: v.clone() for k, v in s.items()} for s in self._states]
        frozen = {n for n, p in self.parameters.items() if not p.requires_grad}
        meta = self._whole.identity(torch.device("meta"))
        wrong = self._whole.load(meta, state, optional=frozen)
        if wrong:
            raise ValueError(
                f"state: does not fit this geometry ({self.structure!r}, block_size "
                f"{self.settings['block_size']}): {'; '.join(wrong[:3])}"
            )
        self._blocks.load(states, state)
        self._states = states
