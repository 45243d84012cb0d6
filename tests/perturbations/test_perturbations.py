"""Displacements against the formulas on explicit dense vectors and matrices, in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import llqr
from llqr._vectors import inner_products, sum_as_double
from tiny import (
    F64,
    close,
    displacement,
    everything,
    flat,
    layer_of,
    llqr_of,
    mlp,
    optimizer_of,
    random_metric,
    same,
    sgd,
    shaped,
    train,
    weights,
)

RHO, EPS0 = 0.2, 1e-12
NORMS = ("metric", "euclidean", "layer-metric", "layer-euclidean")


# -- SAM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["raw", "normalised"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("metric", [True, False], ids=["U", "I"])
def test_sam(metric, norm, direction):
    problem = mlp()
    geometry = random_metric(problem) if metric else None
    optimizer = optimizer_of(
        problem, geometry=geometry, perturbation=llqr.SAM(RHO, norm=norm, direction=direction)
    )
    g = problem.gradient()
    U = geometry.U if metric else torch.eye(flat(g).numel(), dtype=F64)
    d = U @ flat(g)
    if direction == "normalised":
        d = d / (d @ d + EPS0).sqrt()
    d = shaped(d, g)
    other = g if norm.endswith("metric") else d
    products = {n: (other[n] * d[n]).sum() for n in g}
    if norm.startswith("layer"):
        layers = {layer_of(n) for n in g}
        sums = {k: sum(v for n, v in products.items() if layer_of(n) == k) for k in layers}
        expected = {
            n: RHO * d[n] / (sums[layer_of(n)] + EPS0).sqrt() / math.sqrt(len(layers)) for n in g
        }
    else:
        expected = {n: RHO * d[n] / (sum(products.values()) + EPS0).sqrt() for n in g}
    close(displacement(optimizer, problem), expected, 1e-12)


def test_norms_agree_for_the_identity_up_to_the_root_of_the_layers():
    """ "metric" and "euclidean" are one thing at U = I, and so are the two layerwise norms."""
    eps = {}
    for norm in NORMS:
        problem = mlp()
        optimizer = optimizer_of(problem, perturbation=llqr.SAM(RHO, norm=norm))
        eps[norm] = displacement(optimizer, problem)
    close(eps["metric"], eps["euclidean"])
    close(eps["layer-metric"], eps["layer-euclidean"])
    total = flat(eps["layer-metric"]).norm()
    assert abs(total - RHO) < 1e-10


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "dense"])
def test_the_displacement_has_norm_rho_in_its_metric(structure):
    """eps' P eps = rho^2 with P = U^-1, for a learned U."""
    problem = mlp()
    optimizer = optimizer_of(
        problem, geometry=llqr_of(structure, steps=20), perturbation=llqr.SAM(RHO)
    )
    train(optimizer, problem, 3)
    geometry, g = optimizer.geometry, problem.gradient()
    n = flat(g).numel()
    U = torch.stack([flat(geometry.apply(shaped(e, g))) for e in torch.eye(n, dtype=F64)], 1)
    assert (U - torch.eye(n, dtype=F64)).abs().max() > 1e-2
    eps = flat(displacement(optimizer, problem))
    assert abs((eps @ torch.linalg.solve(U, eps)).sqrt() - RHO) < 1e-10


def test_the_norm_runs_over_the_perturbed_groups_alone():
    problem = mlp()
    geometry = random_metric(problem)
    first, second = (list(problem.model[i].parameters()) for i in (0, 2))
    base = torch.optim.SGD([{"params": first}, {"params": second, "rho": 0.0}], lr=0.1)
    optimizer = optimizer_of(problem, base, geometry=geometry, perturbation=llqr.SAM(RHO))
    eps, g = displacement(optimizer, problem), problem.gradient()
    count = sum(p.numel() for p in first)
    U, part = geometry.U[:count, :count], flat(g)[:count]
    expected = RHO * U @ part / (part @ U @ part + EPS0).sqrt()
    torch.testing.assert_close(flat(eps)[:count], expected, rtol=0, atol=1e-13)
    assert not flat(eps)[count:].any()


def test_groups_share_one_norm_and_have_their_own_radius():
    problem = mlp()
    first, second = (list(problem.model[i].parameters()) for i in (0, 2))
    base = torch.optim.SGD(
        [{"params": first, "rho": 0.1}, {"params": second, "rho": lambda step: 0.3}], lr=0.1
    )
    optimizer = optimizer_of(problem, base, perturbation=llqr.SAM(RHO))
    eps, g = displacement(optimizer, problem), problem.gradient()
    norm = (flat(g) @ flat(g) + EPS0).sqrt()
    close(eps, {n: (0.1 if n.startswith("0") else 0.3) * g[n] / norm for n in g})


@pytest.mark.parametrize(
    "probe", [llqr.SAM(RHO), llqr.SAM(RHO, norm="layer-euclidean"), llqr.ASAM(RHO)]
)
def test_the_direction_does_not_depend_on_the_scale_of_the_loss(probe):
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=random_metric(problem), perturbation=probe)
    close(displacement(optimizer, problem), displacement(optimizer, problem, 1e4), 1e-9)


@pytest.mark.parametrize("factor", [1e-25, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("norm", NORMS)
def test_float32_gradients_of_any_size(norm, factor):
    """rho d / sqrt(g.d + 1e-12) where g.d itself would leave the range of float32."""
    problem = mlp(torch.float32)
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(RHO, norm=norm))
    eps = displacement(optimizer, problem, factor)
    assert optimizer.skipped_probes == 0
    wide = mlp()
    wide.model.load_state_dict(problem.model.state_dict())
    wide.x, wide.y = problem.x.double(), problem.y
    expected = displacement(optimizer_of(wide, perturbation=llqr.SAM(RHO, norm=norm)), wide, factor)
    for n in eps:
        torch.testing.assert_close(eps[n].double(), expected[n], rtol=0, atol=1e-5)


# -- ASAM, FisherSAM -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [True, False], ids=["U", "I"])
def test_asam_ignores_the_metric(metric):
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        geometry=random_metric(problem) if metric else None,
        perturbation=llqr.ASAM(0.5, eta=0.01),
    )
    g, w = problem.gradient(), weights(problem.model)
    t = {n: torch.ones_like(g[n]) if n.endswith("bias") else w[n].abs() + 0.01 for n in g}
    norm = (sum((t[n] * g[n]).square().sum() for n in g) + EPS0).sqrt()
    expected = {n: 0.5 * t[n].square() * g[n] / norm for n in g}
    close(displacement(optimizer, problem), expected)


def test_what_asam_takes_for_a_bias():
    """The last name component begins with "bias" or ends with "_bias"."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("bias", "bias_hh_l0", "in_proj_bias", "unbias", "biased", "debias_w"):
                self.register_parameter(name, nn.Parameter(torch.rand(3, dtype=F64)))
            self.bias_head = nn.Linear(3, 1, bias=False).double()

        def forward(self, x):
            return self.bias_head(x + sum(p for p in self.parameters(recurse=False)))

    model = Named()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, perturbation=llqr.ASAM(0.5, eta=0.0))
    x, start = torch.ones(4, 3, dtype=F64), weights(model)
    for i in optimizer.passes():
        model(x).square().mean().backward()
        if i == 0:
            g = {n: p.grad.clone() for n, p in model.named_parameters()}
        else:
            eps = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    is_bias = set()
    raw = g["bias"]  # all vectors have one gradient; as biases they have one displacement
    for n in eps:
        if n != "bias_head.weight":
            scale = eps[n] / eps["bias"]
            if torch.allclose(scale, torch.ones_like(scale)):
                is_bias.add(n)
            else:
                torch.testing.assert_close(scale, start[n].square(), rtol=1e-9, atol=0)
    assert raw.any()
    assert is_bias == {"bias", "bias_hh_l0", "in_proj_bias", "biased"}


@pytest.mark.parametrize("metric", [True, False], ids=["U", "I"])
@pytest.mark.parametrize("eta", [0.1, 1e-3])
@pytest.mark.parametrize("form", ["paper", "kim"])
def test_fisher_sam_ignores_the_metric(form, eta, metric):
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        geometry=random_metric(problem) if metric else None,
        perturbation=llqr.FisherSAM(0.1, eta=eta, form=form),
    )
    g = problem.gradient()
    d = {n: g[n] / (g[n].square() + eta if form == "paper" else 1 + eta * g[n].square()) for n in g}
    norm = (sum((g[n] * d[n]).sum() for n in g) + EPS0).sqrt()
    close(displacement(optimizer, problem), {n: 0.1 * d[n] / norm for n in g})


@pytest.mark.parametrize("probe", [llqr.ASAM(0.5), llqr.FisherSAM(0.2)])
def test_their_update_goes_through_the_metric_all_the_same(probe):
    problem = mlp()
    geometry = random_metric(problem)
    optimizer = optimizer_of(problem, sgd(problem, lr=0.1), geometry=geometry, perturbation=probe)
    start = flat(weights(problem.model))
    train(optimizer, problem, 1)
    second = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    torch.testing.assert_close(
        flat(weights(problem.model)), start - 0.1 * geometry.U @ second, rtol=0, atol=1e-14
    )


# -- an indefinite metric --------------------------------------------------------------------------


class Signed(llqr.Geometry):
    """U = sign times the identity, with one sign a layer."""

    def __init__(self, **signs):
        self.signs = signs

    def apply(self, gradients):
        return {n: self.signs.get(f"layer{layer_of(n)}", 1.0) * g for n, g in gradients.items()}


@pytest.mark.parametrize("way", ["minimize", "closure", "passes", "perturbed"])
@pytest.mark.parametrize(
    "probe, signs",
    [
        (llqr.SAM(RHO), {"layer0": -1.0, "layer2": -1.0}),
        (llqr.SAM(RHO), {"layer0": -50.0, "layer2": -1.0}),
        (llqr.SAM(RHO, norm="layer-metric"), {"layer0": -1.0}),
        (llqr.FriendlySAM(RHO), {"layer0": -1.0, "layer2": -1.0}),
    ],
)
def test_an_indefinite_metric_skips_the_probe_and_counts_it(probe, signs, way):
    problem = mlp()
    geometry, probe = Signed(**signs), copy.deepcopy(probe)  # one memory a run
    optimizer = optimizer_of(
        problem, sgd(problem), geometry=geometry, perturbation=probe, transport=False
    )
    plain = mlp()
    unperturbed = optimizer_of(plain, sgd(plain))
    for step in range(3):
        train(optimizer, problem, 1, way)
        train(unperturbed, plain, 1)
        assert optimizer.skipped_probes == step + 1
    same(weights(problem.model), weights(plain.model))
    assert optimizer.skipped_steps == 0


def test_an_indefinite_metric_with_a_positive_product_probes():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=Signed(layer0=-0.01), perturbation=llqr.SAM(RHO))
    g = problem.gradient()
    d = optimizer.geometry.apply(g)
    q = sum((g[n] * d[n]).sum() for n in g)
    assert q > 0
    close(displacement(optimizer, problem), {n: RHO * d[n] / (q + EPS0).sqrt() for n in g})
    assert optimizer.skipped_probes == 0


def test_skipped_probes_are_saved():
    problem = mlp()
    options = {
        "geometry": Signed(layer0=-1.0, layer2=-1.0),
        "perturbation": llqr.SAM(RHO),
        "transport": False,
    }
    optimizer = optimizer_of(problem, **options)
    train(optimizer, problem, 2)
    state = everything(optimizer)["optimizer"]
    fresh = optimizer_of(mlp(), **options)
    fresh.load_state_dict(state)
    assert fresh.skipped_probes == 2


# -- properties ------------------------------------------------------------------------------------

names = st.sampled_from(["0.weight", "0.bias", "2.weight", "2.bias"])
sizes = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    rho=st.floats(1e-4, 10.0),
    size=sizes,
    off=st.sets(names, max_size=3),
    spread=st.floats(0.0, 3.0),
)
def test_the_metric_norm_is_rho_for_any_gradient_metric_and_choice_of_groups(
    seed, rho, size, off, spread
):
    problem = mlp()
    generator = torch.Generator().manual_seed(seed)
    named = dict(problem.model.named_parameters())
    u = {
        n: (spread * torch.randn(p.shape, dtype=F64, generator=generator)).exp()
        for n, p in named.items()
    }
    groups = [{"params": [p], **({"rho": 0.0} if n in off else {})} for n, p in named.items()]
    optimizer = optimizer_of(
        problem,
        torch.optim.SGD(groups, lr=0.1),
        geometry=llqr.FixedGeometry(u),
        perturbation=llqr.SAM(rho),
    )
    g = {n: size * torch.randn(p.shape, dtype=F64, generator=generator) for n, p in named.items()}
    for n, p in named.items():
        p.grad = g[n].clone()
    start = weights(problem.model)
    chosen = [n for n in g if n not in off]
    before = math.sqrt(sum(float((g[n].square() * u[n]).sum()) for n in chosen))
    with optimizer.perturbed():
        d = {n: p.detach() - start[n] for n, p in named.items()}
        problem.backward()
    same(weights(problem.model), start)
    assert not any(bool(d[n].any()) for n in off)
    if before >= 1e-3:
        norm = math.sqrt(sum(float((d[n].square() / u[n]).sum()) for n in chosen))
        # 1e-12 under the root, and what theta + eps rounds away
        assert abs(norm / rho - 1) < 1e-10 + 1e-12 / before**2 + 1e-14 * math.exp(3 * spread) / rho


# -- inner products --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inner_products_are_those_in_double(dtype):
    """Entries by the million lose no digit more than few."""
    torch.manual_seed(0)
    a = {str(n): (torch.rand(n) + 0.5).to(dtype) for n in (0, 1, 7, 3_000_001)}
    a["equal"] = torch.full((10**6,), 0.7).to(dtype)
    a["columns"] = torch.rand(300, 400).to(dtype).t()
    b = {n: torch.randn(x.shape).to(dtype) for n, x in a.items()}
    for x, y in ((a, b), (a, a)):
        found = inner_products(x, y)
        assert list(found) == list(y)
        for n, value in found.items():
            terms = x[n].double() * y[n].double()
            size = float(terms.abs().sum())
            assert abs(value - float(terms.sum())) <= size * (
                1e-14 if dtype == torch.float64 else 5e-7
            )


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_inner_products_beyond_the_range_of_float32(factor):
    x = {"a": torch.full((300_000,), factor), "b": torch.zeros(4), "c": torch.tensor([factor, 0.0])}
    for value, wanted in zip(inner_products(x, x).values(), (300_000, 0, 1), strict=True):
        assert value == pytest.approx(wanted * factor**2, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inner_products_that_are_not_finite(value):
    x = {"a": torch.tensor([1.0, value]), "b": torch.ones(2)}
    assert not math.isfinite(inner_products(x, x)["a"]) and inner_products(x, x)["b"] == 2
    assert inner_products({}, {}) == {} and sum_as_double({}) == 0
