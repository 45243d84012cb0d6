"""The statements of docs/closed-form.md, each against dense float64 matrices, without chance."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, gauss_newton
from llqr.curvature.sampling._softmax import SoftmaxRoot
from llqr.geometry.structures.closed_form._eigenbases import KroneckerBases

PAGE = Path(__file__).parents[2] / "docs" / "closed-form.md"
OUT, IN = 3, 4


def positive(n):
    x = torch.randn(n, n + 2, dtype=F64)
    return x @ x.T / n


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]


def root(matrix):
    values, q = torch.linalg.eigh(matrix)
    return q * values.clamp(min=0).sqrt()


class Columns(llqr.Fisher):
    """Samples of one's own: J'c for every c of a given list, so that C is the mean of w w'."""

    def __init__(self, cotangents):
        self.cotangents = cotangents  # outputs -> (count, *outputs.shape)

    def sample(self, loss, outputs, *, count, generator):
        return [self.cotangents(outputs.detach())]


class Layer:
    """z = W a over a batch, and U learned from given samples."""

    def __init__(self, a):
        self.model = nn.Linear(a.shape[1], OUT, bias=False).double()
        self.a, self.y = a, torch.arange(len(a)) % OUT

    def __call__(self):
        z = self.model(self.a)
        return F.cross_entropy(z, self.y), z

    def refreshed(self, structure, cotangents, damping=1e-12, **settings):
        with torch.no_grad():
            count = len(cotangents(self.model(self.a)))
        geometry = llqr.NaturalGradient(
            structure, curvature=Columns(cotangents), samples=count, damping=damping, **settings
        )
        geometry.bind(self.model)
        assert geometry.refresh([self]).accepted
        return geometry


def explicit(geometry):
    """U as a matrix, column by column."""
    units = torch.eye(OUT * IN, dtype=F64)
    return torch.stack(
        [geometry.apply({"weight": e.view(OUT, IN)})["weight"].view(-1) for e in units], 1
    )


def softmax_columns(z):
    """The columns of a square root of the mean cross-entropy's H, times the root of their number.

    So the mean of w w' is C.
    """
    p = z.softmax(1)
    H = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / len(z)
    return (len(H) ** 0.5 * root(H)).T.reshape(-1, *z.shape)


def bases_and_M(geometry):
    """Q_B, Q_A and M of the only block."""
    part, state = geometry.parts[0], geometry.states[0]
    assert isinstance(part, KroneckerBases)
    return state["QB"][0], state["QA"][0], part.second_moment(state)[0]


def scaled(matrix):
    """A matrix over its mean eigenvalue: what c does."""
    return matrix / matrix.diagonal().mean()


def inverse_power(matrix, power):
    values, q = torch.linalg.eigh(matrix)
    return q @ torch.diag(values**-power) @ q.T


# -- the minimiser ---------------------------------------------------------------------------------


def J(s, Q, C, v, damping):
    u = -Q @ (s * (Q.T @ v))
    return v @ u + 0.5 * u @ C @ u + 0.5 * damping * u @ u


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("probes", ["white", "uncorrelated in Q"])
def test_minimiser_over_probes(probes, damping):
    """s = 1 / ((Q'CQ)_ii + damping), for white probes and for any that Q makes uncorrelated."""
    n = 6
    C, Q = positive(n), orthogonal(n)
    vs = orthogonal(n) * n**0.5 if probes == "white" else Q @ torch.diag(torch.rand(n).double() + 1)
    s = (1 / ((Q.T @ C @ Q).diagonal() + damping)).requires_grad_()
    mean = sum(J(s, Q, C, v, damping) for v in vs.T) / n
    (slope,) = torch.autograd.grad(mean, s)
    assert float(slope.abs().max()) < 1e-13
    mean = mean.detach()
    if probes == "white":
        U = Q @ torch.diag(s.detach()) @ Q.T
        expected = -U.trace() + 0.5 * (U @ (C + damping * torch.eye(n, dtype=F64)) @ U).trace()
        assert float(mean) == pytest.approx(float(expected), rel=1e-12)
        assert float(mean) == pytest.approx(-0.5 * float(s.detach().sum()), rel=1e-12)


def test_minimiser_with_equal_eigenvalues_is_that_of_the_mean():
    """One side only, U = B^-1 x I: s_i = in / sum_j M_ij = in / lambda_i(L), and no Q_A."""
    C, QB, QA = positive(OUT * IN), orthogonal(OUT), orthogonal(IN)
    Q = torch.kron(QB, QA)
    M = (Q.T @ C @ Q).diagonal().view(OUT, IN)
    s = (IN / M.sum(1)).requires_grad_()
    U = torch.kron(QB @ torch.diag(s) @ QB.T, torch.eye(IN, dtype=F64))
    (slope,) = torch.autograd.grad(-U.trace() + 0.5 * (U @ C @ U).trace(), s)
    assert float(slope.abs().max()) < 1e-13
    L = torch.einsum("ijkj->ik", C.view(OUT, IN, OUT, IN))  # E W W'
    agree((QB.T @ L @ QB).diagonal(), M.sum(1), 1e-13)


def test_nearest_inverse_and_a_cautious_diagonal():
    n = 6
    C, Q, U = positive(n), orthogonal(n), positive(n)
    inverse = torch.linalg.inv(C)
    distance = 0.5 * ((U - inverse) @ C @ (U - inverse)).trace() - 0.5 * inverse.trace()
    agree(distance, -U.trace() + 0.5 * (U @ C @ U).trace(), 1e-12)
    of_inverse, of_C = ((Q.T @ x @ Q).diagonal() for x in (inverse, C))
    assert bool((1 / of_C < of_inverse).all())


def test_one_gradient_is_fitted_and_nothing_else():
    """At one g the minimiser has U g = C^-1 g, in any basis."""
    n = 6
    C, Q, g = positive(n), orthogonal(n), torch.randn(n, dtype=F64)
    newton = torch.linalg.solve(C, g)
    s = ((Q.T @ newton) / (Q.T @ g)).requires_grad_()
    (slope,) = torch.autograd.grad(J(s, Q, C, g, 0.0), s)
    assert float(slope.abs().max()) < 1e-10
    agree(Q @ (s.detach() * (Q.T @ g)), newton, 1e-12)
    assert float(s.detach().min()) < 0  # and U need not be positive


# -- M and U of the library ------------------------------------------------------------------------


def dense_C(layer):
    _, z = layer()
    return gauss_newton(z, lambda z: F.cross_entropy(z, layer.y), [layer.model.weight]).detach()


def test_m_is_the_diagonal_of_C_in_the_bases_and_ekfacs_s():
    layer = Layer(torch.randn(7, IN, dtype=F64))
    geometry = layer.refreshed("e-kfac", softmax_columns, damping=0.1)
    QB, QA, M = bases_and_M(geometry)
    C, Q = dense_C(layer), torch.kron(QB, QA)
    agree(M.reshape(-1), (Q.T @ C @ Q).diagonal(), 1e-12)
    # EKFAC: the mean of per-example squares, over all labels with their probability.
    S = torch.zeros_like(M)
    for a, p in zip(layer.a, layer.model(layer.a).detach().softmax(1), strict=True):
        for label, probability in enumerate(p):
            g = torch.outer(p - torch.eye(OUT, dtype=F64)[label], a)
            S += probability * (QB.T @ g @ QA).square() / len(layer.a)
    agree(M, S, 1e-12)
    agree(
        explicit(geometry),
        scaled(Q @ torch.diag(1 / (M + 0.1 * M.mean()).reshape(-1)) @ Q.T),
        1e-12,
    )


def test_kfacs_m_is_the_rank_one_matrix_with_the_same_marginals():
    layer = Layer(torch.randn(7, IN, dtype=F64))
    M, rank_one = (
        bases_and_M(layer.refreshed(kind, softmax_columns))[2] for kind in ("e-kfac", "kfac")
    )
    agree(rank_one.sum(0), M.sum(0), 1e-12)
    agree(rank_one.sum(1), M.sum(1), 1e-12)
    agree(rank_one, torch.outer(M.sum(1), M.sum(0)) / M.sum(), 1e-12)
    assert float((M - rank_one).abs().max()) > 0.01 * float(M.max())


@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal", "dense"])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_u_does_not_change_with_the_scale_of_the_loss(structure, power):
    layer = Layer(torch.randn(7, IN, dtype=F64))
    once, larger = (
        explicit(layer.refreshed(structure, cotangents, damping=0.1, power=power))
        for cotangents in (softmax_columns, lambda z: 30 * softmax_columns(z))
    )
    agree(once, larger, 1e-12)
    assert float(once.diagonal().mean()) == pytest.approx(1, rel=1e-12)


# -- K-FAC, TNT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "e-kfac"])
def test_kfac_of_martens_and_grosse_if_activations_and_output_gradients_are_independent(structure):
    """All pairs of 5 activations and 3 output Hessians: C = G x A, L = tr(A) G, R = tr(G) A."""
    a, H = torch.randn(5, IN, dtype=F64), torch.stack([positive(OUT) for _ in range(3)])
    layer = Layer(a.repeat_interleave(3, 0))

    def columns(z):
        blocks = torch.block_diag(*(root(H[n % 3]) for n in range(len(z))))
        return blocks.T.reshape(-1, *z.shape) * OUT**0.5  # the mean over rows and columns is C

    A, G = a.T @ a / 5, H.mean(0)
    geometry = layer.refreshed(structure, columns, damping=0.05)
    QB, QA, M = bases_and_M(geometry)
    F_ = torch.kron(G, A)
    lam = 0.05 * F_.trace() / len(F_)
    eye = torch.eye(len(F_), dtype=F64)
    agree(explicit(geometry), scaled(torch.linalg.inv(F_ + lam * eye)), 1e-10)
    state = geometry.states[0]
    agree(state["L"][0], A.trace() * G, 1e-12)
    agree(state["R"][0], G.trace() * A, 1e-12)
    agree(torch.kron(QB, QA) @ torch.diag(M.reshape(-1)) @ torch.kron(QB, QA).T, F_, 1e-10)
    # Factored damping of the same strength, for any pi, adds to every direction.
    pi = (A.trace() / IN / (G.trace() / OUT)).sqrt()
    eyes = [torch.eye(n, dtype=F64) for n in (OUT, IN)]
    factored = torch.kron(G + lam.sqrt() / pi * eyes[0], A + lam.sqrt() * pi * eyes[1])
    extra = lam.sqrt() * (pi * torch.kron(G, eyes[1]) + torch.kron(eyes[0], A) / pi)
    agree(factored, F_ + lam * eye + extra, 1e-12)
    assert float(torch.linalg.eigvalsh(factored - F_ - lam * eye)[0]) > 0


def test_the_left_factor_weights_output_hessians_with_the_lengths_of_their_activations():
    layer = Layer(torch.randn(7, IN, dtype=F64))
    state = layer.refreshed("kfac", softmax_columns).states[0]
    H = softmax_hessians(layer.model(layer.a).detach().softmax(1))
    agree(state["L"][0], (layer.a.square().sum(1)[:, None, None] * H).mean(0), 1e-12)
    trace = H.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    agree(state["R"][0], (trace * layer.a[:, :, None] * layer.a[:, None, :]).mean(0), 1e-12)


# -- Shampoo, SOAP, Adam: gradients in the place of samples ----------------------------------------


def gradients_of_parts(layer, parts):
    """Cotangents of which J'c is the gradient of each part of the batch, and those gradients.

    Those of a squared error: a softmax's are orthogonal to (1, ..., 1), so that L has no inverse.
    """
    errors = layer.model(layer.a).detach() - torch.randn(len(layer.a), OUT, dtype=F64)
    rows = torch.arange(len(errors)) % parts
    c = torch.stack([errors * (rows == k)[:, None] for k in range(parts)])
    return (lambda _: c), torch.einsum("kno,ni->koi", c, layer.a)


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_shampoo_if_gradients_are_the_samples(power):
    """U = c L^-p x R^-p with L = sum G G' and R = sum G'G: p = 1/4 is Shampoo's exponent."""
    layer = Layer(torch.randn(24, IN, dtype=F64))
    cotangents, G = gradients_of_parts(layer, 8)
    L, R = (G @ G.mT).sum(0), (G.mT @ G).sum(0)
    geometry = layer.refreshed("kfac", cotangents, power=power)
    QB, QA, M = bases_and_M(geometry)
    for q, square in ((QB, L), (QA, R)):
        turned = q.T @ square @ q
        agree(turned, torch.diag(turned.diagonal()), 1e-12)
    shampoo = torch.kron(inverse_power(L, power), inverse_power(R, power))
    agree(explicit(geometry), scaled(shampoo), 1e-8)
    # SOAP in the same bases, and Adam without bases: the root of the mean of squares.
    soap = layer.refreshed("e-kfac", cotangents, power=0.5)
    Q, v = torch.kron(QB, QA), (QB.T @ G @ QA).square().mean(0).reshape(-1)
    agree(explicit(soap), scaled(Q @ torch.diag(v.rsqrt()) @ Q.T), 1e-8)
    adam = layer.refreshed("diagonal", cotangents, power=0.5)
    v = G.square().mean(0).reshape(-1)
    agree(explicit(adam), scaled(torch.diag(v.rsqrt())), 1e-8)


def test_the_gauss_newton_bartlett_estimator_has_the_diagonal_of_C_as_its_mean():
    """B g o g with g the mean gradient at drawn labels, over all labels of a batch of 3."""
    layer = Layer(torch.randn(3, IN, dtype=F64))
    p = layer.model(layer.a).detach().softmax(1)
    mean = torch.zeros(OUT, IN, dtype=F64)
    for labels in itertools.product(range(OUT), repeat=3):
        probability = p[range(3), labels].prod()
        g = (p - torch.eye(OUT, dtype=F64)[list(labels)]).T @ layer.a / 3
        mean += probability * 3 * g.square()
    agree(mean.reshape(-1), dense_C(layer).diagonal(), 1e-12)
    M = layer.refreshed("diagonal", softmax_columns).states[0]["M"]
    agree(M.reshape(-1), mean.reshape(-1), 1e-12)


# -- signs against labels --------------------------------------------------------------------------


def outputs_drawn(p, kind):
    """All H^(1/2) e of each row with their probability: (rows, draws, classes), (rows, draws)."""
    n, k = p.shape
    if kind == "labels":
        return p[:, None, :] - torch.eye(k, dtype=F64), p
    e = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * k)
    F_ = SoftmaxRoot(p, torch.ones(n, 1, dtype=F64), -1)
    return F_.product(e[:, None, :].expand(-1, n, -1)).transpose(0, 1), p.new_full(
        (n, len(e)), 1 / len(e)
    )


def softmax_hessians(p):
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def fourth_moments(p, kind):
    """E |r|^4 of each row, theorem 4."""
    H = softmax_hessians(p)
    lengths = (torch.eye(p.shape[1], dtype=F64) - p[:, None, :]).square().sum(2)
    if kind == "labels":
        return (p * lengths.square()).sum(1)
    b = p * lengths
    trace = H.diagonal(dim1=1, dim2=2).sum(1)
    return trace**2 + 2 * H.square().sum((1, 2)) - 2 * b.square().sum(1)


def relative_error(p, a, kind, samples=8):
    """sqrt(E |mean of W W' - L|^2) / |L| for W = sum_n r_n a_n', theorem 5."""
    H, K = softmax_hessians(p), a @ a.T
    trace = H.diagonal(dim1=1, dim2=2).sum(1)
    pairs = K.square() * (torch.outer(trace, trace) + torch.einsum("nij,kij->nk", H, H))
    own = K.diagonal().square() * (fourth_moments(p, kind) - H.square().sum((1, 2)))
    variance = pairs.sum() - pairs.diagonal().sum() + own.sum()
    L = torch.einsum("n,nij->ij", K.diagonal(), H)
    return float((variance / samples).sqrt() / L.norm())


@pytest.mark.parametrize("kind", ["labels", "signs"])
def test_the_error_in_closed_form(kind):
    """Against every draw of a batch of two."""
    a, p = torch.randn(2, IN, dtype=F64), torch.randn(2, OUT, dtype=F64).softmax(1)
    g, q = outputs_drawn(p, kind)
    L = torch.einsum("n,nij->ij", a.square().sum(1), softmax_hessians(p))
    square = 0.0
    for i, j in itertools.product(range(q.shape[1]), repeat=2):
        W = torch.outer(g[0, i], a[0]) + torch.outer(g[1, j], a[1])
        square += float(q[0, i] * q[1, j] * (W @ W.T - L).square().sum())
    assert relative_error(p, a, kind, 1) == pytest.approx(square**0.5 / float(L.norm()), rel=1e-10)


@pytest.mark.parametrize("kind", ["labels", "signs"])
def test_second_and_fourth_moments_of_the_outputs_samples(kind):
    p = torch.randn(6, 4, dtype=F64).mul(2).softmax(1)
    g, q = outputs_drawn(p, kind)
    agree(torch.einsum("nd,ndi,ndj->nij", q, g, g), softmax_hessians(p), 1e-12)
    agree((q * g.square().sum(2).square()).sum(1), fourth_moments(p, kind), 1e-12)


def test_two_classes_by_hand():
    """E |g|^4 is 4 q (1 - 3 q) for labels and 4 q^2 (1 + 4 q) for signs, q = p1 p2."""
    first = torch.tensor([0.5, 0.5**0.5, 0.9, 0.999], dtype=F64)
    p = torch.stack([first, 1 - first], 1)
    q = p.prod(1)
    fourth = {kind: fourth_moments(p, kind) for kind in ("labels", "signs")}
    agree(fourth["labels"], 4 * q * (1 - 3 * q), 1e-12)
    agree(fourth["signs"], 4 * q**2 * (1 + 4 * q), 1e-12)
    ratio = fourth["labels"] / fourth["signs"]
    assert ratio[:2].tolist() == pytest.approx([0.5, 1], rel=1e-10) and float(ratio[3]) > 900


def test_the_pages_table_of_errors():
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randn(n, 32, dtype=F64, generator=generator) for n in (128, 10))
    a = a.relu()
    table = re.search(r"^\| logits times .*?(?=\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = [line.strip("|").split("|") for line in table[0].splitlines()[2:]]
    assert len(rows) == 5
    for row in rows:
        scale, certain, labels, signs = map(float, row)
        p = (scale * a @ w.T / 32**0.5).softmax(1)
        assert float(p.amax(1).mean()) == pytest.approx(certain, abs=6e-5)
        assert relative_error(p, a, "labels") == pytest.approx(labels, abs=6e-3)
        assert relative_error(p, a, "signs") == pytest.approx(signs, abs=6e-3)
