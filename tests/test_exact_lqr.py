"""The Riccati step against dense solves, and against numbers of the reference implementation."""

from __future__ import annotations

import copy
import functools
import pathlib
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llqr import exact_lqr_step
from llqr.curvature import Divergence, Newton, quadratic_model

REFERENCE = pathlib.Path(__file__).parent / "reference"


# Chains ------------------------------------------------------------------------------------------


class Apply(nn.Module):
    """A layer without parameters, from a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def mlp(activation: type[nn.Module]) -> list[nn.Module]:
    return [nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)]


def conv(activation: nn.Module) -> list[nn.Module]:
    head = [nn.Flatten(), nn.Linear(12, 3)]
    return [nn.Conv2d(2, 3, 3, padding=1, stride=2), activation, *head]


def frozen() -> list[nn.Module]:
    layers = mlp(nn.Tanh)
    layers[0].bias.requires_grad_(False)
    layers[2].requires_grad_(False)
    return layers


def normed(norm: nn.Module) -> list[nn.Module]:
    return [nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)]


def attention() -> list[nn.Module]:
    block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return [nn.Embedding(7, 4), block, Apply(lambda x: x.mean(1)), nn.Linear(4, 3)]


def vectors() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


def images() -> Tensor:
    return torch.randn(5, 2, 4, 4, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(7, (6, 3))


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Tensor]]] = {
    "mlp-tanh": (lambda: mlp(nn.Tanh), vectors),
    "mlp-relu": (lambda: mlp(nn.ReLU), vectors),
    "mlp-gelu": (lambda: mlp(nn.GELU), vectors),
    "mlp-frozen": (frozen, vectors),
    "one-layer": (lambda: [nn.Linear(4, 3)], vectors),
    "one-coarse-layer": (lambda: [nn.Sequential(*mlp(nn.Tanh))], vectors),
    "coarse-layers": (lambda: [Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
                               nn.Sequential(nn.Tanh(), nn.Linear(4, 3))], vectors),
    "parameterless-ends": (lambda: [nn.Flatten(), nn.Tanh(), *mlp(nn.SiLU), nn.Softplus()],
                           vectors),
    "conv-tanh": (lambda: conv(nn.Tanh()), images),
    "conv-relu-inplace": (lambda: conv(nn.ReLU(inplace=True)), images),
    "conv-transposed-view": (lambda: [nn.Conv2d(2, 3, 2), Apply(lambda x: x.transpose(1, 3)),
                                      nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)], images),
    "layernorm": (lambda: normed(nn.LayerNorm(5)), vectors),
    "batchnorm-training": (lambda: normed(nn.BatchNorm1d(5)), vectors),
    "batchnorm-evaluation": (lambda: normed(nn.BatchNorm1d(5).eval()), vectors),
    "embedding": (lambda: [nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)], tokens),
    "integers-between": (lambda: [Apply(lambda t: t.flip(1)), nn.Embedding(7, 2), nn.Flatten(),
                                  nn.Linear(6, 3)], tokens),
    "attention": (attention, tokens),
}  # fmt: skip


@functools.cache
def chain(name: str) -> SimpleNamespace:
    """Build a chain with its data, and the dense matrices of its curvatures."""
    with torch.random.fork_rng([]):
        torch.manual_seed(sorted(CHAINS).index(name))
        make_layers, make_x = CHAINS[name]
        layers, x = nn.Sequential(*make_layers()).double(), make_x()
        with torch.no_grad():  # away from the small default initialisation
            for p in layers.parameters():
                p.copy_(0.8 * torch.randn_like(p))
        y = torch.randint(3, (len(x),))
    with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with a second derivative
        return problem(layers, x, lambda z: F.cross_entropy(z, y))


def problem(layers: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    """Form g and C in full by automatic differentiation of the whole network."""
    parameters = [p for p in layers.parameters() if p.requires_grad]
    buffers = {n: b.clone() for n, b in layers.named_buffers()}
    z = layers(x)
    n = len(z)
    J = rows(z.flatten(), parameters)
    g = flat(torch.autograd.grad(loss(z), parameters, create_graph=True))
    softmax = z.detach().softmax(-1)
    H = torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in softmax)) / n
    curvatures = {
        "fisher": J.T @ H @ J,
        "newton": rows(g, parameters),
        "kl": J.T @ H @ J,
        "renyi": 0.7 * (J.T @ H @ J),
        "squared": J.T @ J / n,
    }
    layers.load_state_dict(buffers, strict=False)
    return SimpleNamespace(layers=layers, x=x, loss=loss, g=g.detach(), C=curvatures)


def rows(y: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.stack(
        [
            flat(torch.autograd.grad(e, parameters, retain_graph=True, materialize_grads=True))
            for e in y
        ]
    )


def flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def joined(layers: nn.Module, step: list[dict[str, Tensor]]) -> Tensor:
    """Concatenate a step in the order of the parameters."""
    assert len(step) == len(list(layers))
    values = []
    for layer, controls in zip(layers, step, strict=True):
        wanted = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        assert list(controls) == list(wanted)
        assert all(controls[n].shape == p.shape for n, p in wanted.items())
        values += controls.values()
    return flat(values)


def relative_error(u: Tensor, exact: Tensor) -> float:
    return float(((u - exact).norm() / exact.norm()).detach())


def kl(z: Tensor, z0: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(-1), z0.log_softmax(-1), reduction="batchmean", log_target=True)


def renyi(z: Tensor, z0: Tensor, order: float = 0.7) -> Tensor:
    exponent = order * z0.log_softmax(-1) + (1 - order) * z.log_softmax(-1)
    return exponent.logsumexp(-1).mean() / (order - 1)


def squared(z: Tensor, z0: Tensor) -> Tensor:
    return 0.5 * (z - z0).square().sum() / len(z)


CURVATURES = {
    "fisher": "fisher",
    "newton": "newton",
    "kl": Divergence(kl),
    "renyi": Divergence(renyi),
    "squared": Divergence(squared),
}


# Against dense solves ----------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", CHAINS)
def test_step_is_the_dense_solve(name: str, curvature: str, damping: float) -> None:
    case = chain(name)
    system = case.C[curvature] + damping * torch.eye(len(case.g), dtype=torch.float64)
    assert torch.linalg.cond(system) < 1e4  # the solve is valid
    step = exact_lqr_step(case.layers, case.x, case.loss, CURVATURES[curvature], damping)
    exact = -torch.linalg.solve(system, case.g)
    assert relative_error(joined(case.layers, step), exact) < 1e-9


def test_newton_cases_are_indefinite() -> None:
    lowest = {name: float(torch.linalg.eigvalsh(chain(name).C["newton"])[0]) for name in CHAINS}
    assert sum(low < -0.1 for low in lowest.values()) >= 8, lowest


def test_grouping_of_layers_does_not_matter() -> None:
    case = chain("mlp-tanh")
    a, b, c, d, e = case.layers
    steps = [
        flat([u for layer in exact_lqr_step(layers, case.x, case.loss, "newton", 0.3)
              for u in layer.values()])
        for layers in ([a, b, c, d, e], [nn.Sequential(a, b), nn.Sequential(c, d, e)],
                       [nn.Sequential(a, b, c, d, e)])
    ]  # fmt: skip
    assert relative_error(steps[1], steps[0]) < 1e-11
    assert relative_error(steps[2], steps[0]) < 1e-11


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_linear_regression_is_solved_in_one_step_without_damping(curvature: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    layer = nn.Linear(3, 2).double()
    (step,) = exact_lqr_step([layer], x, lambda z: F.mse_loss(z, y), curvature)
    design = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(layer.weight.detach() + step["weight"], solution[:3].T)
    torch.testing.assert_close(layer.bias.detach() + step["bias"], solution[3])


def test_newton_with_a_loss_that_is_linear_in_the_outputs() -> None:
    case = chain("mlp-tanh")
    y = torch.arange(6) % 3
    layers = nn.Sequential(*case.layers, nn.LogSoftmax(-1))
    linear = problem(layers, case.x, lambda z: F.nll_loss(z, y))
    system = linear.C["newton"] + 0.5 * torch.eye(len(linear.g), dtype=torch.float64)
    step = exact_lqr_step(layers, case.x, linear.loss, Newton(), 0.5)
    assert relative_error(joined(layers, step), -torch.linalg.solve(system, linear.g)) < 1e-9


def test_step_is_zero_at_an_exact_minimum() -> None:
    case = chain("mlp-tanh")
    target = case.layers(case.x).detach()
    step = exact_lqr_step(case.layers, case.x, lambda z: F.mse_loss(z, target), "fisher", 0.1)
    assert not joined(case.layers, step).any()


@pytest.mark.parametrize("scale", ["mean", "sum", 2.5])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_step_solves_the_quadratic_model(curvature: str, scale: str | float) -> None:
    case = chain("mlp-gelu")
    y = torch.tensor([0, -100, 2, 1, -100, 0])  # two rows without a loss
    parameters = list(case.layers.parameters())

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    def forward() -> tuple[Tensor, Tensor]:
        z = case.layers(case.x)
        return loss(z), z

    step = exact_lqr_step(case.layers, case.x, loss, CURVATURES[curvature], 0.7, scale=scale)
    model = quadratic_model(forward, parameters, CURVATURES[curvature], scale=scale)
    u = [value for layer in step for value in layer.values()]
    residual = flat(model.gradient) + flat(model.product(u)) + 0.7 * flat(u)
    assert residual.norm() < 1e-12 * flat(model.gradient).norm()


def stage_costs_of(layers: nn.Sequential, x: Tensor) -> list[tuple[Tensor, ...]]:
    """Draw positive semidefinite (Q_i, M_i, R_i) of every layer, dense and with cross terms."""
    costs, draws = [], torch.Generator().manual_seed(3)
    for i, layer in enumerate(layers):
        n = x.numel() if i else 0
        p = sum(q.numel() for q in layer.parameters())
        root = torch.randn(n + p, n + p, generator=draws, dtype=torch.float64)
        W = 0.1 * root @ root.T / max(n + p, 1)
        costs.append((W[:n, :n], W[n:, :n], W[n:, n:]))
        x = layer(x).detach()
    return costs


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_costs_of_the_layers_that_the_caller_gives(curvature: str) -> None:
    """Dense: u'C u gains the quadratic forms of what each layer sees, dx_i = J_i u and u_i."""
    case = chain("mlp-tanh")
    costs = stage_costs_of(case.layers, case.x)
    parameters = list(case.layers.parameters())
    C, x, at = case.C[curvature].clone(), case.x, 0
    for (Q, M, R), layer in zip(costs, case.layers, strict=True):
        size = len(R)
        J = rows(x.flatten(), parameters)[: len(Q)] if len(Q) else x.new_zeros(0, len(C))
        E = torch.eye(len(C), dtype=torch.float64)[at : at + size]
        C += J.T @ Q @ J + E.T @ M @ J + (E.T @ M @ J).T + E.T @ R @ E
        x, at = layer(x), at + size
    step = exact_lqr_step(case.layers, case.x, case.loss, curvature, 0.7, stage_costs=costs)
    exact = -torch.linalg.solve(C + 0.7 * torch.eye(len(C), dtype=torch.float64), case.g)
    assert relative_error(joined(case.layers, step), exact) < 1e-11
    # Zero is nothing, in every form; what is added to one layer acts.
    plain = joined(case.layers, exact_lqr_step(case.layers, case.x, case.loss, curvature, 0.7))
    none = [(None, None, None), *[None] * (len(costs) - 1)]
    again = exact_lqr_step(case.layers, case.x, case.loss, curvature, 0.7, stage_costs=none)
    assert torch.equal(joined(case.layers, again), plain)
    assert relative_error(joined(case.layers, step), plain) > 0.01


def test_a_divergence_of_all_layers_is_the_same_metric() -> None:
    """C of a Divergence over the inputs and parameters of the layers has the same Q_i, M_i, R_i."""
    case = chain("mlp-tanh")
    costs = stage_costs_of(case.layers, case.x)
    parameters = list(case.layers.parameters())

    def forward() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, seen = case.x, []
        for i, layer in enumerate(case.layers):
            theta = flat([1 * p for p in layer.parameters()]) if [*layer.parameters()] else None
            seen.append((x if i else None, theta))
            x = layer(x)
        return case.loss(x), [*seen, (x, None)]

    def quadratic(seen, seen0) -> Tensor:
        total = kl(seen[-1][0], seen0[-1][0])
        for (Q, M, R), now, before in zip(costs, seen, seen0, strict=False):
            changes = [(a - b).flatten() for a, b in zip(now, before, strict=True) if a is not None]
            d, W = torch.cat(changes), torch.cat([torch.cat([Q, M.T], 1), torch.cat([M, R], 1)])
            total = total + 0.5 * d @ W @ d
        return total

    model = quadratic_model(forward, parameters, Divergence(quadratic))
    step = exact_lqr_step(case.layers, case.x, case.loss, "fisher", 0.7, stage_costs=costs)
    u = [value for layer in step for value in layer.values()]
    residual = flat(model.gradient) + flat(model.product(u)) + 0.7 * flat(u)
    assert residual.norm() < 1e-13 * flat(model.gradient).norm()


def test_sum_counts_the_rows_with_a_loss_gradient() -> None:
    case = chain("mlp-gelu")
    y = torch.tensor([0, -100, 2, 1, -100, 0])
    by_name, by_number = (
        exact_lqr_step(case.layers, case.x, lambda z: F.cross_entropy(z, y), "fisher", 1.0, scale=s)
        for s in ("sum", 4)
    )
    assert torch.equal(joined(case.layers, by_name), joined(case.layers, by_number))


def test_float32() -> None:
    case = chain("mlp-tanh")
    layers = nn.Sequential(*mlp(nn.Tanh))
    layers.load_state_dict(case.layers.state_dict())
    step = joined(layers, exact_lqr_step(layers, case.x.float(), case.loss, "newton", 1.0))
    exact = joined(case.layers, exact_lqr_step(case.layers, case.x, case.loss, "newton", 1.0))
    assert step.dtype == torch.float32
    assert relative_error(step.double(), exact) < 1e-4


# Against the reference implementation ------------------------------------------------------------

DAMPINGS = ["0.01", "0.1", "0.5", "1.0"]
ARRAYS = [f"fc{i}/{leaf}" for i in range(3) for leaf in ("bias", "kernel")]
STORED = [
    *((div, d, "direct_solve_f64") for div in ("ngd", "newton") for d in DAMPINGS),
    *(("ngd", d, "lqr_step") for d in DAMPINGS),
    *(("newton", d, "lqr_step") for d in ("0.5", "1.0")),
]
# A direct solve in float64, of C and g formed in float32 (the stored gradient differs from the
# float64 one by 5e-8), stored in float32. Their Riccati step ran in float32 all the way: at damping
# 0.01 it is 2e-3 away from their own direct solve.
TOLERANCE = {"direct_solve_f64": 5e-6, "lqr_step": 2e-3}
UNUSED = {
    "newton/damp0.01/lqr_step": "float32 broke down: as far from their direct solve as it is long",
    "newton/damp0.1/lqr_step": "float32 broke down: as far from their direct solve as it is long",
    **{f"newton/damp{d}/newton_cg_step": "conjugate gradients, not this method" for d in DAMPINGS},
}


@functools.cache
def stored() -> dict[str, Tensor]:
    with np.load(REFERENCE / "exact_lqr_f32.npz") as file:
        return {key: torch.from_numpy(file[key]).double() for key in file.files}


@functools.cache
def reference_problem() -> SimpleNamespace:
    with np.load(REFERENCE / "mlp_problem_f64.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k[:6] in ("x", "y", "param/")}
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    layers.double()
    with torch.no_grad():
        for i in range(3):
            layers[2 * i].weight.copy_(arrays[f"param/fc{i}/kernel"].T)
            layers[2 * i].bias.copy_(arrays[f"param/fc{i}/bias"])
    y = arrays["y"].long()
    return problem(layers, arrays["x"], lambda z: F.cross_entropy(z, y))


@functools.cache
def reference_step(divergence: str, damping: float) -> dict[str, Tensor]:
    """Return our step in the layout and with the sign of the file: to be subtracted."""
    case = reference_problem()
    if divergence == "ngd":  # summed over the batch there
        step = exact_lqr_step(case.layers, case.x, case.loss, "fisher", damping, scale="sum")
    else:
        step = exact_lqr_step(case.layers, case.x, case.loss, "newton", damping)
    arrays = {}
    for i in range(3):
        arrays[f"fc{i}/bias"] = -step[2 * i]["bias"]
        arrays[f"fc{i}/kernel"] = -step[2 * i]["weight"].T
    return arrays


@pytest.mark.parametrize(("divergence", "damping", "kind"), STORED)
def test_step_is_the_stored_one(divergence: str, damping: str, kind: str) -> None:
    ours = reference_step(divergence, float(damping))
    for array in ARRAYS:
        theirs = stored()[f"{divergence}/damp{damping}/{kind}/{array}"]
        error = float((ours[array] - theirs).abs().max() / theirs.abs().max())
        assert error < TOLERANCE[kind], (array, error)


def test_every_stored_array_is_compared_or_has_a_reason() -> None:
    compared = {f"{div}/damp{d}/{kind}/{a}" for div, d, kind in STORED for a in ARRAYS}
    unused = {f"{prefix}/{a}" for prefix in UNUSED for a in ARRAYS}
    assert (len(compared), len(unused)) == (84, 36)
    assert compared | unused | {"grad"} == set(stored())


def test_stored_newton_steps_left_out_are_wrong() -> None:
    """The reason in UNUSED: against their own direct solve, not against ours."""
    for damping in ("0.01", "0.1"):
        step, direct = (
            flat([stored()[f"newton/damp{damping}/{kind}/{a}"] for a in ARRAYS])
            for kind in ("lqr_step", "direct_solve_f64")
        )
        assert (step - direct).norm() > 0.9 * step.norm()


@pytest.mark.parametrize("damping", [0.01, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("divergence", ["ngd", "newton"])
def test_reference_problem_in_float64(divergence: str, damping: float) -> None:
    """What float32 files cannot show: 1e-9, indefinite systems included."""
    case = reference_problem()
    C = 16 * case.C["fisher"] if divergence == "ngd" else case.C["newton"]
    system = C + damping * torch.eye(164, dtype=torch.float64)
    if divergence == "newton":
        assert (float(torch.linalg.eigvalsh(system)[0]) < 0) == (damping < 1.41)
    exact = -torch.linalg.solve(system, case.g)
    scale = "sum" if divergence == "ngd" else "mean"
    name = "fisher" if divergence == "ngd" else "newton"
    step = exact_lqr_step(case.layers, case.x, case.loss, name, damping, scale=scale)
    assert relative_error(joined(case.layers, step), exact) < 1e-9


# What must not change ----------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    case = chain("batchnorm-training")
    layers, x = nn.Sequential(nn.ReLU(inplace=True), *copy.deepcopy(case.layers)), case.x.clone()
    layers[1].weight.grad = torch.ones_like(layers[1].weight)
    kept = {k: v.clone() for k, v in layers.state_dict().items()}
    x0, random_state, tracked = x.clone(), torch.get_rng_state(), layers[2].running_mean
    exact_lqr_step(layers, x, lambda z: z.square().mean(), "newton", 1.0)
    assert torch.equal(x, x0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert layers.state_dict().keys() == kept.keys()
    assert all(torch.equal(v, kept[k]) for k, v in layers.state_dict().items())
    assert layers[2].running_mean is tracked and layers[2].training
    assert torch.equal(layers[1].weight.grad, torch.ones_like(layers[1].weight))
    assert all(p.requires_grad for p in layers.parameters())
    assert [p.grad is None for p in layers.parameters()] == [False, *[True] * 5]


def test_surroundings_of_the_call_do_not_matter() -> None:
    case = chain("mlp-tanh")
    layers, x = copy.deepcopy(case.layers).float(), case.x.float()  # autocast leaves float64 alone
    expected = joined(layers, exact_lqr_step(layers, x, case.loss, "newton", 1.0))
    x.requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        step = joined(layers, exact_lqr_step(layers, x, case.loss, "newton", 1.0))
    assert torch.equal(step, expected)
    assert not step.requires_grad


def test_dropout_is_refused_in_training_and_absent_in_evaluation() -> None:
    case = chain("mlp-tanh")
    layers = nn.Sequential(case.layers[0], nn.Dropout(0.5), *case.layers[1:])
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape("layers[1] (Dropout): draws random numbers")):
        exact_lqr_step(layers, case.x, case.loss, damping=1.0)
    assert torch.equal(torch.get_rng_state(), random_state)
    layers[1].eval()
    step = [
        u for i, u in enumerate(exact_lqr_step(layers, case.x, case.loss, damping=1.0)) if i != 1
    ]
    expected = exact_lqr_step(case.layers, case.x, case.loss, damping=1.0)
    assert torch.equal(joined(case.layers, step), joined(case.layers, expected))


# Bad input ---------------------------------------------------------------------------------------


def mean_square(z: Tensor) -> Tensor:
    return z.square().mean()


def tied() -> list[nn.Module]:
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    layers[2].weight = layers[0].weight
    return layers


def half(dtype: torch.dtype) -> list[nn.Module]:
    return [nn.Linear(4, 4), nn.Linear(4, 2, dtype=dtype)]


BAD = {
    "not-a-sequence": (dict(layers=nn.Linear(4, 2)), TypeError, "layers: expected a sequence"),
    "empty": (dict(layers=[]), ValueError, "layers: .*got no parameter that requires grad"),
    "no-parameters": (dict(layers=[nn.Tanh()]), ValueError, "got no parameter that requires grad"),
    "not-a-module": (
        dict(layers=[nn.Linear(4, 2), torch.tanh]),
        TypeError,
        r"layers\[1\]: expected a torch.nn.Module",
    ),
    "tied": (
        dict(layers=tied()),
        ValueError,
        r"layers\[2\].weight is layers\[0\].weight again; with tied",
    ),
    "twice": (dict(layers=[nn.Linear(4, 4)] * 2), ValueError, r"layers\[1\].weight is layers\[0\]"),
    "two-dtypes": (dict(layers=half(torch.float64)), ValueError, "torch.float32, torch.float64"),
    "half": (dict(layers=[nn.Linear(4, 2).half()]), ValueError, "got torch.float16"),
    "casting-layer": (
        dict(layers=[nn.Linear(4, 2), Apply(Tensor.double)]),
        ValueError,
        r"layers\[1\] \(Apply\): expected an output in torch.float32, got torch.float64",
    ),
    "tuple-output": (
        dict(layers=[nn.LSTM(4, 2)]),
        TypeError,
        r"layers\[0\] \(LSTM\): expected one tensor as output, got tuple",
    ),
    "x": (dict(x=[1.0]), TypeError, "x: expected one tensor, got list"),
    "curvature": (dict(curvature="hessian"), ValueError, "curvature: expected 'fisher', 'newton'"),
    "scale": (dict(scale="max"), ValueError, "scale: expected 'mean', 'sum' or a number"),
    "damping-negative": (dict(damping=-1), ValueError, "damping: expected a number >= 0, got -1"),
    "damping-nan": (dict(damping=float("nan")), ValueError, "damping: expected a number >= 0"),
    "damping-infinite": (dict(damping=float("inf")), ValueError, "damping: expected a number >= 0"),
    "singular": (
        dict(damping=0),
        ValueError,
        r"at damping=0 the system of layers\[2\] \(Linear\) is singular .*; raise the damping",
    ),
    "singular-newton": (
        dict(damping=0.0, curvature="newton"),
        ValueError,
        r"system of layers\[2\] \(Linear\) is singular .*; raise the damping",
    ),
    "not-finite": (
        dict(layers=[nn.Linear(4, 2), Apply(lambda x: (0 * x).sqrt())]),
        ValueError,
        r"layers\[0\] \(Linear\) is singular \(condition number inf\)",
    ),
    "stage-costs-count": (
        dict(stage_costs=[None]),
        ValueError,
        r"stage_costs: expected one entry per layer \(3\), got 1",
    ),
    "stage-costs-shape": (
        dict(stage_costs=[None, (torch.eye(5), None, None), None]),
        ValueError,
        r"stage_costs: Q of layers\[1\] \(Tanh\) needs shape \(15, 15\), got \(5, 5\)",
    ),
    "stage-costs-symmetry": (
        dict(stage_costs=[(None, None, torch.ones(15, 15).triu()), None, None]),
        ValueError,
        r"stage_costs: R of layers\[0\] \(Linear\) is not symmetric",
    ),
    "linear-loss": (dict(loss=Tensor.sum), ValueError, "loss: linear in the outputs"),
    "flat-divergence": (
        dict(curvature=Divergence(lambda z, z0: (z - z0).pow(3).sum())),
        ValueError,
        "loss: linear in the outputs",
    ),
    "vector-loss": (
        dict(loss=lambda z: z.square().mean(1)),
        ValueError,
        r"loss: expected a scalar tensor, got shape \(5,\); reduce it",
    ),
    "number-loss": (
        dict(loss=lambda z: 1.0),
        ValueError,
        "loss: expected a scalar tensor, got 1.0",
    ),
    "detached-loss": (
        dict(loss=lambda z: z.detach().square().mean()),
        ValueError,
        "loss: no gradient in the outputs",
    ),
    "foreign-loss": (
        dict(loss=lambda z: torch.ones(2, requires_grad=True).sum()),
        ValueError,
        "loss: no gradient in the outputs",
    ),
    "loss-not-finite": (
        dict(loss=lambda z: z.square().mean() * float("nan")),
        ValueError,
        "loss: its derivatives are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changed, error, message = BAD[case]
    arguments = {
        "layers": [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)],
        "x": torch.ones(5, 4),
        "loss": mean_square,
        "curvature": "fisher",
        "damping": 1.0,
        **changed,
    }
    with pytest.raises(error, match=message):
        exact_lqr_step(**arguments)


def test_indefinite_output_curvature_warns() -> None:
    case = chain("one-layer")
    with pytest.warns(UserWarning, match="not positive semidefinite"):
        exact_lqr_step(case.layers, case.x, lambda z: z.cos().mean(), "fisher", 2.0)


def test_tied_parameters_that_stay_fixed_are_allowed() -> None:
    layers = nn.Sequential(*tied(), nn.Linear(4, 2)).requires_grad_(False)
    layers[3].requires_grad_(True)
    step = exact_lqr_step(layers, torch.ones(5, 4), mean_square, "fisher", 1.0)
    assert [sorted(u) for u in step] == [[], [], [], ["bias", "weight"]]
