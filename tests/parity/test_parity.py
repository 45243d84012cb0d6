"""Every array of the reference files, compared (tests/reference/README.md says what they are).

The number of compared arrays is written down, so that one left out shows; the worst relative
error of a file is printed with ``pytest -s``.
"""

from __future__ import annotations

import pytest
import torch

import llqr
from llqr.geometry.inner_solve import FlatModel, Objective
from llqr.geometry.inner_solve._literal import solve_literally
from parity.reference import (
    ACTIVATIONS,
    CURVATURES,
    FOLDER,
    Reference,
    blocks,
    flat,
    forward_of,
    from_tree,
    llqr_of,
    mlp,
    ours,
    to_tree,
)
from solving import method

F64 = torch.float64
EXACT = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:U has a negative eigenvalue:UserWarning")


def problem(activation: str, dtype: torch.dtype = F64, smoothing: float = 0.0):
    data = Reference("mlp_problem_f64")
    model = mlp(data, activation, dtype)
    return model, forward_of(model, data["x"].to(dtype), data["y"], smoothing)


def objective_of(geometry: llqr.LLQR, forward, damping: float) -> Objective:
    model = llqr.quadratic_model(
        forward,
        list(geometry.parameters.values()),
        geometry.curvature,
        scale=geometry.settings.scale,
    )
    flat_model = FlatModel(model, geometry.layout, list(geometry.parameters))
    return Objective(geometry.blocks, flat_model.gradient, flat_model.product, damping)


@torch.no_grad()
def raw_solve(geometry: llqr.LLQR, forward, damping: float, **options):
    """The inner solve alone: no EMA, no floor, no projection."""
    objective = objective_of(geometry, forward, damping)
    settings = {"solver": "momentum", "steps": 50, "lr": 1e-3, "momentum": 0.9, "clip": 5.0}
    states, first = solve_literally(objective, geometry.states, *method(**{**settings, **options}))
    return objective, states, first


@pytest.mark.parametrize("name, compared", [("mlp_problem_f64", 168)])
def test_products(name, compared):
    ref = Reference(name)
    for activation in ACTIVATIONS:
        model = mlp(ref, activation, F64)
        forward = forward_of(model, ref["x"], ref["y"])
        names = [n for n, _ in model.named_parameters()]
        ref.compare(f"{activation}/logp", forward()[1].log_softmax(-1), EXACT)
        for divergence, key in (
            ("newton", "hessian_mean_loss_times"),
            ("ngd", "fisher_SUM_over_batch_times"),
        ):
            curvature, scale = CURVATURES[divergence]
            q = llqr.quadratic_model(forward, model.parameters(), curvature, scale=scale)
            ref.compare(f"{activation}/loss", q.loss, EXACT)
            gradient = to_tree(dict(zip(names, q.gradient, strict=True)))
            ref.compare_tree(f"{activation}/grad", gradient, EXACT)
            for i in range(3):
                v = list(from_tree(ref, f"probe{i}").values())
                cv = q.product(v)
                image = to_tree(dict(zip(names, cv, strict=True)))
                ref.compare_tree(f"{activation}/{key}_probe{i}", image, EXACT)
                quad = sum((a * b).sum() for a, b in zip(v, cv, strict=True))
                tail = "ngd_sum" if divergence == "ngd" else "newton"
                ref.compare(f"{activation}/probe{i}_quad_{tail}", quad, EXACT)
                cost = f"{activation}/probe{i}_llqr_cost_{divergence}"
                ref.compare(cost, q.value(v), EXACT)
    ref.assert_complete(compared)


@pytest.mark.parametrize(
    "name, compared",
    [
        ("inner_solve_relu_f64", 333),
        ("inner_solve_tanh_f64", 331),
        ("inner_solve_gelu_f64", 103),
        ("inner_solve_relu_f32", 333),
    ],
)
def test_inner_solves(name, compared):
    ref = Reference(name)
    activation, dtype = name.split("_")[2], F64 if name.endswith("f64") else torch.float32
    tolerance = EXACT if dtype == F64 else 1e-5
    model, forward = problem(activation, dtype)
    loss, _ = forward()
    ref.compare("loss", loss, tolerance)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    gradient = dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))
    ref.compare_tree("neg_grad", {k: -v for k, v in to_tree(gradient).items()}, tolerance)
    for case in ref.cases("J_init"):
        divergence, structure, damp, steps = case.split("/")
        geometry, ours_name = llqr_of(structure, divergence, model)
        damping = float(damp.removeprefix("damp"))
        objective, states, first = raw_solve(
            geometry, forward, damping, steps=int(steps.removeprefix("steps"))
        )
        ref.compare(f"{case}/J_init", first, tolerance)
        ref.compare(f"{case}/J_final", objective.value(states), tolerance)
        geometry.states = states
        ref.compare(f"{case}/Ug_flat", flat(to_tree(geometry.apply(gradient))), tolerance)
        if f"{case}/U_flat" in ref:
            found = blocks(geometry.state(), model, ours_name)
            whole = torch.cat([v.reshape(-1) for v in found.values()])
            ref.compare(f"{case}/U_flat", whole, tolerance)
    ref.assert_complete(compared)


@pytest.mark.parametrize("name, compared", [("inner_solve_special_f64", 108)])
def test_special_solves(name, compared):
    ref = Reference(name)
    model, forward = problem("relu")

    def flat_blocks(geometry, structure):
        found = blocks(geometry.state(), model, structure)
        return torch.cat([v.reshape(-1) for v in found.values()])

    for divergence in CURVATURES:
        for structure in sorted({c.split("/")[2] for c in ref.cases("U_flat")}):
            clipped = f"clipnorm0.01_steps20_damp0.1/{divergence}/{structure}/U_flat"
            if clipped in ref:
                geometry, own = llqr_of(structure, divergence, model)
                _, geometry.states, _ = raw_solve(geometry, forward, 0.1, steps=20, clip=0.01)
                ref.compare(clipped, flat_blocks(geometry, own), EXACT)
            averaged = f"ema0.95_steps50_damp0/{divergence}/{structure}"
            if f"{averaged}/refresh0/U_flat" in ref:
                geometry, own = llqr_of(structure, divergence, model, ema=0.95)
                for k in range(3):
                    geometry.refresh([forward])
                    key = f"{averaged}/refresh{k}/U_flat"
                    ref.compare(key, flat_blocks(geometry, own), EXACT)
        smooth = f"label_smoothing0.1_steps50_damp0.1/{divergence}/e-kfac/U"
        smooth_model, smooth_forward = problem("relu", smoothing=0.1)
        geometry, own = llqr_of("e-kfac", divergence, smooth_model)
        _, geometry.states, _ = raw_solve(geometry, smooth_forward, 0.1)
        ref.compare_tree(smooth, blocks(geometry.state(), smooth_model, own), EXACT)
    for structure in ("diagonal", "scalar"):
        geometry, own = llqr_of(structure, "ngd", model, lr=0.02, clip=None)
        start = geometry.states
        _, geometry.states, _ = raw_solve(geometry, forward, 0.0, lr=0.02, clip=None)
        case = f"noclip_lr0.02_steps50_rawsolve/ngd/{structure}/U"
        ref.compare_tree(case, blocks(geometry.state(), model, own), EXACT)
        geometry.states = start
        geometry.refresh([forward])
        case = f"noclip_lr0.02_steps50_after_update_preconditioner/ngd/{structure}/U"
        ref.compare_tree(case, blocks(geometry.state(), model, own), EXACT)
    for solver in ("adam", "sgd"):
        geometry, own = llqr_of("e-kfac", "ngd", model)
        _, geometry.states, _ = raw_solve(geometry, forward, 0.1, solver=solver)
        case = f"solver_{solver}_lr1e-3_steps50_damp0.1/ngd/e-kfac/U"
        ref.compare_tree(case, blocks(geometry.state(), model, own), EXACT)
    ref.assert_complete(compared)


@pytest.mark.parametrize("name, compared", [("objective_f64", 527)])
def test_objective(name, compared):
    ref = Reference(name)
    structures = sorted({k.split("/")[0] for k in ref.arrays})
    for structure in structures:
        for activation in ACTIVATIONS:
            model, forward = problem(activation)
            gradient = None
            for divergence in CURVATURES:
                for damp in ("damp0.0", "damp0.1"):
                    case = f"{structure}/{activation}/{divergence}/{damp}"
                    if f"{case}/J" not in ref:
                        continue
                    geometry, own = llqr_of(structure, divergence, model)
                    geometry.load_state(ours(ref, f"{structure}/U", model, own))
                    objective = objective_of(geometry, forward, float(damp[4:]))
                    with torch.no_grad():
                        value, grad = objective.value_and_gradient(geometry.states)
                    ref.compare(f"{case}/J", value, EXACT)
                    if ref.tree(f"{case}/dJdU"):
                        exported = geometry.blocks.export(grad)
                        found = blocks(exported, model, own)
                        ref.compare_tree(f"{case}/dJdU", found, EXACT)
                    gradient = geometry.layout.unpack(objective.gradient)
            if gradient is not None:
                u = {n: -v for n, v in geometry.apply(gradient).items()}
                ref.compare_tree(f"{structure}/{activation}/control_u", to_tree(u), EXACT)
    ref.assert_complete(compared)


NORMS = {
    "euclidean": "euclidean",
    "matrix_norm": "metric",
    "layer_euclidean": "layer-euclidean",
    "layer_matrix_norm": "layer-metric",
}
MODES = {"ema_precond_grad": "raw", "ema_direction": "normalised"}


@pytest.mark.parametrize("name, compared", [("sam_f64", 558)])
def test_perturbations(name, compared):
    ref = Reference(name)
    parameters = from_tree(ref, "param")
    gradients = [from_tree(ref, f"grad{t}") for t in range(5)]
    layers = {n: n.split(".")[0] for n in parameters}
    data = Reference("mlp_problem_f64")

    def displaced(perturbation, gradient, metric):
        radii = dict.fromkeys(parameters, perturbation.rho)
        eps = perturbation.displacement(llqr.Probe(gradient, parameters, radii, metric, layers))
        return to_tree(eps)

    metrics = {"noprecond": dict}
    for structure in ("diagonal", "e-kfac", "kfac", "psd-e-kfac"):
        model = mlp(data, "relu", F64)
        geometry, own = llqr_of(structure, "ngd", model)
        geometry.load_state(ours(ref, f"{structure}/U", model, own))
        metrics[structure] = geometry.apply
    for structure, metric in metrics.items():
        for their_norm, norm in NORMS.items():
            for mode, direction in MODES.items():
                case = f"base_sam/{structure}/{mode}/{their_norm}"
                if structure == "noprecond":
                    if direction != "raw":
                        continue
                    case = f"base_sam/noprecond/{their_norm}"
                sam = llqr.SAM(0.1, norm=norm, direction=direction)
                ref.compare_tree(case, displaced(sam, gradients[0], metric), EXACT)
        for their_norm in ("euclidean", "matrix_norm"):
            fsam = llqr.FriendlySAM(0.1, sigma=1.0, decay=0.9, norm=NORMS[their_norm])
            fsam.bind(parameters)
            for t, gradient in enumerate(gradients):
                case = f"base_fsam/{structure}/{their_norm}/t{t}"
                case = case + "/eps" if ref.tree(case + "/eps") else case
                ref.compare_tree(case, displaced(fsam, gradient, metric), EXACT)
                fsam.observe(gradient)
                fsam.commit()
                memory = {n: e["memory"] for n, e in fsam.state().items()}
                ref.compare_tree(f"base_fsam/gbar_after_t{t}", to_tree(memory), EXACT)
    asam = displaced(llqr.ASAM(0.5, eta=0.01), gradients[0], dict)
    ref.compare_tree("asam/rho0.5_eta0.01", asam, EXACT)
    fisher = displaced(llqr.FisherSAM(0.1, eta=0.1), gradients[0], dict)
    ref.compare_tree("fisher_sam/rho0.1_eta0.1", fisher, EXACT)
    ref.assert_complete(compared)


@pytest.mark.parametrize("name, compared", [("train_f64", 406)])
def test_training_trajectories(name, compared):
    ref = Reference(name)
    for case in ref.cases("losses"):
        divergence, structure, sam, their_norm, wd = case.split("/")
        model = mlp(ref, "relu", F64, prefix="init_param")
        curvature, scale = CURVATURES[divergence]
        geometry = llqr.LLQR.paper(
            "e-kfac" if structure == "psd-e-kfac" else structure,
            curvature,
            scale=scale,
            ema=0.95,
            every=5,
            constraint="square" if structure == "psd-e-kfac" else "none",
        )
        norm = NORMS[their_norm]
        perturbation = {
            "none": None,
            "base_sam": llqr.SAM(0.1, norm=norm),
            "base_fsam": llqr.FriendlySAM(0.1, sigma=1.0, decay=0.9, norm=norm),
        }[sam]
        base = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, weight_decay=float(wd.removeprefix("wd"))
        )
        optimizer = llqr.Optimizer(base, model, geometry=geometry, perturbation=perturbation)
        own = "e-kfac" if structure == "psd-e-kfac" else structure
        losses = []
        for t in range(20):
            seen = []
            inner = forward_of(model, ref["train_x"][t].double(), ref["train_y"][t])

            def forward(inner=inner, seen=seen):
                loss, z = inner()
                seen.append(float(loss.detach()))
                return loss, z

            k = t // 5
            refresh = forward_of(model, ref["refresh_x"][k].double(), ref["refresh_y"][k])
            optimizer.minimize(forward, refresh=refresh)
            losses.append(seen[-1])
            if t in (0, 15) and ref.tree(f"{case}/U_after_refresh{k}"):
                found = blocks(geometry.state(), model, own)
                ref.compare_tree(f"{case}/U_after_refresh{k}", found, EXACT)
            if ref.tree(f"{case}/params_after_step{t}"):
                now = to_tree(dict(model.named_parameters()))
                ref.compare_tree(f"{case}/params_after_step{t}", now, EXACT)
        ref.compare(f"{case}/losses", torch.tensor(losses, dtype=F64), EXACT)
        final = to_tree(dict(model.named_parameters()))
        ref.compare_tree(f"{case}/final_param", final, EXACT)
    ref.assert_complete(compared)


class ConvNet(torch.nn.Module):
    """The reference's small network; "SAME" with stride 2 pads one row and column at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, padding=1, dtype=F64)
        self.bn1 = torch.nn.BatchNorm2d(4, dtype=F64)
        self.conv2 = torch.nn.Conv2d(4, 6, 3, stride=2, bias=False, dtype=F64)
        self.bn2 = torch.nn.BatchNorm2d(6, dtype=F64)
        self.head = torch.nn.Linear(6, 4, dtype=F64)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(torch.nn.functional.pad(x, (0, 1, 0, 1)))).relu()
        return self.head(x.mean((2, 3)))


CONV_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def conv_tree(named):
    """Names and layouts of the reference: HWIO kernels, (in, out) head, bn scale."""
    tree = {}
    for name, v in named.items():
        layer, leaf = name.split(".")
        if leaf == "weight":
            leaf = "scale" if layer.startswith("bn") else "kernel"
            v = v.permute(2, 3, 1, 0) if v.dim() == 4 else v.T if v.dim() == 2 else v
        tree[f"{layer}/{leaf}"] = v
    return tree


@pytest.mark.parametrize("name, compared", [("conv_f64", 193)])
def test_conv_net(name, compared):
    ref = Reference(name)
    model = ConvNet().eval()
    with torch.no_grad():
        for key in ref.tree("param").values():
            _, layer, leaf = key.split("/")
            v = ref[key]
            v = v.permute(3, 2, 0, 1) if v.dim() == 4 else v.T if v.dim() == 2 else v
            getattr(getattr(model, layer), CONV_NAMES[leaf]).copy_(v)
        for layer in ("bn1", "bn2"):
            getattr(model, layer).running_mean.copy_(ref[f"batch_stats/{layer}/mean"])
            getattr(model, layer).running_var.copy_(ref[f"batch_stats/{layer}/var"])
    forward = forward_of(model, ref["x"].permute(0, 3, 1, 2).contiguous(), ref["y"])
    loss, z = forward()
    ref.compare("loss", loss, EXACT)
    ref.compare("logp", z.log_softmax(-1), EXACT)
    names = [n for n, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    gradient = dict(zip(names, grads, strict=True))
    ref.compare_tree("grad", conv_tree(gradient), EXACT)
    # Their factor of conv1 is ordered (kh, kw, cin), ours (cin, kh, kw).
    order = torch.arange(27).view(3, 3, 3).permute(1, 2, 0).reshape(-1)
    for case in ref.cases("J_final"):
        divergence, structure, damp = case.split("/")
        geometry, own = llqr_of(structure, divergence, model)
        objective, states, _ = raw_solve(geometry, forward, float(damp.removeprefix("damp")))
        geometry.states = states
        ref.compare(f"{case}/J_final", objective.value(states), EXACT)
        ref.compare_tree(f"{case}/Ug", conv_tree(geometry.apply(gradient)), EXACT)
        state = geometry.state()
        for rest, key in ref.tree(f"{case}/U").items():
            layer, leaf, *factor = rest.split("/")
            entries = state[f"{layer}.{CONV_NAMES[leaf]}"]
            if not factor:
                value = entries["U"]
            elif factor[0] in ("A", "QA"):
                value = entries[f"{factor[0]}.0"][order]
                if value.dim() == 2 and factor[0] == "A":
                    value = value[:, order]
                elif factor[0] == "QA":
                    value = value[:, order]
            elif factor[0] == "S":
                value = entries["S.0"][:, order].T
            else:
                value = entries[{"QG": "QB"}.get(factor[0], factor[0]) + ".0"]
            ref.compare(key, value, 1e-6)
    ref.assert_complete(compared)


def test_no_file_is_left_out():
    """All files but exact_lqr_f32 are compared above; tests/curvature compares that one."""
    above = {"mlp_problem_f64", "objective_f64", "sam_f64", "train_f64", "conv_f64"}
    above |= {"inner_solve_special_f64", "inner_solve_relu_f32"}
    above |= {f"inner_solve_{activation}_f64" for activation in ACTIVATIONS}
    assert {path.stem for path in FOLDER.glob("*.npz")} == above | {"exact_lqr_f32"}
