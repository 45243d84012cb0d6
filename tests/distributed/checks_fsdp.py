"""fully_shard (FSDP2): parameters cut into rows, against one process with the joined batch."""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from replicas import (
    alone,
    data_parallel,
    near,
    one_process,
    raises,
    rank,
    replicas_equal,
    two_bases,
)
from replicas import (
    parameters as weights_of,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import llqr
from tables import PERTURBATIONS, SAMPLED, SOLVED, muon
from tiny import F64, WAYS, Problem, llqr_of, natural_of, same, train

BASES = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
}
BASES["SGD, AdamW"] = two_bases(BASES["SGD"], BASES["AdamW"])
BASES["Muon, AdamW"] = two_bases(lambda ps: muon(ps, lr=0.02), BASES["AdamW"])


class Net(nn.Module):
    """Uneven rows, a parameter of one row, layer norm, a transposed convolution, tied weights."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.up = nn.ConvTranspose1d(7, 3, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 2))
        self.mid = nn.Linear(3, 5)
        self.head = nn.Linear(7, 5, bias=False) if tied else nn.Linear(5, 3)
        if tied:
            self.embed.weight.data = self.embed.weight.data.clone()
            self.back = nn.Linear(5, 7, bias=False)
            self.back.weight = self.embed.weight

    def forward(self, x):
        h = torch.tanh(self.norm(self.embed(x)))
        up = (self.up(h[:, :, None]) + self.token).mean(2)
        h = torch.tanh(self.mid(up))
        if hasattr(self, "back"):
            return self.back(h)
        return self.head(h)


def problem(dtype=F64, tied=False, seed=0):
    torch.manual_seed(seed)
    model = Net(tied).to(dtype)
    torch.manual_seed(0)
    return Problem(model, torch.randn(12, 5, dtype=dtype), torch.randint(3, (12,)))


def sharded(whole, base="SGD", nested=True, **options):
    """The problem with its model sharded and this process's half of the batch."""
    policy = options.pop("mp_policy", None)
    more = {} if policy is None else {"mp_policy": policy}
    if nested:
        fully_shard(whole.model.mid, **more)
    fully_shard(whole.model, **more)
    half = whole.part(6 * rank(), 6 * rank() + 6)
    optimizer = llqr.Optimizer(BASES[base](whole.model.parameters()), whole.model, **options)
    return optimizer, half


def full(model):
    return {n: p.detach().full_tensor() for n, p in model.named_parameters()}


def plain(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def against_one_process(base="SGD", way="minimize", steps=3, tied=False, tolerance=1e-12, **make):
    whole = problem(tied=tied)
    joined = one_process(whole, base=BASES[base], **{k: f() for k, f in make.items()})
    optimizer, half = sharded(problem(tied=tied), base, **{k: f() for k, f in make.items()})
    train(joined, whole, steps, way)
    train(optimizer, half, steps, way)
    near(full(half.model), plain(whole.model), tolerance)
    return optimizer, joined, half, whole


def check_every_geometry_and_perturbation():
    for geometry, perturbation in itertools.product(SOLVED, PERTURBATIONS):
        if geometry == "kfac" or perturbation == "SAM":
            tolerance = 1e-6 if geometry == "e-kfac-gradient" else 1e-12
            optimizer, joined, *_ = against_one_process(
                geometry=SOLVED[geometry],
                perturbation=PERTURBATIONS[perturbation],
                tolerance=tolerance,
            )
            if geometry == "kfac":
                ours, theirs = optimizer.last_report, joined.last_report
                assert ours.products == theirs.products
                assert abs(ours.J_after - theirs.J_after) <= 1e-9 * abs(theirs.J_after)


def check_natural_gradient_against_data_parallel():
    """The same samples, whole in each process or in rows."""
    for make in (*SAMPLED.values(), lambda: natural_of("kfac"), lambda: natural_of("diagonal")):
        whole, share = data_parallel(problem(), geometry=make(), perturbation=llqr.SAM(0.05))
        optimizer, half = sharded(problem(), geometry=make(), perturbation=llqr.SAM(0.05))
        train(whole, share, 4)
        train(optimizer, half, 4)
        near(full(half.model), weights_of(share.model), 1e-7)
        ours, theirs = optimizer.last_report, whole.last_report
        assert ours.samples == theirs.samples == 8
        for key in ("change", "cosine", "eigenvalue_max"):
            a, b = getattr(ours, key), getattr(theirs, key)
            assert abs(a - b) <= 1e-6 * abs(b), (key, a, b)


def check_norms_are_of_all_shards():
    for norm in ("euclidean", "layer-metric", "layer-euclidean"):
        against_one_process(
            geometry=lambda: llqr_of("kfac", block_size=3, clip=0.01, lr=0.3),
            perturbation=lambda norm=norm: llqr.SAM(0.1, norm=norm, direction="normalised"),
        )


def check_the_displacement():
    """eps itself, gathered, has the length rho in the metric of U over all shards."""
    optimizer, half = sharded(problem(), geometry=llqr_of("diagonal"), perturbation=llqr.SAM(0.1))
    train(optimizer, half, 2)
    start = full(half.model)
    for i in optimizer.passes():
        half.backward()
        if i:
            away = full(half.model)
        else:
            g = {n: p.grad.full_tensor() for n, p in half.model.named_parameters()}
    u = optimizer.geometry.state()
    metric = sum(float((u[n]["U"] * g[n].square()).sum()) for n in g)
    for n in g:
        expected = 0.1 * u[n]["U"] * g[n] / metric**0.5
        torch.testing.assert_close(away[n] - start[n], expected, rtol=0, atol=1e-12)
    same(full(half.model), start)


def check_every_way_in():
    for way, base in zip(WAYS, ["SGD", "AdamW"] * 2, strict=True):
        against_one_process(
            base, way, geometry=lambda: llqr_of("kfac", every=100), perturbation=llqr.SAM
        )


def check_accumulation_and_graft():
    options = {"geometry": lambda: llqr_of("e-kfac"), "perturbation": llqr.SAM}
    for graft in (True, "layer"):
        whole = problem()
        joined = one_process(whole, graft=graft, **{k: f() for k, f in options.items()})
        optimizer, half = sharded(problem(), graft=graft, **{k: f() for k, f in options.items()})
        for _ in range(4):
            joined.minimize(whole)
            optimizer.minimize([half.part(0, 3), half.part(3, 6)])
        near(full(half.model), plain(whole.model), 1e-12)


def check_several_bases():
    options = {"geometry": lambda: llqr_of("kfac"), "perturbation": llqr.SAM}
    against_one_process("SGD, AdamW", **options)
    # Muon orthogonalises in bfloat16, so the order of a sum shows in its third digit.
    against_one_process("Muon, AdamW", tolerance=5e-2, **options)


def check_tied_weights():
    for geometry in ("diagonal", "kfac"):
        optimizer, joined, half, whole = against_one_process(
            tied=True, geometry=lambda geometry=geometry: llqr_of(geometry), perturbation=llqr.SAM
        )
        assert half.model.back.weight is half.model.embed.weight


def check_a_part_that_is_computed_again():
    """Products run it again, with whole parameters; autograd in one process, by differences."""

    class Again(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Sine(nn.Module):
        def forward(self, x):
            return Odd.apply(x)

    for part, tolerance in ((Again, 1e-12), (lambda inner: nn.Sequential(inner, Sine()), 1e-6)):

        def make(part=part):
            made = problem()
            made.model.mid = part(made.model.mid)
            return made

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of derivatives by differences
            whole = make()
            joined = one_process(whole, geometry=llqr_of("kfac"), perturbation=llqr.SAM())
            optimizer, half = sharded(make(), geometry=llqr_of("kfac"), perturbation=llqr.SAM())
            train(joined, whole, 3)
            train(optimizer, half, 3)
        near(full(half.model), plain(whole.model), tolerance)


def check_a_refresh_leaves_the_model_as_it_was():
    """Also where the forward raises in one process; a plain FSDP step runs afterwards."""
    optimizer, half = sharded(problem(), geometry=llqr_of("kfac"), perturbation=llqr.SAM())
    model = half.model
    train(optimizer, half, 1)
    hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    owned = [dict(m._parameters) for m in model.modules()]

    def forward():
        if rank() == 1:
            raise KeyError("no more data")
        return half()

    with raises(KeyError, "no more data") if rank() else raises(RuntimeError, "another process"):
        optimizer.refresh(forward)
    optimizer.refresh(half)
    for m, (pre, post), parameters in zip(model.modules(), hooks, owned, strict=True):
        assert list(m._forward_pre_hooks.items()) == list(pre.items())
        assert list(m._forward_hooks.items()) == list(post.items())
        assert all(m._parameters[n] is p for n, p in parameters.items())
    optimizer.zero_grad()
    half.backward()
    optimizer.base.step()
    train(optimizer, half, 2)


def check_what_a_process_keeps():
    """Elementwise U is as sharded as the parameters; memory falls by the number of processes."""
    torch.manual_seed(0)
    layers = [nn.Linear(48, 48) for _ in range(8)]
    for structure in ("diagonal", "diag-kfac", "kfac", "e-kfac"):
        whole = Problem(nn.Sequential(*layers), torch.randn(4, 48), torch.randint(48, (4,)))
        alone_one = one_process(whole, geometry=llqr_of(structure, block_size=64))
        model = nn.Sequential(*[nn.Linear(48, 48) for _ in range(8)])
        fully_shard(model)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = llqr.Optimizer(base, model, geometry=llqr_of(structure, block_size=64))
        shares = (optimizer.geometry.memory(), alone_one.geometry.memory())
        ratio = shares[0]["preconditioner"] / shares[1]["preconditioner"]
        assert abs(ratio - 0.5) < 0.01, (structure, ratio)
        assert optimizer.geometry.numel() == alone_one.geometry.numel()


def check_a_value_that_is_not_finite_in_one_process():
    for when in (0, 1):
        optimizer, half = sharded(
            problem(), geometry=llqr_of("kfac", every=100), perturbation=llqr.FriendlySAM(0.1)
        )
        train(optimizer, half, 1)
        before = full(half.model)
        if rank() == 1:
            first, forward = half.calls, half.model.forward

            def spoiled(x, first=first, forward=forward, half=half, when=when):
                z = forward(x)
                if half.calls - 1 - first == when:
                    z.register_hook(lambda g: g * float("nan"))
                return z

            half.model.forward = spoiled
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.minimize(half)
        assert optimizer.skipped_steps == 1
        same(full(half.model), before)
        train(optimizer, half, 2)
        assert all(bool(torch.isfinite(p).all()) for p in full(half.model).values())


def check_a_scaler():
    """An infinity in one process halves the scale of both and skips the step of both."""
    optimizer, half = sharded(
        problem(torch.float32), geometry=llqr_of(every=100), perturbation=llqr.FriendlySAM(0.1)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    whole = problem(torch.float32)
    joined = one_process(whole, geometry=llqr_of(every=100), perturbation=llqr.FriendlySAM(0.1))
    for step in range(5):
        if step == 2:
            before = full(half.model)
            spoiled = Problem(half.model, half.x * (float("inf") if rank() else 1.0), half.y)
            optimizer.minimize(spoiled, scaler=scaler)
            same(full(half.model), before)
            assert scaler.get_scale() == 512.0
            continue
        optimizer.minimize(half, scaler=scaler)
        joined.minimize(whole)
    replicas_equal(scaler.state_dict())
    assert optimizer._progress.step == 4
    near(full(half.model), plain(whole.model), 1e-4)


def check_mixed_precision():
    """bfloat16 forwards and backwards in training, float32 in the refresh."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    geometry = llqr_of("kfac", every=100)
    optimizer, half = sharded(
        problem(torch.float32), mp_policy=policy, geometry=geometry, perturbation=llqr.SAM()
    )
    seen = []
    optimizer.model.mid.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    optimizer.minimize(half)
    assert seen[0] == torch.float32 and set(seen[-2:]) == {torch.bfloat16}, seen
    whole = problem(torch.float32)
    joined = one_process(whole, geometry=llqr_of("kfac", every=100))
    joined.refresh(whole)
    for name, entry in joined.geometry.state().items():
        for key, value in entry.items():
            ours = optimizer.geometry.state()[name][key]
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5)


def check_checkpoints():
    """Saved by two processes with sharded parameters; loaded by two, by one, and without FSDP."""
    for base, geometry in (
        ("SGD", "diagonal"),
        ("AdamW", "kfac"),
        ("AdamW", "e-kfac"),
        ("SGD, AdamW", "diagonal"),
    ):

        def options(geometry=geometry):
            return {"geometry": llqr_of(geometry), "perturbation": llqr.FriendlySAM(0.1)}

        optimizer, half = sharded(problem(), base, **options())
        train(optimizer, half, 3)
        made = [tempfile.mkdtemp() if rank() == 0 else None]
        dist.broadcast_object_list(made)
        model, state = get_state_dict(half.model, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=made[0])
        fresh, other = sharded(problem(seed=1), base, **options())
        load(fresh, made[0])
        same(fresh.geometry.state(), optimizer.geometry.state())
        whole = problem(seed=2)
        single = one_process(whole, base=BASES[base], **options())
        load(single, made[0], process_group=alone())
        same(single.geometry.state(), optimizer.geometry.state())
        same(plain(whole.model), full(half.model))
        for o, p in ((optimizer, half), (fresh, other), (single, whole)):
            train(o, p, 4)
        same(full(other.model), full(half.model))
        near(full(half.model), plain(whole.model), 1e-12)


def load(optimizer, path, **options):
    model, state = get_state_dict(optimizer.model, optimizer)
    template = {"model": model, "optimizer": state}
    dcp.load(template, checkpoint_id=path, **options)
    set_state_dict(
        optimizer.model,
        optimizer,
        model_state_dict=template["model"],
        optim_state_dict=template["optimizer"],
    )


def check_state_dicts():
    """The plain form, and torch's full one."""
    optimizer, half = sharded(
        problem(), "AdamW", geometry=llqr_of("kfac"), perturbation=llqr.FriendlySAM(0.1)
    )
    train(optimizer, half, 3)
    plain_state = copy.deepcopy(optimizer.state_dict())
    choice = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    whole_state = copy.deepcopy(get_optimizer_state_dict(half.model, optimizer, options=choice))
    start = {n: p.detach().clone() for n, p in half.model.named_parameters()}
    train(optimizer, half, 3)
    expected = full(half.model)
    for given in (plain_state, whole_state):
        fresh, other = sharded(
            problem(seed=1), "AdamW", geometry=llqr_of("kfac"), perturbation=llqr.FriendlySAM(0.1)
        )
        with torch.no_grad():
            for n, p in other.model.named_parameters():
                p.copy_(start[n])
        if given is plain_state:
            fresh.load_state_dict(given)
        else:
            set_optimizer_state_dict(other.model, fresh, given, options=choice)
        train(fresh, other, 3)
        same(full(other.model), expected)


def check_what_is_refused():
    with raises(ValueError, "sync"):
        sharded(problem(), perturbation=llqr.SAM(), sync=False)
    fixed = llqr.FixedGeometry({"token": torch.tensor(2.0)})
    with raises(ValueError, "FixedGeometry"):
        sharded(problem(), geometry=fixed)
    part = problem()
    fully_shard(part.model.mid)
    with raises(ValueError, "is not sharded", "whole model"):
        llqr.Optimizer(torch.optim.SGD(part.model.parameters(), lr=0.1), part.model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    hybrid = problem()
    fully_shard(hybrid.model, mesh=mesh)
    with raises(ValueError, "mesh of 2 dimensions", "HSDP", "fully_shard with a mesh of one"):
        llqr.Optimizer(torch.optim.SGD(hybrid.model.parameters(), lr=0.1), hybrid.model)
    line = dist.device_mesh.init_device_mesh("cpu", (2,))
    for style in (ColwiseParallel(), RowwiseParallel()):
        split = problem()
        parallelize_module(split.model, line, {"mid": style})
        with raises(ValueError, "'mid.weight'", "tensor parallelism", "use fully_shard"):
            llqr.Optimizer(torch.optim.SGD(split.model.parameters(), lr=0.1), split.model)
    both = problem()
    parallelize_module(both.model, mesh["b"], {"mid": ColwiseParallel()})
    fully_shard(both.model, mesh=mesh["a"])
    with raises(ValueError, "mesh of 2 dimensions", "tensor and data"):
        llqr.Optimizer(torch.optim.SGD(both.model.parameters(), lr=0.1), both.model)
    columns = nn.Linear(4, 4, bias=False)
    fully_shard(columns, shard_placement_fn=lambda p: Shard(1))
    with raises(ValueError, "placed", "shard_placement_fn"):
        llqr.Optimizer(torch.optim.SGD(columns.parameters(), lr=0.1), columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = FullyShardedDataParallel(problem().model, device_id=torch.device("cpu"))
    with raises(ValueError, "FullyShardedDataParallel", "fully_shard"):
        llqr.Optimizer(torch.optim.SGD(old.parameters(), lr=0.1), old)


def check_50_steps():
    """Each process with its own data; float32."""
    optimizer, half = sharded(
        problem(torch.float32), geometry=llqr_of("kfac", every=20), perturbation=llqr.SAM(0.05)
    )
    torch.manual_seed(rank())
    for _ in range(50):
        half.x, half.y = torch.randn(6, 5), torch.randint(3, (6,))
        optimizer.minimize(half)
    replicas_equal(full(half.model))
    assert all(bool(torch.isfinite(p).all()) for p in full(half.model).values())
