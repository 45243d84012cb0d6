"""Samples of the curvature: exact square roots of H, w = J'H^(1/2)e, and their second moment."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import llqr
from explicit import F64, agree, gauss_newton, vector
from llqr.curvature import LinearLoss, curvature_samples
from llqr.curvature._curvatures import square_root_of
from llqr.curvature._samples import divide_samples
from llqr.curvature.sampling._base import random_signs
from llqr.curvature.sampling._lanczos import lanczos_square_root
from nets import NETS, Case, mlp

# -- F F' = H --------------------------------------------------------------------------------------

Y = torch.tensor([0, 2, 1, 1, 0, 2])
TARGET = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
IGNORED = torch.tensor([0, -100, 1, 1, -100, 2])
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
PIXELS = torch.randint(3, (2, 2, 3), generator=torch.Generator().manual_seed(4))
TOKENS = torch.tensor([[0, 2, 1], [1, -100, 2]])
ROWS = torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(5))
ENTRIES = torch.rand(6, 3, dtype=F64, generator=torch.Generator().manual_seed(6))


def shifted(z):
    """A language model's loss: every token predicts the next."""
    return F.cross_entropy(z[:, :-1].reshape(-1, 4), torch.tensor([1, 2, 0, 3]))


def kl(z, z0):
    return F.kl_div(z.log_softmax(-1), z0.log_softmax(-1), reduction="batchmean", log_target=True)


def contrastive(z):
    y = torch.arange(4)
    return F.cross_entropy(z, y) + F.cross_entropy(z.T, y)


SOFTMAX = {
    "mean": ((6, 3), lambda z: F.cross_entropy(z, Y)),
    "sum": ((6, 3), lambda z: F.cross_entropy(z, Y, reduction="sum")),
    "class weights": ((6, 3), lambda z: F.cross_entropy(z, Y, weight=WEIGHT)),
    "weighted rows": ((6, 3), lambda z: F.cross_entropy(z, Y, reduction="none") @ ROWS),
    "ignore_index": ((6, 3), lambda z: F.cross_entropy(z, IGNORED)),
    "label smoothing": ((6, 3), lambda z: F.cross_entropy(z, Y, label_smoothing=0.3)),
    "soft targets": ((6, 3), lambda z: F.cross_entropy(z, TARGET.softmax(-1))),
    "all at once": (
        (6, 3), lambda z: F.cross_entropy(z, IGNORED, weight=WEIGHT, label_smoothing=0.2),
    ),
    "log-softmax outside": ((6, 3), lambda z: F.nll_loss(z.log_softmax(-1), Y)),
    "two classes": ((6, 2), lambda z: F.cross_entropy(z, Y % 2)),
    "one row": ((4,), lambda z: F.cross_entropy(z, torch.tensor(2))),
    "images": ((2, 3, 2, 3), lambda z: F.cross_entropy(z, PIXELS)),
    "sequences": ((2, 4, 3), lambda z: F.cross_entropy(z, TOKENS)),
    "tokens": ((2, 3, 4), lambda z: F.cross_entropy(z.view(6, 4), TOKENS.view(6))),
    "shifted tokens": ((2, 3, 4), shifted),
}  # fmt: skip
DIAGONAL = {
    "squared": ((6, 3), lambda z: F.mse_loss(z, TARGET)),
    "weighted squares": ((6, 3), lambda z: (ENTRIES * (z - TARGET).square()).sum()),
    "binary": ((6, 3), lambda z: F.binary_cross_entropy_with_logits(z, ENTRIES)),
    "weighted binary": (
        (6, 3),
        lambda z: F.binary_cross_entropy_with_logits(z, ENTRIES, ENTRIES, pos_weight=WEIGHT),
    ),
    "poisson": ((6, 3), lambda z: F.poisson_nll_loss(z, ENTRIES)),
    "number": ((), lambda z: z.square()),
}
COUPLED = {
    # Softmax of something else than z, rows that are coupled, and one kind on top of another.
    "temperature": ((6, 3), lambda z: F.cross_entropy(z / 2, Y)),
    "masked classes": ((6, 3), lambda z: F.cross_entropy(z[:, :2], Y % 2)),
    "contrastive": ((4, 4), contrastive),
    "coupled rows": ((6, 3), lambda z: F.cross_entropy(z, Y) + z.sum().square() / 50),
    "coupled binary rows": (
        (6, 2), lambda z: F.cross_entropy(z, Y % 2) + (z[0] - z[1]).diff().square().sum() / 50,
    ),
    "logsumexp squared": ((6, 3), lambda z: F.mse_loss(z, TARGET) + z.logsumexp(-1).square().sum()),
    "smooth norm": ((6, 3), lambda z: (1 + z.square().sum()).sqrt()),
}  # fmt: skip
KINDS = [
    *(("SoftmaxRoot", SOFTMAX[n], n) for n in SOFTMAX),
    *(("DiagonalRoot", DIAGONAL[n], n) for n in DIAGONAL),
    *((None, COUPLED[n], n) for n in COUPLED),
]


def unit_vectors(zs):
    """All columns of the identity over several tensors, as one batch per tensor."""
    sizes = [z.numel() for z in zs]
    columns = torch.eye(sum(sizes), dtype=zs[0].dtype).split(sizes, 1)
    return [c.reshape(-1, *z.shape) for c, z in zip(columns, zs, strict=True)]


def squared_root(root, zs):
    """F F' from F on all unit vectors, which is exact: no sample is drawn."""
    columns = [x.reshape(len(x), -1) for x in root.product(unit_vectors(zs))]
    columns = torch.cat(columns, 1)  # row i is F e_i
    return columns.T @ columns


def kinds(root):
    return None if root._roots is None else [type(r).__name__ for r in root._roots]


@pytest.mark.parametrize("kind, case, name", KINDS, ids=[k[-1] for k in KINDS])
def test_the_square_root_squared_is_H(kind, case, name):
    shape, loss = case
    z = torch.randn(shape, dtype=F64).requires_grad_()
    root = square_root_of(llqr.Fisher(), loss(z), z)
    assert kinds(root) == (kind and [kind])
    H = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), z.numel())
    agree(squared_root(root, [z]), H, 1e-10 if kinds(root) else 1e-2)


def test_divergences_go_through_the_same_recognition():
    z = torch.randn(6, 3, dtype=F64, requires_grad=True)
    own = llqr.Divergence(lambda z, z0: ENTRIES[0] @ (z - z0).square().mean(0))
    for curvature, kind in ((llqr.Divergence(kl), "SoftmaxRoot"), (own, "DiagonalRoot")):
        root = square_root_of(curvature, F.cross_entropy(z, Y), z)
        assert kinds(root) == [kind]
        D = curvature.divergence
        H = torch.autograd.functional.hessian(lambda x, D=D: D(x, z.detach()), z.detach())
        agree(squared_root(root, [z]), H.reshape(18, 18))


@pytest.mark.parametrize(
    "loss, expected",
    [
        (lambda a, b: F.cross_entropy(a, Y) + b.square().mean(), ["SoftmaxRoot", "DiagonalRoot"]),
        (lambda a, b: (a - b).square().mean() + F.cross_entropy(a, Y), None),
        (lambda a, b: (a - b).square().mean(), None),
    ],
    ids=["each its own", "coupled", "a difference"],
)  # fmt: skip
def test_several_outputs(loss, expected):
    a, b = (torch.randn(6, 3, dtype=F64, requires_grad=True) for _ in range(2))
    root = square_root_of(llqr.Fisher(), loss(a, b), {"a": a, "b": b})
    assert kinds(root) == expected

    def of_vector(v):
        return loss(v[:18].view(6, 3), v[18:].view(6, 3))

    H = torch.autograd.functional.hessian(of_vector, vector([a, b]))
    agree(squared_root(root, [a, b]), H, 1e-10 if expected else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 6.0, 20.0])
def test_low_precision_and_certain_networks(dtype, spread):
    z = (spread * torch.randn(24, 5)).to(dtype).requires_grad_()
    y = torch.arange(24) % 5
    losses = {
        "SoftmaxRoot": lambda z: F.cross_entropy(z, y),
        "DiagonalRoot": lambda z: F.mse_loss(z, torch.zeros_like(z)),
    }
    for kind, loss in losses.items():
        root = square_root_of(llqr.Fisher(), loss(z), z)
        assert kinds(root) == [kind]
        assert all(s.dtype == torch.float32 for s in root.draw(2, torch.Generator()))
        H = torch.autograd.functional.hessian(loss, z.detach().double()).reshape(120, 120)
        found = squared_root(root, [z.detach().float()]).double()
        agree(found, H, 30 * torch.finfo(dtype).eps if spread < 20 else 0.25)


def test_lanczos_is_exact_once_its_basis_is_full_and_stops_at_its_tolerance():
    A = torch.randn(12, 9, dtype=F64)
    H, e = A @ A.T, torch.randn(12, dtype=F64)  # of rank 9
    values, Q = torch.linalg.eigh(H)
    exact = Q @ (values.clamp(min=0).sqrt() * (Q.T @ e))
    count = 0

    def product(v):
        nonlocal count
        count += 1
        return H @ v

    # The roots of eigenvalues that are zero but for rounding.
    agree(lanczos_square_root(product, e, 1e-16, tolerance=0.0), exact, 1e-7)
    whole, count = count, 0
    found = lanczos_square_root(product, e, 1e-16, tolerance=0.1)
    assert count < whole <= 12 and 1e-6 < (found - exact).norm() / exact.norm() < 0.3


# -- w = J's ---------------------------------------------------------------------------------------


class Columns(llqr.Fisher):
    """Samples of one's own: the columns of the symmetric square root of H, one after another."""

    def sample(self, loss, outputs, *, count, generator):
        z = outputs
        g = torch.autograd.grad(loss, z, create_graph=True)[0].reshape(-1)
        H = torch.stack([torch.autograd.grad(x, z, retain_graph=True)[0].reshape(-1) for x in g])
        values, Q = torch.linalg.eigh(H)
        return [((Q * values.clamp(min=0).sqrt()) @ Q.T).view(count, *z.shape)]


def rows_of(samples: list[Tensor]) -> Tensor:
    return torch.cat([w.reshape(len(w), -1) for w in samples], 1)


@pytest.mark.parametrize("name", NETS)
def test_every_network_and_a_curvature_of_ones_own(name):
    """The sum of w w' over all columns of H^(1/2) is C: no chance in it."""
    net = NETS[name]()
    parameters = [*net.parameters, torch.zeros(2, dtype=F64), torch.zeros(3, requires_grad=True)]
    samples = curvature_samples(net, parameters, Columns())
    *drawn, frozen, unused = samples.draw(net.outputs().numel(), torch.Generator())
    W = rows_of(drawn)
    agree(W.T @ W, net.matrices["fisher"])
    agree(vector(samples.gradient[:-2]), net.matrices["g"])
    agree(samples.loss, net()[0].detach())
    assert not samples.loss.requires_grad and all(p.grad is None for p in parameters)
    assert frozen.shape == (len(W), 2) and unused.shape == (len(W), 3)
    assert not frozen.any() and not unused.any() and unused.dtype == torch.float32


def test_checkpointed_activations_and_batch_norm_in_training_mode():
    x = torch.randn(6, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    for run in (lambda m: m(x), lambda m: checkpoint(m, x, use_reentrant=False)):
        net = Case(model, run, lambda z: F.cross_entropy(z, Y))
        net.model.train()
        W = rows_of(curvature_samples(net, net.parameters, Columns()).draw(18, torch.Generator()))
        agree(W.T @ W, gauss_newton(net.outputs(), net.loss, net.parameters).detach())


# -- chance ----------------------------------------------------------------------------------------


def test_signs_are_white():
    e = random_signs(4000, torch.zeros(7, 3), torch.Generator().manual_seed(0)).reshape(4000, 21)
    assert e.dtype == torch.float32 and bool((e.abs() == 1).all())
    z = (e.T @ e / 4000 - torch.eye(21)).mul(4000**0.5)
    assert z.abs().max() < 4 and e.mean(0).mul(4000**0.5).abs().max() < 4


def logistic(rows: int = 20) -> Case:
    x = torch.randn(rows, 4, dtype=F64)
    y = torch.randint(3, (rows,))
    return Case(nn.Linear(4, 3), lambda m: m(x), lambda z: F.cross_entropy(z, y))


def test_second_moment_and_preconditioned_gradient():
    net = logistic()
    C, g = net.matrices["fisher"], net.matrices["g"]
    samples = curvature_samples(net, net.parameters)
    W = rows_of(samples.draw(8192, torch.Generator().manual_seed(1)))
    moments = W[:, :, None] * W[:, None, :]
    error = moments.var(0).div(len(W)).sqrt()
    assert float(((moments.mean(0) - C) / error).abs().max()) < 4
    # The whole size at once, where a factor of 1.1 on C would be seen.
    size = torch.einsum("mi,ij,mj->m", W, C, W) / C.square().sum()
    standard_error = float(size.std()) / len(W) ** 0.5
    assert abs(float(size.mean()) - 1) < 3 * standard_error < 0.1 - 3 * standard_error

    # U g with the mean of w w' in place of C: its error falls as 1 / sqrt(m).
    damping = 0.3 * torch.eye(len(g), dtype=F64) * C.diag().mean()
    exact = torch.linalg.solve(C + damping, g)
    counts, errors = (64, 256, 1024), []
    for m in counts:
        mean = moments.view(-1, m, *C.shape).mean(1)
        found = torch.linalg.solve(mean + damping, g.expand(len(mean), -1))
        errors.append((found - exact).norm(dim=1).square().mean().sqrt())
    slopes = torch.stack(errors).log().diff() / torch.tensor(counts, dtype=F64).log().diff()
    assert bool((slopes < -0.4).all() and (slopes > -0.6).all()), slopes


def test_a_seed_decides_and_the_global_state_is_untouched():
    net = mlp()
    samples = curvature_samples(net, net.parameters)
    before = torch.get_rng_state()
    first, again, other = (
        rows_of(samples.draw(3, torch.Generator().manual_seed(s))) for s in (0, 0, 1)
    )
    generator = torch.Generator().manual_seed(0)
    parts = [rows_of(samples.draw(3, generator)) for _ in range(2)]
    assert torch.equal(first, again) and torch.equal(first, parts[0])
    assert not torch.equal(first, other) and not torch.equal(*parts)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_gives_samples_that_are_not():
    net = mlp()
    net.x.fill_(torch.nan)
    samples = curvature_samples(net, net.parameters).draw(2, torch.Generator())
    assert all(bool(w.isnan().any()) for w in samples)


# -- several forwards ------------------------------------------------------------------------------


def test_every_forward_counts_as_its_weight_says():
    generator = torch.Generator().manual_seed(0)
    weights = [0.5, 0.0, 0.2, 0.3]
    for count in (3, 4, 8, 17):
        shares = divide_samples(weights, count, generator)
        assert sum(n for n, _ in shares) == count
        assert all((n > 0) == (a > 0) for (n, _), a in zip(shares, weights, strict=True))
        counted = torch.tensor([n * scale**2 / count for n, scale in shares])
        agree(counted, torch.tensor(weights), 1e-6)
    drawn = torch.zeros(4)
    for _ in range(2000):
        shares = divide_samples(weights, 2, generator)
        assert sum(n for n, _ in shares) == 2 and all(scale == 1 for _, scale in shares)
        drawn += torch.tensor([n / 4000 for n, _ in shares])
    assert drawn[1] == 0 and float((drawn - torch.tensor(weights)).abs().max()) < 0.03


class Ones(llqr.Fisher):
    def sample(self, loss, outputs, *, count, generator):
        return [torch.ones(count, *outputs.shape, dtype=F64)]


def test_several_forwards_run_once_with_one_graph_at_a_time():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).to(F64)
    parameters = list(model.parameters())
    alive: list[weakref.ref[Tensor]] = []
    made: list[tuple[list[Tensor], list[Tensor], Tensor]] = []

    def forward():
        assert not any(r() is not None for r in alive)
        x = torch.randn(6, 4, dtype=F64)
        alive.append(weakref.ref(x))  # as long as the graph, which needs it for the first weight
        z = model(x)
        loss = F.cross_entropy(z, Y)
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        image = torch.autograd.grad(z, parameters, torch.ones_like(z), retain_graph=True)
        made.append((list(image), list(grads), loss.detach()))
        return loss, z

    samples = curvature_samples([forward] * 3, parameters, Ones(), weights=[2, 1, 1])
    W = rows_of(samples.draw(4, torch.Generator()))
    loss, gradient = samples.loss, samples.gradient
    assert len(made) == 3
    a = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    images, grads = (torch.stack([vector(m[i]) for m in made]) for i in (0, 1))
    agree(W.T @ W / 4, images.T @ (a[:, None] * images))
    agree(vector(gradient), a @ grads)
    agree(loss, a @ torch.stack([m[2] for m in made]))
    again = rows_of(samples.draw(4, torch.Generator()))  # the same inputs and dropout masks
    assert len(made) == 6 and torch.equal(W, again)


# -- refusals --------------------------------------------------------------------------------------


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1e-3, 1e-3)


class _ConstantSlope(torch.autograd.Function):
    """A fused loss: the slope is computed along with the value and kept as a constant."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward((z.softmax(-1) - F.one_hot(Y, 3)) / 6)
        return F.cross_entropy(z, Y)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


REFUSED = {
    "loss alone": (lambda z: F.cross_entropy(z, Y), "only a loss", ValueError),
    "linear": (lambda z: (z.mean(), z), "linear in `outputs`", LinearLoss),
    "detached": (lambda z: (z.square().mean(), z.detach()), "no tensor in `outputs`", ValueError),
    "concave": (lambda z: (-z.square().mean(), z), "not positive semidefinite", ValueError),
    "negative weights": (
        lambda z: (F.cross_entropy(z, Y, weight=-WEIGHT, reduction="sum"), z),
        "not positive semidefinite", ValueError,
    ),
    "indefinite": (lambda z: (z.square().mean() + z.prod(1).sum(), z), "llqr.LLQR", ValueError),
    "complex": (
        lambda z: ((c := torch.complex(z, z)).abs().square().mean(), c), "complex", ValueError,
    ),
    "clipped": (
        lambda z: (F.cross_entropy(c := _Clipped.apply(z), Y), c), "not linear", ValueError,
    ),
    "hidden": (
        lambda z: (_ConstantSlope.apply(z) + z.square().mean(), z), "is hidden", ValueError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sampled_is_refused(name):
    run, text, error = REFUSED[name]
    layer = nn.Linear(4, 3).to(F64)
    x = torch.randn(6, 4, dtype=F64)
    samples = curvature_samples(lambda: run(layer(x)), layer.parameters())
    with pytest.raises(error, match=text):
        samples.draw(2, torch.Generator())


class OneSample(llqr.Fisher):
    def sample(self, loss, outputs, *, count, generator):
        return [torch.ones_like(outputs)]


def test_bad_arguments_are_refused():
    net = mlp()
    with pytest.raises(ValueError, match=r"curvature: Newton\(\) has no samples"):
        curvature_samples(net, net.parameters, "newton")
    with pytest.raises(ValueError, match="forward: got an empty list"):
        curvature_samples([], net.parameters)
    with pytest.raises(ValueError, match="weights: expected 1"):
        curvature_samples(net, net.parameters, weights=[1, 2])
    with pytest.raises(ValueError, match="count: expected an integer >= 1, got 0"):
        curvature_samples(net, net.parameters).draw(0, torch.Generator())
    with pytest.raises(ValueError, match=r"of shapes \[\(6, 3\)\]; expected \[\(2, 6, 3\)\]"):
        curvature_samples(net, net.parameters, OneSample()).draw(2, torch.Generator())
    with pytest.raises(ValueError, match="does not depend on any of the parameters"):
        _ = curvature_samples(net, [torch.zeros(2, requires_grad=True)]).gradient
