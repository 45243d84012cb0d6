"""StructuredGeometry: all that a metric of structured blocks needs but the learning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._allocations import bytes_of
from .._html import format_table
from .._vectors import DTYPE, Tensors, former_names
from .._warnings import warn_caller
from ..distributed._sharded import whole_parameters
from ._base import Geometry, NormStatistics, shape_text
from ._bases import Bases
from ._metric_settings import Learned, MetricSettings
from ._refresh_progress import ProgressCallback
from ._report import INACTIVE, RefreshError, RefreshHistory, RefreshReport
from ._schedules import SOON, back_off, gap_after
from .layout import Layout, layers_of, unwrap_model
from .structures import BlockDiagonal, States, Structure, StructureOf, Vector, find_structure
from .structures._table import check_structure

__all__ = ["StructuredGeometry"]

log = logging.getLogger("llqr")

#: What a copy makes anew, or has no use for.
DERIVED = frozenset({"on_progress", "_applied", "_bases"})
#: What is stored for one parameter: {key: tensor}.
_Entries = Mapping[str, Tensor]


class StructuredGeometry(Geometry):
    """Precondition with a block-diagonal U whose blocks have a structure (base class).

    A subclass says how U is learned, in :meth:`learn`; layout, blocks, application, spectrum,
    memory, summary, sharding, moves between devices and dtypes, state, load checks, reports and the
    count of refreshes are here.

    Args:
        structure: a structure's name or class, or a function (name, parameter) -> name or class.
        settings: when to refresh, how to cut and apply U.

    Attributes:
        layout: parameters to flat vectors and back (after :meth:`bind`).
        blocks: U, one :class:`llqr.geometry.structures.Structure` per group of equal blocks, in
            ``blocks.parts``.
        states: the state of each part, in the same order; only :meth:`learn` changes U.
        history: how many refreshes ran and were refused.
        on_progress: None, or a function (done, total, seconds) that a refresh of more than two
            seconds calls as its products are computed, a few times a second. Copies lack it.

    Raises:
        ValueError: an unknown structure; a structure that is not what it says (see
            :func:`llqr.geometry.structures.verify_structure`).

    Example:
        Scale each layer's gradient to length one, learned at the first step:

        >>> import torch, llqr
        >>> class UnitLayers(llqr.StructuredGeometry):
        ...     def __init__(self):
        ...         super().__init__("scalar")
        ...     def learn(self, forwards, parameters, *, step, weights):
        ...         loss = forwards[0]()
        ...         g = torch.autograd.grad(loss, parameters)
        ...         flat = self.layout.pack(dict(zip(self.parameters, g)))
        ...         states = [
        ...             {"U": torch.stack([1 / part.norm() for part in flat.split(group.lengths)])}
        ...             for group in self.layout.groups
        ...         ]
        ...         return llqr.geometry.Learned(states, gradient=flat)
        >>> model = torch.nn.Linear(2, 1)
        >>> geometry = UnitLayers()
        >>> optimizer = llqr.Optimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model, geometry=geometry
        ... )
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
        >>> round(optimizer.last_report.ratio * optimizer.last_report.gradient_norm, 6)
        1.0
    """

    layout: Layout
    blocks: BlockDiagonal
    states: States
    #: The structure of 1-D parameters in layers whose structure needs matrices.
    vector_kind: type[Structure] = Vector
    on_progress: ProgressCallback | None = None
    #: The states, and what a step takes in their place: no part of a copy.
    _applied: tuple[States, States] | None = None
    _bases: tuple[States, Bases] | None = None

    def __init__(self, structure: StructureOf, settings: MetricSettings | None = None) -> None:
        check_structure(structure)
        self.structure = structure
        self.settings = MetricSettings() if settings is None else settings
        self.history = RefreshHistory()
        self._warned: set[str] = set()
        self._inactive = 0  # accepted refreshes in a row after which U hardly acts

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in DERIVED}

    @property
    def batch_norm(self) -> NormStatistics:
        """The statistics that a refresh sees in a BatchNorm in training mode."""
        return self.settings.batch_norm

    # -- what a subclass says ------------------------------------------------------------------

    def learn(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        *,
        step: int,
        weights: Sequence[float] | None,
    ) -> Learned:
        """Return the states to use from now on.

        Args:
            forwards: functions that return the loss or (loss, outputs), on refresh minibatches.
            parameters: what the forwards depend on, whole, in the order of ``self.parameters``.
            step: the optimizer step.
            weights: how much each forward counts; None: equally.
        """
        raise RuntimeError(f"{type(self).__name__} has nothing to refresh")

    def find_kind(self, name: str, parameter: Tensor) -> type[Structure]:
        """Return the structure of a parameter; a subclass may choose a variant of it."""
        return find_structure(self.structure, name, parameter)

    def advise_on_failures(self, step: int) -> str:
        """Return what a user can do when refreshes are refused again and again."""
        return "A larger refresh batch helps; max_failures sets how many are tolerated"

    def advise_on_inaction(self) -> str:
        """Return what a user can do when U stays close to the identity."""
        return "more frequent refreshes (every) let it act"

    def explain_indefinite_U(self) -> str:
        """Return, in brackets, why U could become indefinite, and what keeps it positive."""
        return ""

    # -- binding -------------------------------------------------------------------------------

    def bind(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Lay out the parameters in blocks; new ones start at the identity."""
        # Bound again (a group was added, the dtype changed): what is known goes over.
        learned = self.state() if hasattr(self, "states") else {}
        if learned and unwrap_model(model) is not unwrap_model(self.model):
            raise ValueError(
                f"geometry: this {type(self).__name__} holds what it learned of another model; "
                "make a new one for this model"
            )
        super().bind(model, parameters)
        known = self._follow_tensors(learned) if learned else {}
        devices = {p.device for p in self.parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"model: {type(self).__name__} needs all parameters on one device, got "
                f"{sorted(map(str, devices))}"
            )
        # Parameters that fully_shard cut leave no process with a whole gradient to apply U to.
        self.sharded = self.ranks.sharded or (self.settings.shard and self.ranks.size > 1)
        layers, transposed = layers_of(unwrap_model(model))
        lay_out = partial(
            Layout,
            self.parameters,
            layers,
            self.find_kind,
            self.vector_kind,
            self.settings.block_size,
            transposed,
        )
        self.layout = lay_out(ranks=self.ranks) if self.sharded else lay_out()
        self.blocks = BlockDiagonal(self.layout)
        # What is stored if nothing is sharded, without memory for it.
        self._whole_blocks = BlockDiagonal(lay_out()) if self.sharded else self.blocks
        self.states = self.blocks.identity(next(iter(devices), torch.device("cpu")))
        self._laid_out = self.parameters
        if known:
            self._keep_known(known)

    def _follow_tensors(self, learned: Mapping[str, _Entries]) -> dict[str, _Entries]:
        """Return what was learned of the tensors that are still there, under their present names.

        A new tensor under an old name is another parameter: it starts at the identity. So does a
        tensor that got its numbers now: those of U were on the meta device too.
        """
        now, views = self.parameters, self.layout.views
        before = former_names(self._laid_out, now)
        return {
            name: learned[old]
            for name, old in before.items()
            if views[old].shape == tuple(now[name].shape)
            and (now[name].is_meta or not any(v.is_meta for v in learned[old].values()))
        }

    def _keep_known(self, known: Mapping[str, _Entries]) -> None:
        """Take over the blocks that are still there; say which are lost."""
        fresh = self.parameters.keys() - known.keys()
        self.blocks.load(self.states, known, optional=self.parameters, fresh=fresh)
        # On the meta device: what fits and what is missing, without memory.
        meta = self._whole_blocks.identity(torch.device("meta"))
        lost = self._whole_blocks.load(meta, known, optional=self.parameters, fresh=fresh)
        if lost:
            warn_caller(
                "geometry: a parameter joined or left a layer that has one block, or was replaced "
                "in it, so what was learned there is dropped and starts anew at the identity "
                f"({lost[0]})"
            )

    def _move_to_device_of(self, tensor: Tensor) -> None:
        """Take U where the parameters went since: to another device, to double, or in shape."""
        if not self.layout.fits(self.parameters):
            self.bind(self.model, self.parameters)
        device = tensor.device
        held = {v.device for s in self.states for v in s.values()}
        if held <= {device}:
            return
        if torch.device("meta") in held and device.type != "meta":
            self.states = self.blocks.identity(device)  # without numbers so far, as the model was
        else:
            self.states = [{k: v.to(device) for k, v in s.items()} for s in self.states]

    # -- applying U ----------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, gradients: Tensors) -> dict[str, Tensor]:
        """Return U g as {name: tensor}, each in its gradient's dtype.

        Raises:
            KeyError: a name that is no parameter's.
            ValueError: another shape than the parameter's, or no floating-point dtype.
        """
        self._check_gradients(gradients)
        if gradients:
            self._move_to_device_of(next(iter(gradients.values())))
        if self.sharded:  # every process applies its shard, and all gather the result
            moved = self.blocks.apply(self._applied_states(), self.layout.pack(gradients))
            result = self.layout.unpack_like(moved, gradients)
        else:
            result = self.blocks.apply_to_tensors(self._applied_states(), gradients)
        # U is float32 or float64; the caller gets the dtype of its gradients.
        if list(map(DTYPE, result.values())) == list(map(DTYPE, gradients.values())):
            return result
        return {n: x.to(gradients[n].dtype) for n, x in result.items()}

    def bases_for(self, tensors: Tensors) -> Bases | None:
        """Return the bases in which U is diagonal, or None if its structure has none."""
        self._check_gradients(tensors)
        for tensor in tensors.values():
            self._move_to_device_of(tensor)
            break
        if self._bases is None or self._bases[0] is not self.states:  # a new list is a new U
            rotating = self.blocks.with_orthogonal_bases(self.states)
            self._bases = self.states, Bases(self.blocks, rotating)
        bases = self._bases[1]
        return bases if bases.names else None

    def _applied_states(self) -> States:
        """Return the states that a step applies: U, or a form of it that is faster."""
        if self.settings.application == "full":
            return self.states
        if self._applied is None or self._applied[0] is not self.states:  # a new list is a new U
            forms = self.blocks.applied_forms(self.states, self.settings.application)
            self._applied = self.states, forms
        return self._applied[1]

    # -- refreshing ----------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Tell whether ``every`` steps have passed since the last refresh (first at start).

        After refusals in a row the gap is longer (see ``max_failures``), up to 50 steps if the
        network was saturated, so that such a network does not pay an attempt in each step.
        """
        settings, history = self.settings, self.history
        if step < settings.start:
            return False
        if history.last < 0:
            return True
        gap = gap_after(settings.every, history.last, step)
        if settings.max_failures is None:
            gap = back_off(settings.every, gap, history.failures)
        gap = back_off(settings.every, gap, history.saturated, SOON)
        return step - history.last >= gap

    def refreshes_in(self, steps: int) -> int:
        """Return how many refreshes a run of so many steps has, if all are accepted."""
        count, last = 0, -1
        for step in range(self.settings.start, steps):
            if last < 0 or step - last >= gap_after(self.settings.every, last, step):
                count, last = count + 1, step
        return count

    def refresh(
        self,
        forwards: Sequence[Callable[[], Any]],
        *,
        step: int = 0,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport:
        """Learn U anew on the forwards' minibatch; keep the new U or refuse it.

        Args:
            forwards: functions that return (loss, outputs), or the loss alone if the geometry
                needs no outputs.
            step: the optimizer step, for schedules and the report.
            weights: how much each forward counts; equal by default.

        Returns:
            The report; a refused refresh leaves U as it was and warns once.

        Raises:
            RefreshError: more than ``max_failures`` refreshes in a row were refused.
        """
        self._require_bound()
        began = time.perf_counter()
        # The mean of the processes' models has a meaning only at equal weights.
        self.ranks.check_replicas(self.parameters)
        # Whole until the end: a product may run the forwards again.
        with whole_parameters(self.model, self.parameters) as whole:
            for parameter in whole.values():
                self._move_to_device_of(parameter)
                break
            learned = self.learn(forwards, list(whole.values()), step=step, weights=weights)
        with torch.no_grad():
            if learned.states is not None:
                self.states = learned.states
            numbers = self._measure_action(learned.gradient)
        seconds = time.perf_counter() - began
        report = RefreshReport(
            **{
                "step": step,
                "accepted": learned.reason is None,
                "reason": learned.reason,
                "seconds": seconds,
                **numbers,
                **learned.numbers,
            }
        )
        self._record_outcome(report, learned.is_failure)
        return report

    def _measure_action(self, g: Tensor | None) -> dict[str, float]:
        """Return what the report tells of U: its action on g, and its eigenvalues."""
        spectrum = self.blocks.extreme_eigenvalues(self.states, exact=False).values()
        numbers = {
            "eigenvalue_min": min((low for low, _ in spectrum), default=1.0),
            "eigenvalue_max": max((high for _, high in spectrum), default=1.0),
        }
        if g is None:
            return numbers
        dot = self.layout.space.dot
        # |Ug - g| / |g| tells a user whether U acts at all.
        ug = self.blocks.apply(self.states, g)
        norm, length, change = (float(dot(v, v).sqrt()) for v in (g, ug, ug - g))
        return {
            **numbers,
            "gradient_norm": norm,
            "ratio": _quotient(length, norm),
            "change": _quotient(change, norm),
            "cosine": _quotient(float(dot(g, ug)), norm * length),
        }

    def _record_outcome(self, report: RefreshReport, is_failure: bool) -> None:
        """Count the refresh, and say what the user should know of it."""
        self.history.record(report, is_failure=is_failure)
        log.info("%s", report)
        if report.accepted:
            self._warn_of_accepted(report)
            return
        failures = self.history.failures
        if self.settings.max_failures is not None and failures > self.settings.max_failures:
            raise RefreshError(
                f"{failures} refreshes in a row were refused, the last one because "
                f"{report.reason} ({report.headline()}). U is unchanged. "
                f"{self.advise_on_failures(report.step)}",
                report,
            )
        self._warn_once(
            "refused",
            f"a refresh was refused because {report.reason}; U is kept as it was (see "
            "optimizer.last_report; later refusals are only counted)",
        )

    def _warn_of_accepted(self, report: RefreshReport) -> None:
        """Say once what is likely to disappoint, and the way out."""
        if report.eigenvalue_min is not None and report.eigenvalue_min < 0:
            self._warn_once(
                "indefinite",
                f"U has a negative eigenvalue{self.explain_indefinite_U()}: g'Ug can be "
                "negative, and then the probe is skipped",
            )
        # The scale of a closed form is set, not learned: its J tells nothing of the base's lr.
        elif self.blocks.learns and report.J_after is not None and report.J_after > 0:
            self._warn_once(
                "uphill",
                f"J(U) = {report.J_after:.3g} is positive: a step -Ug would raise the loss in its "
                "quadratic model, so U is too large along g for a learning rate of one; a small "
                "base lr, damping, or lr='auto' avoids that",
            )
        if report.change is not None and self.blocks.learns:
            self._inactive = self._inactive + 1 if report.change < INACTIVE else 0
        if self._inactive == 3:
            self._warn_once(
                "inactive",
                f"U hardly acts: after three refreshes in a row |Ug-g|/|g| is below {INACTIVE} "
                f"(now {report.change:.2g}), so that training is the base optimizer's; "
                f"{self.advise_on_inaction()}",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warn_caller(message)

    # -- what U is -----------------------------------------------------------------------------

    def spectrum(self) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest eigenvalue of U for each layer (decomposed)."""
        self._require_bound()
        return self.blocks.extreme_eigenvalues(self.states, exact=True)

    def numel(self) -> int:
        """Return the number of stored scalars of U (of all processes)."""
        self._require_bound()
        template = self._state_template()
        return sum(v.numel() for entries in template.values() for v in entries.values())

    def memory(self) -> dict[str, int]:
        """Return bytes in this process: what U takes, and the form of it that steps apply.

        "preconditioner" is U; "applied" what its form takes beside it, as far as it was made.
        """
        self._require_bound()
        stored = {id(v): v for s in self.states for v in s.values()}
        made = [] if self._applied is None else self._applied[1]
        applied = [v for s in made for v in s.values() if id(v) not in stored]
        return {"preconditioner": bytes_of(stored), "applied": bytes_of(applied)}

    def _judgement_bytes(self) -> int:
        """Return what a refresh takes at its end, to report how the new U acts."""
        vector = self.layout.numel * self.layout.dtype.itemsize
        # g, U g and their difference; two dozen vectors of some blocks, if those are estimated.
        return 3 * vector + max((part.estimate_bytes() for part in self.blocks.parts), default=0)

    def summary(self) -> str:
        """Return a table: which parameter has which structure, blocks and stored scalars."""
        self._require_bound()
        stored = self._state_template()
        rows = [("parameter", "shape", "structure", "blocks", "stored")]
        for name, parameter in self.parameters.items():
            scalars = sum(v.numel() for v in stored[name].values())
            blocks = len(self._whole_blocks.layout.slices_of(name))
            structure = self.layout.block_kinds[name].name
            rows.append((name, shape_text(parameter), structure, str(blocks), f"{scalars:,}"))
        return format_table(rows, self._total_line())

    # -- checkpoints ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Start anew at the identity, as before the first refresh."""
        self._require_bound()
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self.states, self.history = self.blocks.identity(device), RefreshHistory()

    def counters(self) -> dict[str, int]:
        """Return how many refreshes ran, were refused (in all, in a row), and when the last was."""
        return self.history.counters()

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Take over what :meth:`counters` returned."""
        self.history.load_counters(counters)

    def _state_template(self) -> dict[str, dict[str, Tensor]]:
        """Return what :meth:`state` returns, without memory."""
        return self._whole_blocks.export(self._whole_blocks.identity(torch.device("meta")))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return U per parameter: elementwise "U" in its shape, blocks as "A.0", "B.0", ...

        It is whole in every process; if U is sharded, all must call this together.
        """
        self._require_bound()
        if self.sharded:
            return self.blocks.export_all_shards(self.states, self._state_template())
        return self.blocks.export(self.states)

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`state` returned; raise if anything is missing or does not fit.

        torch.distributed.checkpoint drops the state of parameters that do not require a gradient;
        their blocks may be missing and stay as they are.
        """
        self._require_bound()
        # Into copies: a state that does not fit changes nothing.
        states = [{k: v.clone() for k, v in s.items()} for s in self.states]
        frozen = {n for n, p in self.parameters.items() if not p.requires_grad}
        meta = self._whole_blocks.identity(torch.device("meta"))
        wrong = self._whole_blocks.load(meta, state, optional=frozen)
        if wrong:
            raise ValueError(
                f"state: does not fit this geometry ({self.structure!r}, block_size "
                f"{self.settings.block_size}): {'; '.join(wrong[:3])}"
            )
        self.blocks.load(states, state)
        self.states = states


def _quotient(a: float, b: float) -> float:
    return a / b if b > 0 else float("nan")
