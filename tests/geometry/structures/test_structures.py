"""apply, pullback, project and extreme eigenvalues of every structure against explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llqr
from explicit import F64, agree, block_indices, block_matrix, explicit_U, vector
from llqr.geometry.layout import Layout, layers_of
from llqr.geometry.structures import STRUCTURES as KINDS
from llqr.geometry.structures import BlockDiagonal, Vector
from nets import Zoo
from tiny import STRUCTURES, layer_of

LOW, HIGH = BOUNDS = (0.2, 4.0)
CASES = {name: (name, {}) for name in STRUCTURES} | {
    "e-kfac-gradient": ("e-kfac", {"bases": "gradient"}),
    "psd-e-kfac": ("e-kfac", {"constraint": "square"}),
}
BLOCK_SIZES = (None, 3)


def trainable_entries(blocks: BlockDiagonal, states):
    """The entries that the inner solve changes."""
    return [{k: s[k] for k in p.trainable} for p, s in zip(blocks.parts, states, strict=True)]


class Bound:
    """The structure of U on the parameters of a model, with explicit matrices beside it."""

    def __init__(
        self,
        case: str,
        block_size: int | None = None,
        dtype: torch.dtype = F64,
        model: nn.Module | None = None,
    ) -> None:
        self.structure, options = CASES[case]
        self.square = options.get("constraint") == "square"
        options = {"bases": "learned", "constraint": "positive", **options}
        kind = KINDS[self.structure].variant(**options)
        self.model, self.block_size = (model or Zoo()).to(dtype), block_size
        layers, transposed = layers_of(self.model)
        self.named = dict(self.model.named_parameters())
        self.layout = Layout(
            self.named, layers, lambda name, p: kind, Vector, block_size, transposed
        )
        self.blocks = BlockDiagonal(self.layout)
        self.states = self.blocks.identity(torch.device("cpu"))

    def random(self, spread: float = 1.0):
        """States away from the identity, not symmetric, not positive."""
        states = [{k: v + spread * torch.randn_like(v) for k, v in s.items()} for s in self.states]
        if not getattr(self.blocks, "linear", False) or self.structure == "e-kfac":
            for s in states:
                for key in ("QA", "QB") if spread < 1 else ():
                    s[key] = torch.linalg.qr(s[key]).Q
        return states

    def matrix(self, states) -> Tensor:
        """U in model order."""
        exported = self.blocks.export(states)
        return explicit_U(self.model, self.structure, exported, self.block_size, self.square)

    def pack(self, v: Tensor) -> Tensor:
        """A vector in model order, in the layout's order."""
        parts = torch.split(v, [p.numel() for p in self.named.values()])
        return self.layout.pack(
            {n: part.view(p.shape) for part, (n, p) in zip(parts, self.named.items(), strict=True)}
        )

    def unpack(self, flat: Tensor) -> Tensor:
        return vector(self.layout.unpack(flat).values())

    def draw(self) -> Tensor:
        return torch.randn(self.layout.numel, dtype=F64)

    def spectra(self, states) -> dict[str, Tensor]:
        """The eigenvalues of the symmetric part of each layer's block."""
        U = self.matrix(states)
        layers, _ = layers_of(self.model)
        owner = [layers[n] for n, p in self.named.items() for _ in range(p.numel())]
        found = {}
        for layer in dict.fromkeys(owner):
            own = torch.tensor([layer == o for o in owner])
            block = U[own][:, own]
            found[layer] = torch.linalg.eigvalsh(0.5 * (block + block.T))
        return found


each = pytest.mark.parametrize("case", CASES)
sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@each
@sizes
def test_the_identity(case, block_size):
    u = Bound(case, block_size)
    agree(u.matrix(u.states), torch.eye(u.layout.numel, dtype=F64), 2e-12)
    v = u.draw()
    agree(u.unpack(u.blocks.apply(u.states, u.pack(v))), v, 2e-12)


@each
@sizes
def test_apply(case, block_size):
    u = Bound(case, block_size)
    states = u.random()
    U = u.matrix(states)
    if case != "identity":
        assert float((U - torch.eye(len(U), dtype=F64)).norm()) > 1.0
    for _ in range(3):
        v = u.draw()
        agree(u.unpack(u.blocks.apply(states, u.pack(v))), U @ v, 1e-12)


@each
@sizes
def test_pullback_is_the_gradient(case, block_size):
    """d <r, U x> / d state, by automatic differentiation of the explicit matrices."""
    u = Bound(case, block_size)
    states = u.random()
    x, r = u.draw(), u.draw()
    pulled = u.blocks.export(u.blocks.pullback(states, u.pack(x), u.pack(r)))
    exported = u.blocks.export(states)
    for kind, owner, number, index in block_indices(u.model, u.structure, block_size):
        if kind == "identity":
            assert pulled[owner] == {}
            continue
        if kind == "diagonal":
            gradient = torch.cat(
                [pulled[n].get("U", (0 * x)[: p.numel()]).reshape(-1) for n, p in u.named.items()]
            )
            agree(gradient[index], (x * r)[index], 1e-14)
            continue
        tail = f".{number}"
        own = {k[: -len(tail)]: v for k, v in exported[owner].items() if k.endswith(tail)}
        leaves = {k: v.clone().requires_grad_() for k, v in own.items() if k not in "LR"}
        used = dict(leaves)
        if u.square:
            used["S"] = leaves["S"].square() + 1e-12
        flat = index.reshape(-1)
        (r[flat] @ block_matrix(kind, used, len(flat)) @ x[flat]).backward()
        trainable = {k[: -len(tail)]: v for k, v in pulled[owner].items() if k.endswith(tail)}
        expected = {"S"} if case == "e-kfac-gradient" else set(leaves)
        assert set(trainable) == expected
        for key, value in trainable.items():
            agree(value, leaves[key].grad, 1e-12)


@each
def test_linear_says_whether_u_is_linear_in_the_trainable_entries(case):
    u = Bound(case, 3)
    a, b = u.random(), u.random()
    b = [
        {k: (t[k] if k in part.trainable else s[k]) for k in s}
        for part, s, t in zip(u.blocks.parts, a, b, strict=True)
    ]
    mean = [{k: 0.3 * s[k] + 0.7 * t[k] for k in s} for s, t in zip(a, b, strict=True)]
    U, expected = u.matrix(mean), 0.3 * u.matrix(a) + 0.7 * u.matrix(b)
    linear = float((U - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert linear is u.blocks.linear
    assert linear is (case not in ("diag-kfac", "kfac", "e-kfac", "psd-e-kfac"))


# -- project ---------------------------------------------------------------------------------------

POSITIVE = [case for case in CASES if case != "psd-e-kfac"]


@pytest.mark.parametrize("case", POSITIVE)
@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_project_keeps_eigenvalues_within_the_bounds(case, block_size, dtype):
    u = Bound(case, block_size, dtype)
    states = u.random()
    if case == "e-kfac-gradient":  # there the bases are eigenvectors, orthogonal always
        states = [{k: torch.linalg.qr(v).Q if k in ("QA", "QB") else v for k, v in s.items()}
                  for s in states]  # fmt: skip
    projected = u.blocks.project(states, BOUNDS)
    U = u.matrix(projected)
    # For e-kfac QB and QA are orthogonal to rounding; the others comply exactly.
    slack = 50 * torch.finfo(dtype).eps
    agree(U, U.T, slack)
    values = torch.linalg.eigvalsh(0.5 * (U + U.T))
    assert float(values[0]) >= LOW * (1 - slack) and float(values[-1]) <= HIGH * (1 + slack)
    if case != "identity":
        before = torch.linalg.eigvalsh(0.5 * (u.matrix(states) + u.matrix(states).T))
        assert float(before[0]) < LOW - 0.1
    agree(u.matrix(u.blocks.project(projected, BOUNDS)), U, 20 * slack)  # once is enough


@pytest.mark.parametrize("case", POSITIVE)
def test_project_changes_nothing_within_the_bounds(case):
    """The identity comes back bit for bit, and so does a mild U (bases to rounding)."""
    u = Bound(case, 3)
    for before, after in zip(u.states, u.blocks.project(u.states, BOUNDS), strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)
    mild = [
        {k: v + 0.05 * (d + d.mT if d.dim() == 3 and k in "ABU" else d) if k not in ("QA", "QB")
         else v for k, v in s.items() for d in [torch.randn_like(v).clamp(-2, 2)]}
        for s in u.states
    ]  # fmt: skip
    agree(u.matrix(u.blocks.project(mild, BOUNDS)), u.matrix(mild), 1e-14)


@pytest.mark.parametrize("case", ["scalar", "diagonal", "dense"])
def test_project_is_the_nearest_point(case):
    """Symmetrise, then clip the eigenvalues: the projection in the Frobenius norm."""
    u = Bound(case)
    states = u.random()
    U = u.matrix(states)
    values, vectors = torch.linalg.eigh(0.5 * (U + U.T))
    nearest = vectors @ torch.diag(values.clamp(LOW, HIGH)) @ vectors.T
    agree(u.matrix(u.blocks.project(states, BOUNDS)), nearest, 1e-12)


@pytest.mark.parametrize("case", ["kfac", "diag-kfac"])
def test_project_bounds_both_factors_by_the_roots(case):
    u = Bound(case, 3)
    projected = u.blocks.project(u.random(), BOUNDS)
    for state in projected:
        for key in set(state) & {"A", "B"}:
            factor = state[key]
            if factor.dim() == 3:
                assert torch.equal(factor, factor.mT)
                factor = torch.linalg.eigvalsh(factor)
            assert float(factor.min()) >= LOW**0.5 * (1 - 1e-14)
            assert float(factor.max()) <= HIGH**0.5 * (1 + 1e-14)


def test_project_makes_learned_bases_orthogonal_again():
    """By the nearest orthogonal matrix: Q (Q'Q)^(-1/2)."""
    u = Bound("e-kfac", 3)
    states = u.random()
    projected = u.blocks.project(states, BOUNDS)
    for before, after in zip(states, projected, strict=True):
        for key in set(after) & {"QA", "QB"}:
            q = after[key]
            agree(q @ q.mT, torch.eye(q.shape[-1], dtype=F64).expand_as(q), 1e-13)
            values, vectors = torch.linalg.eigh(before[key].mT @ before[key])
            root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
            agree(q, before[key] @ root, 1e-9)


def test_lengths_of_learned_bases_go_into_s():
    """Columns of other lengths are part of U; that U is kept, with orthogonal bases."""
    u = Bound("e-kfac", 3)
    states = [
        {k: torch.linalg.qr(torch.randn_like(v)).Q * (0.8 + 0.4 * torch.rand_like(v[:, :1]))
         if k in ("QA", "QB") else 0.8 + 0.4 * torch.rand_like(v) for k, v in s.items()}
        for s in u.states
    ]  # fmt: skip
    projected = u.blocks.project(states, BOUNDS)
    agree(u.matrix(projected), u.matrix(states), 1e-12)
    for state in projected:
        for key in set(state) & {"QA", "QB"}:
            q = state[key]
            agree(q @ q.mT, torch.eye(q.shape[-1], dtype=F64).expand_as(q), 1e-13)


def test_s_is_the_nearest_that_orthogonal_bases_allow():
    """In general: the diagonal of the old operator in the new bases."""
    u = Bound("e-kfac", model=nn.Linear(5, 4, bias=False))
    states = u.random(0.2)
    states[0]["QA"], states[0]["QB"] = (
        torch.eye(n, dtype=F64)[None] + 0.2 * torch.randn(1, n, n, dtype=F64) for n in (5, 4)
    )
    (projected,) = u.blocks.project(states, (1e-9, 1e9))
    Q = torch.kron(projected["QB"][0].contiguous(), projected["QA"][0].contiguous())
    expected = (Q.T @ u.matrix(states) @ Q).diagonal().clamp(min=1e-9)
    agree(projected["S"].reshape(-1), expected, 1e-12)


def test_gradient_bases_are_not_touched_by_a_projection():
    u = Bound("e-kfac-gradient", 3)
    states = u.random()
    for before, after in zip(states, u.blocks.project(states, BOUNDS), strict=True):
        for key in set(after) & {"QA", "QB", "L", "R"}:
            assert torch.equal(before[key], after[key])


# -- extremes --------------------------------------------------------------------------------------


@each
@sizes
def test_extremes(case, block_size):
    """Per layer, against the eigenvalues of the layer's explicit block."""
    u = Bound(case, block_size)
    for states in (u.states, u.blocks.project(u.random(), BOUNDS), u.random()):
        expected = u.spectra(states)
        symmetric = float((u.matrix(states) - u.matrix(states).T).abs().max()) < 1e-12
        if case == "kfac" and not symmetric:
            continue  # a factor's symmetric part says nothing of the product's
        found = u.blocks.extreme_eigenvalues(states, exact=True)
        assert list(found) == sorted(expected, key=list(found).index)
        for layer, (low, high) in found.items():
            assert low == pytest.approx(float(expected[layer][0]), rel=1e-9, abs=1e-9)
            assert high == pytest.approx(float(expected[layer][-1]), rel=1e-9, abs=1e-9)


# -- the rest of the seam --------------------------------------------------------------------------


@each
@sizes
def test_export_and_load(case, block_size):
    u = Bound(case, block_size)
    states = u.random()
    exported = {n: {k: v.clone() for k, v in e.items()} for n, e in u.blocks.export(states).items()}
    assert list(exported) == list(u.named)
    stored = sum(v.numel() for s in states for v in s.values())
    assert sum(v.numel() for e in exported.values() for v in e.values()) == stored
    assert u.blocks.load(u.states, exported) == []
    for before, after in zip(states, u.states, strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)
    if case == "identity":
        return
    name, key = next((n, k) for n, e in exported.items() for k in e)
    wrong = {**exported, name: {**exported[name], key: torch.zeros(7, 7, 7)}}
    assert u.blocks.load(u.states, wrong) == [
        f"{name}: {key!r} has shape (7, 7, 7), expected {tuple(exported[name][key].shape)}"
    ]
    assert len(u.blocks.load(u.states, {})) == sum(len(e) for e in exported.values())


def test_blocks_are_numbered_within_their_parameter():
    """Whatever else is laid out: states of old parameters fit when new ones join."""
    first, second = nn.Linear(3, 2, bias=False, dtype=F64), nn.Linear(3, 5, bias=False, dtype=F64)
    model = nn.Sequential(first, second)
    alone = Bound("kfac", 3, model=nn.Sequential(nn.Identity(), second))
    both = Bound("kfac", 3, model=model)
    exported = alone.blocks.export(alone.random())
    assert both.blocks.load(both.states, exported) == ["0.weight: no 'A.0'", "0.weight: no 'B.0'"]
    own = both.blocks.export(both.states)["1.weight"]
    assert own["A.0"].shape == (3, 3) and own["B.0"].shape == (3, 3)  # rows 0 to 2
    assert own["A.1"].shape == (3, 3) and own["B.1"].shape == (2, 2)  # rows 3 and 4
    for key, value in exported["1.weight"].items():
        assert torch.equal(own[key], value)


@each
def test_average_is_of_the_factors(case):
    u = Bound(case, 3)
    old, new = u.random(), u.random()
    for part, o, n, m in zip(
        u.blocks.parts, old, new, u.blocks.average(old, new, 0.9), strict=True
    ):
        for key in m:
            expected = 0.9 * o[key] + 0.1 * n[key] if key in part.trainable else n[key]
            torch.testing.assert_close(m[key], expected, rtol=0, atol=1e-14)


@each
def test_the_unit_of_the_clip_is_an_entry_of_a_block(case):
    """Views, so that a clip in place reaches the entries."""
    u = Bound(case, 3)
    entries = trainable_entries(u.blocks, u.random())
    views = u.blocks.split_by_block(entries)
    expected = 0
    for kind, *_ in block_indices(u.model, u.structure, 3):
        per = {"identity": 0, "kfac": 2, "diag-kfac": 2, "e-kfac": 3}.get(kind, 1)
        expected += 1 if (kind, case) == ("e-kfac", "e-kfac-gradient") else per
    assert len(views) == expected
    for view in views:
        view.zero_()
    assert not any(v.any() for e in entries for v in e.values())


# -- gradient bases --------------------------------------------------------------------------------


def gradient_geometry(**settings) -> tuple[llqr.LLQR, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(5, 4, dtype=F64)
    settings = {"bases": "gradient", "ema": 0.5, "lr": 0.1, "renew_every": 2, **settings}
    geometry = llqr.LLQR("e-kfac", **settings)
    geometry.bind(model)
    return geometry, model


def refresh_on(geometry: llqr.LLQR, model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Refresh on a batch of its own; return the weight's gradient and U before it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 5, dtype=F64, generator=generator)
    y = torch.randint(4, (20,), generator=generator)

    def forward() -> tuple[Tensor, Tensor]:
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    before = explicit_U(model, geometry.structure, geometry.state())
    (g,) = torch.autograd.grad(forward()[0], model.weight)
    assert geometry.refresh([forward]).accepted
    return g, before


def test_gradient_bases_are_eigenvectors_of_running_averages():
    geometry, model = gradient_geometry()
    L = R = None
    for number in range(5):
        g, _ = refresh_on(geometry, model, number)
        keep = 0.95 if number else 0.0
        L = (keep * L if number else 0) + (1 - keep) * g @ g.T
        R = (keep * R if number else 0) + (1 - keep) * g.T @ g
        state = geometry.state()["weight"]
        agree(state["L.0"], L, 1e-12)
        agree(state["R.0"], R, 1e-12)
        for key, average in (("QB.0", L), ("QA.0", R)):
            q = state[key]
            agree(q.T @ q, torch.eye(len(q), dtype=F64), 1e-12)
            turned = q.T @ average @ q
            off = float((turned - torch.diag(turned.diagonal())).abs().max())
            renewed = number % 2 == 0
            assert (off < 1e-12 * float(average.norm())) is renewed


def test_gradient_bases_really_turn():
    """With identity bases e-kfac would be `diagonal`: U couples entries of the weight."""
    geometry, model = gradient_geometry(ema=0.0)
    refresh_on(geometry, model, 0)
    state = geometry.state()["weight"]
    for key in ("QA.0", "QB.0"):
        largest = state[key].abs().amax(1)  # 1 in every row of a signed permutation
        assert float(largest.min()) < 0.9
    U = explicit_U(model, "e-kfac", geometry.state())[:20, :20]
    off = U - torch.diag(U.diagonal())
    assert float(off.norm()) > 0.1 * float((U - torch.eye(20, dtype=F64)).norm())
    diagonal = llqr.LLQR("diagonal", ema=0.0, lr=0.1)
    diagonal.bind(model)
    refresh_on(diagonal, model, 0)
    g = {"weight": torch.randn(4, 5, dtype=F64)}
    a, b = (m.apply(g)["weight"] for m in (geometry, diagonal))
    assert float((a - b).norm()) > 0.05 * float(g["weight"].norm())


def test_bases_turn_at_the_first_refresh_that_is_accepted():
    """A refused one does not leave e-kfac without bases until the next renewal."""
    geometry, model = gradient_geometry(lr=lambda step: 1e4 if step == 0 else 0.1, scale=99)
    x, y = torch.randn(20, 5, dtype=F64), torch.randint(4, (20,))

    def forward() -> tuple[Tensor, Tensor]:
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    with pytest.warns(UserWarning, match="refused"):
        geometry.refresh([forward], step=0)
    assert torch.equal(geometry.state()["weight"]["QA.0"], torch.eye(5, dtype=F64))
    assert geometry.refresh([forward], step=1).accepted
    assert float(geometry.state()["weight"]["QA.0"].abs().amax(1).min()) < 0.9


def test_renewed_bases_of_roots_carry_the_operator_over():
    """psd-e-kfac stores roots of either sign; what goes over is the operator's diagonal."""
    geometry = llqr.LLQR("e-kfac", bases="gradient", constraint="square")
    geometry.bind(nn.Linear(3, 2, bias=False, dtype=F64))
    (part,), (state,) = geometry.blocks.parts, geometry.states
    state = {**state, "S": torch.tensor([[[1.0, -1, 2], [3, -0.5, 1]]], dtype=F64)}
    new = part.renew_bases(state, torch.randn(1, 2, 3, dtype=F64), True, True)
    before, after = (float(part.eigenvalues_from(s["S"]).sum()) for s in (state, new))
    assert after == pytest.approx(before, rel=1e-10)


def test_learned_bases_turn_too():
    torch.manual_seed(0)
    geometry, model = gradient_geometry(bases="learned", ema=0.0, lr=0.03)
    refresh_on(geometry, model, 0)
    U = explicit_U(model, "e-kfac", geometry.state())[:20, :20]
    off = U - torch.diag(U.diagonal())
    assert float(off.norm()) > 1e-3


def test_renewed_bases_carry_u_over():
    """S becomes the diagonal of the old operator in the new bases, within the same bounds."""
    # The solve itself moves nothing, and J is not asked.
    geometry, model = gradient_geometry(steps=1, lr=1e-300, constraint="none")
    geometry.load_state({
        "weight": {
            **{k: v.clone() for k, v in geometry.state()["weight"].items()},
            "S.0": 0.1 + 5 * torch.rand(4, 5, dtype=F64),
        },
        "bias": geometry.state()["bias"],
    })  # fmt: skip
    for number in range(3):
        _, before = refresh_on(geometry, model, number)
        state = geometry.state()["weight"]
        Q = torch.kron(state["QB.0"], state["QA.0"].contiguous())
        agree(state["S.0"].reshape(-1), (Q.T @ before[:20, :20] @ Q).diagonal(), 1e-12)
    values = torch.linalg.eigvalsh(before[:20, :20])
    assert float(values[0]) <= float(state["S.0"].min())
    assert float(state["S.0"].max()) <= float(values[-1])


@pytest.mark.parametrize("structure", ["diagonal", "scalar", "kfac", "e-kfac", "dense", "mixed"])
@pytest.mark.parametrize("left_out", [(), ("conv.weight",), ("head.bias", "norm.weight")])
def test_transform_is_apply_without_packing(structure, left_out):
    net = Zoo()
    names = {"conv": "kfac", "head": "dense", "norm": "scalar"}
    of = structure if structure != "mixed" else (lambda n, p: names.get(layer_of(n), "diagonal"))
    geometry = llqr.LLQR(of, block_size=5)
    geometry.bind(net)
    for part, state in zip(geometry.blocks.parts, geometry.states, strict=True):
        for key in part.trainable:
            state[key].add_(torch.randn_like(state[key]), alpha=0.3)
    given = {n: torch.randn_like(p) for n, p in net.named_parameters() if n not in left_out}
    kept = {n: g.clone() for n, g in given.items()}
    layout = geometry.layout
    packed = layout.unpack(geometry.blocks.apply(geometry.states, layout.pack(given)))
    found = geometry.apply(given)
    assert list(found) == list(given)
    for name, g in given.items():
        torch.testing.assert_close(found[name], packed[name], rtol=1e-12, atol=1e-12)
        assert torch.equal(g, kept[name])
        assert found[name].data_ptr() != g.data_ptr()
