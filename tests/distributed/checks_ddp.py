"""DistributedDataParallel: two processes against one with the joined batch, and each other."""

from __future__ import annotations

import copy
import itertools
import warnings

import torch
import torch.distributed as dist
from replicas import (
    all_equal,
    alone,
    data_parallel,
    near,
    one_process,
    parameters,
    raises,
    rank,
    replicas_equal,
    two_bases,
    wrapped,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import llqr
from tables import FOLLOWING, PERTURBATIONS, SHORT_ROWS, SOLVED, muon
from tiny import (
    F64,
    WAYS,
    Problem,
    dropout_mlp,
    everything,
    llqr_of,
    mlp,
    norm_net,
    same,
    through_file,
    train,
)

TOLERANCE = 1e-12  # float64; sums are taken in another order


def against_one_process(way="minimize", steps=4, tolerance=TOLERANCE, **options):
    """Train two processes with half a batch each, and one with the whole."""
    make = {k: v for k, v in options.items() if callable(v)}
    plain = {k: v for k, v in options.items() if not callable(v)}
    whole = mlp()
    joined = one_process(whole, **plain, **{k: f() for k, f in make.items()})
    optimizer, share = data_parallel(mlp(), **plain, **{k: f() for k, f in make.items()})
    start = parameters(whole.model)
    train(joined, whole, steps, way)
    train(optimizer, share, steps, way)
    assert any(not torch.equal(start[n], p) for n, p in parameters(whole.model).items())
    near(parameters(share.model), parameters(whole.model), tolerance)
    all_equal(optimizer)
    return optimizer, joined


def check_every_geometry_and_perturbation():
    for geometry, perturbation in itertools.product(SOLVED, PERTURBATIONS):
        if geometry == "kfac" or perturbation == "SAM":
            # Eigenvectors of averaged X X' magnify rounding by the inverse of the gaps.
            tolerance = 1e-7 if geometry == "e-kfac-gradient" else TOLERANCE
            against_one_process(
                tolerance=tolerance,
                geometry=SOLVED[geometry],
                perturbation=PERTURBATIONS[perturbation],
            )


def check_moments_of_gradients():
    def first_bases():
        return llqr.GradientMoments(renew_every=100)

    against_one_process(geometry=first_bases, perturbation=llqr.SAM, tolerance=1e-10)
    # Bases that follow magnify rounding by the inverse of the gaps between eigenvalues.
    for geometry in FOLLOWING.values():
        optimizer, share = data_parallel(mlp(), geometry=geometry(), perturbation=llqr.SAM())
        train(optimizer, share, 5)
        all_equal(optimizer)


def check_every_way_in():
    for way in WAYS:
        against_one_process(way, geometry=lambda: llqr_of("kfac", every=100), perturbation=llqr.SAM,
                            refresh_forward=None)  # fmt: skip


def check_newton_and_summed_curvature():
    for settings in ({"curvature": "newton"}, {"scale": "sum"}, {"tolerance": 0}, {"steps": 30}):
        optimizer, joined = against_one_process(
            geometry=lambda settings=settings: llqr_of("diagonal", lr=0.3, **settings),
            perturbation=llqr.SAM,
        )
        ours, theirs = optimizer.last_report, joined.last_report
        assert ours.products == theirs.products
        for key in ("J_before", "J_after", "gradient_norm", "change", "cosine"):
            a, b = getattr(ours, key), getattr(theirs, key)
            assert abs(a - b) <= 1e-9 * abs(b), (key, a, b)
        assert theirs.change > 0.01


def check_graft_and_groups():
    def base(ps):
        ps = list(ps)
        return torch.optim.AdamW([{"params": ps[:2], "rho": 0.0}, {"params": ps[2:]}], lr=0.01)

    whole = mlp()
    joined = one_process(whole, base=base, geometry=llqr_of(), perturbation=llqr.SAM(), graft=True)
    optimizer, share = data_parallel(
        mlp(), base=base, geometry=llqr_of(), perturbation=llqr.SAM(), graft=True
    )
    train(joined, whole, 4)
    train(optimizer, share, 4)
    near(parameters(share.model), parameters(whole.model), TOLERANCE)


def check_steps_in_the_bases_of_u():
    """SGD goes where it goes without U; AdamW elsewhere, but in all processes alike."""

    def geometry():
        return llqr.NaturalGradient(every=2)

    def probe():
        return llqr.SAM(along="gradient")

    against_one_process(
        geometry=geometry, perturbation=probe, transport="bases", steps=5, tolerance=1e-10
    )
    optimizer, share = data_parallel(
        mlp(), base=lambda ps: torch.optim.AdamW(ps, lr=0.01), geometry=geometry(),
        transport="bases",
    )  # fmt: skip
    train(optimizer, share, 5)
    all_equal(optimizer)
    assert optimizer.geometry.bases_for(optimizer.geometry.parameters) is not None


def check_several_bases():
    base = two_bases(lambda ps: muon(ps, lr=0.02), lambda ps: torch.optim.AdamW(ps, lr=0.01))
    whole, options = mlp(), {"geometry": llqr_of, "perturbation": lambda: llqr.FriendlySAM(0.1)}
    joined = one_process(whole, base=base, **{k: f() for k, f in options.items()})
    optimizer, share = data_parallel(mlp(), base=base, **{k: f() for k, f in options.items()})
    train(joined, whole, 4)
    train(optimizer, share, 4)
    # Muon orthogonalises in bfloat16, so the order of a sum shows in its third digit.
    near(parameters(share.model), parameters(whole.model), 2e-2)
    all_equal(optimizer)


def check_accumulation():
    """Two processes with three micro-batches each; only the last backward of a pass sends."""
    options = {"geometry": llqr_of, "perturbation": lambda: llqr.FriendlySAM(0.1)}
    whole = mlp()
    joined = one_process(whole, **{k: f() for k, f in options.items()})
    optimizer, share = data_parallel(mlp(), **{k: f() for k, f in options.items()})
    sent = count_sends(share.model)
    parts = [share.part(i, i + 2) for i in (0, 2, 4)]
    for step in range(4):
        joined.minimize(whole)
        before = sent[0]
        optimizer.minimize(parts)
        if step:  # torch rebuilds its buckets once
            assert sent[0] - before == 2, sent
    near(parameters(share.model), parameters(whole.model), TOLERANCE)
    all_equal(optimizer)


def count_sends(model):
    """Count the buckets that the reducer sends."""
    sent = [0]

    def hook(state, bucket):
        sent[0] += 1
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    return sent


def check_a_refresh_tells_the_reducer_nothing():
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True},
                    {"gradient_as_bucket_view": True}):  # fmt: skip
        whole, share = mlp(), wrapped(mlp(), **options)
        optimizer = llqr.Optimizer(
            torch.optim.SGD(share.model.parameters(), lr=0.1),
            share.model,
            geometry=llqr_of("kfac"),
            perturbation=llqr.SAM(),
        )
        sent = count_sends(share.model)
        joined = one_process(whole, base=lambda ps: torch.optim.SGD(ps, lr=0.1),
                             geometry=llqr_of("kfac"), perturbation=llqr.SAM())  # fmt: skip
        for _ in range(4):
            optimizer.zero_grad()
            before = sent[0]
            optimizer.refresh(share)
            assert sent[0] == before
            assert all(p.grad is None for p in share.model.parameters())
            optimizer.minimize(share)
            joined.refresh(whole)
            joined.minimize(whole)
        near(parameters(share.model), parameters(whole.model), TOLERANCE)


def noisy(rows=12):
    """Batch norm and dropout, float32."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2),
                          nn.Linear(8, 3))  # fmt: skip
    return Problem(model, torch.randn(rows, 5), torch.randint(3, (rows,)))


def check_replicas_stay_equal_over_200_steps():
    """Every perturbation, synchronised and local; each process with its own data and dropout."""
    probes = {
        "SAM": lambda: llqr.SAM(0.1, norm="layer-metric"),
        **{k: f for k, f in PERTURBATIONS.items() if k not in ("SAM", "none")},
    }
    for (name, make), sync in itertools.product(probes.items(), (True, False)):
        if name in SHORT_ROWS and not sync:
            continue  # those that combine both gradients are refused
        steps = 50 if name in SHORT_ROWS else 200
        torch.manual_seed(0)
        problem = noisy()
        geometry = llqr_of("kfac" if name == "SAM" else "diagonal", every=50)
        optimizer, share = data_parallel(problem, geometry=geometry, perturbation=make(), sync=sync)
        torch.manual_seed(100 + rank())
        for _ in range(steps):
            share.x, share.y = torch.randn(6, 5), torch.randint(3, (6,))
            optimizer.minimize(share)
        replicas_equal(parameters(share.model), name)
        replicas_equal(optimizer.base.state_dict(), name)
        replicas_equal(optimizer.geometry.state(), name)
        assert optimizer.geometry.counters()["refreshes"] == steps // 50
        assert all(bool(torch.isfinite(p).all()) for p in share.model.parameters())


def check_local_probes():
    """m-sharpness: each process displaces by its own gradient; against a loop by hand."""
    optimizer, share = data_parallel(mlp(), perturbation=llqr.SAM(0.1), sync=False,
                                     base=lambda ps: torch.optim.SGD(ps, lr=0.1))  # fmt: skip
    shares = mlp()
    named = dict(shares.model.named_parameters())
    sent = count_sends(share.model)
    for step in range(4):
        before = sent[0]
        optimizer.minimize(share)
        assert sent[0] - before == 1 or not step  # the second pass alone
        seconds = []
        for half in (shares.part(0, 6), shares.part(6, 12)):
            start, g = {n: p.detach().clone() for n, p in named.items()}, half.gradient()
            norm = sum(v.square().sum() for v in g.values()).sqrt()
            with torch.no_grad():
                for n, p in named.items():
                    p.add_(g[n], alpha=float(0.1 / norm))
            seconds.append(half.gradient())
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(start[n])
        with torch.no_grad():
            for n, p in named.items():
                p.sub_((seconds[0][n] + seconds[1][n]) / 2, alpha=0.1)
    near(parameters(share.model), parameters(shares.model), TOLERANCE)
    synchronised, other = data_parallel(mlp(), perturbation=llqr.SAM(0.1),
                                        base=lambda ps: torch.optim.SGD(ps, lr=0.1))  # fmt: skip
    train(synchronised, other, 4)
    assert any(
        (a - b).abs().max() > 1e-6
        for a, b in zip(share.model.parameters(), other.model.parameters(), strict=True)
    )


def check_local_memory_is_checkpointed():
    """FriendlySAM's memory differs between the processes; one state dict holds all of them."""

    def make():
        return data_parallel(mlp(), perturbation=llqr.FriendlySAM(0.1), sync=False)

    (optimizer, share), (fresh, other) = make(), make()
    train(optimizer, share, 3)
    state = through_file(optimizer.state_dict())
    replicas_equal(state)
    memory = state["state"][0]["llqr.perturbation.memory"]
    assert memory.shape == (2, 6, 5) and not torch.equal(memory[0], memory[1])
    with torch.no_grad():
        for a, b in zip(other.model.parameters(), share.model.parameters(), strict=True):
            a.copy_(b)
    fresh.load_state_dict(state)
    train(optimizer, share, 3)
    train(fresh, other, 3)
    same(everything(fresh), everything(optimizer))
    alone_again = one_process(mlp(), perturbation=llqr.FriendlySAM(0.1), sync=False)
    with raises(ValueError, "memory"):
        alone_again.load_state_dict(state)


def check_a_value_that_is_not_finite_in_one_process():
    """All skip, whichever pass it is in, with and without local probes; all refuse a refresh."""
    for sync, when in itertools.product((True, False), (0, 1)):
        optimizer, share = data_parallel(
            norm_net(), perturbation=llqr.FriendlySAM(0.1), sync=sync, geometry=llqr_of(every=100)
        )
        train(optimizer, share, 1)
        before = everything(optimizer)
        if rank() == 1:
            spoil(share, when)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.minimize(share)
        assert any("not finite" in str(w.message) for w in caught), (sync, when)
        assert optimizer.skipped_steps == 1
        after = everything(optimizer)
        for state in (before, after):
            for group in state["optimizer"]["param_groups"]:
                del group["llqr.skipped_steps"]
        same(after, before)
        train(optimizer, share, 2)
        all_equal(optimizer) if sync else replicas_equal(parameters(share.model))


def spoil(share, when):
    """Make the gradient of the coming call number ``when`` not finite, in this process."""
    first, forward = share.calls, share.model.forward

    def spoiled(x):
        z = forward(x)
        if share.calls - 1 - first == when:
            z.register_hook(lambda g: g * float("nan"))
        return z

    share.model.forward = spoiled


def check_a_refresh_that_is_not_finite_in_one_process():
    optimizer, share = data_parallel(mlp(), geometry=llqr_of())
    train(optimizer, share, 1)
    before = copy.deepcopy(optimizer.geometry.state())

    def forward():
        loss, z = share()
        return (loss * float("nan") if rank() else loss), z

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = optimizer.refresh(forward)
    assert not report.accepted and "not finite" in report.reason
    assert any("refused" in str(w.message) for w in caught)
    same(optimizer.geometry.state(), before)
    train(optimizer, share, 3)
    all_equal(optimizer)


def check_a_refresh_that_raises_in_one_process():
    optimizer, share = data_parallel(mlp(), geometry=llqr_of(), perturbation=llqr.SAM())

    def forward():
        if rank() == 1:
            raise KeyError("no more data")
        return share()

    with raises(KeyError, "no more data") if rank() else raises(RuntimeError, "another process"):
        optimizer.refresh(forward)
    train(optimizer, share, 3)
    all_equal(optimizer)


def check_uneven_micro_batches():
    """Two in one process, three in the other: nobody waits, and the processes count equally."""
    optimizer, share = data_parallel(mlp(), geometry=llqr_of(), perturbation=llqr.SAM())
    parts = [share.part(i, i + 2) for i in ((0, 2) if rank() else (0, 2, 4))]
    for _ in range(4):
        optimizer.minimize(parts)
    all_equal(optimizer)


def check_join_is_refused():
    """It is for uneven data, which would leave one process waiting."""
    for options in ({"perturbation": llqr.SAM()}, {"geometry": llqr_of()}):
        optimizer, share = data_parallel(mlp(), **options)
        with raises(RuntimeError, "join", "same number of steps"), share.model.join():
            optimizer.minimize(share)


def check_replicas_that_differ_are_an_error():
    problem = mlp()
    optimizer = llqr.Optimizer(torch.optim.SGD(problem.model.parameters(), lr=0.1), problem.model)
    half = problem.part(6 * rank(), 6 * rank() + 6)
    with raises(RuntimeError, "differ between the 2 processes", "DistributedDataParallel"):
        optimizer.minimize(half)  # nobody averages the gradients
    different = mlp(seed=rank())
    optimizer = llqr.Optimizer(
        torch.optim.SGD(different.model.parameters(), lr=0.1), different.model, geometry=llqr_of()
    )
    with raises(RuntimeError, "different parameters"):
        optimizer.refresh(different)
    train(one_process(different, geometry=llqr_of(), perturbation=llqr.SAM()), different, 3)


def check_a_wrapper_made_after_the_optimizer():
    """As Lightning and Accelerate do: the optimizer saw the module, the forward the wrapper."""
    whole, problem = mlp(), mlp()
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9),
        problem.model,
        geometry=llqr_of("kfac"),
        perturbation=llqr.SAM(),
    )
    joined = one_process(whole, geometry=llqr_of("kfac"), perturbation=llqr.SAM())
    share = wrapped(problem)
    train(joined, whole, 5)
    train(optimizer, share, 5)
    near(parameters(share.model), parameters(whole.model), TOLERANCE)


def check_averaging_by_hand():
    """No wrapper: the body averages p.grad."""
    whole, problem = mlp(), mlp()
    options = {"geometry": lambda: llqr_of("kfac"), "perturbation": llqr.SAM}
    joined = one_process(whole, **{k: f() for k, f in options.items()})
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9),
        problem.model,
        **{k: f() for k, f in options.items()},
    )
    half = problem.part(6 * rank(), 6 * rank() + 6)
    for _ in range(4):
        joined.minimize(whole)
        optimizer.refresh_if_due(half)
        for _ in optimizer.passes():
            half.backward()
            for p in problem.model.parameters():
                dist.all_reduce(p.grad, dist.ReduceOp.SUM)
                p.grad /= 2
        optimizer.step()
    near(parameters(problem.model), parameters(whole.model), TOLERANCE)


def check_a_scaler():
    """An infinity in one process halves the scale of both and skips the step of both."""

    def make():
        problem = mlp(torch.float32)
        geometry = llqr_of(every=100)
        return data_parallel(problem, geometry=geometry, perturbation=llqr.FriendlySAM(0.1))

    optimizer, share = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        if step == 2 and rank() == 1:
            spoil(share, 1)
        optimizer.minimize(share, scaler=scaler)
        replicas_equal(scaler.state_dict())
    assert scaler.get_scale() == 512.0
    assert optimizer._progress.step == 5
    all_equal(optimizer)


def check_dropout_is_replayed():
    """The second pass sees the masks of the first, each process its own."""
    optimizer, share = data_parallel(dropout_mlp(), perturbation=llqr.SAM(0.0001))
    torch.manual_seed(7 + rank())
    losses = []
    for _ in optimizer.passes():
        losses.append(float(share.backward()))
    assert abs(losses[0] - losses[1]) < 1e-2, losses
    replicas_equal(parameters(share.model))


def check_a_copy():
    """deepcopy and pickle leave the processes where they are."""
    optimizer, share = data_parallel(mlp(), geometry=llqr_of(), perturbation=llqr.SAM())
    train(optimizer, share, 2)
    other = copy.deepcopy(optimizer)
    assert isinstance(other.model, DistributedDataParallel) and other.ranks.size == 2
    again = Problem(other.model, share.x, share.y)
    train(optimizer, share, 3)
    train(other, again, 3)
    same(everything(other), everything(optimizer))


def check_sharpness():
    """Each process with its own batches, unequal in rows and number, against one with all."""
    one, cuts = mlp(), [(0, 5), (5, 8), (8, 12)]
    model = DistributedDataParallel(copy.deepcopy(one.model))
    mine = cuts[:1] if rank() == 0 else cuts[1:]

    def forward(network, rows):
        z = network(one.x[slice(*rows)])
        return nn.functional.cross_entropy(z, one.y[slice(*rows)]), z

    def rows(parts):
        return [torch.arange(*part) for part in parts]  # tensors, so that their rows count

    def measure(network, parts, **options):
        def loss(index):
            return forward(network, (int(index[0]), int(index[-1]) + 1))

        s, given = llqr.sharpness, {"batches": rows(parts), **options}
        top = s.eigenvalues(loss, network, 2, tolerance=1e-8, **given)
        total = s.trace(loss, network, "fisher", products=16, **given)
        worst = s.worst_case(loss, network, 0.3, steps=4, starts=2, **given)
        mean = s.m_sharpness(loss, network, m=2, **given)
        plane = s.landscape(loss, network, 1, points=3, **given)
        spectrum = s.density(loss, network, steps=4, probes=2, **given)
        results = [top, total, worst, mean, plane, spectrum]
        numbers = [top.values, top.standard_errors, plane.losses, plane.standard_errors]
        numbers += [spectrum.nodes.flatten(), spectrum.weights.flatten()]
        scalars = [total.value, total.batch_error, worst.rise, worst.standard_error, worst.loss,
                   mean.rise, mean.standard_error]  # fmt: skip
        found = torch.cat([*(n.flatten() for n in numbers), torch.tensor(scalars, dtype=F64)])
        return found, [(r.batches, r.examples, r.evaluations) for r in results]

    both, effort = measure(model, mine)
    joined, expected = measure(one.model, cuts, process_group=alone())
    assert effort == expected
    near({"found": both}, {"found": joined}, 1e-10)
    replicas_equal(both)
    assert all(p.grad is None for p in model.parameters())
    if rank() == 1:
        one.x[9] = float("nan")
    with raises(*((ValueError, "loss of batch 1 is nan") if rank() else (RuntimeError, "another"))):
        measure(model, mine)


def check_sharpness_in_a_metric_with_batch_norm():
    """Rises in U's metric and a plane of filters, in training mode, against one with all."""
    one, cuts = norm_net(), [(0, 3), (3, 4), (4, 6)]
    model = DistributedDataParallel(copy.deepcopy(one.model))
    mine = cuts[:1] if rank() == 0 else cuts[1:]
    draws = torch.Generator().manual_seed(4)
    U = {n: 0.5 + torch.rand(p.shape, dtype=F64, generator=draws)
         for n, p in one.model.named_parameters()}  # fmt: skip

    def measure(network, parts, **options):
        geometry = llqr.FixedGeometry(U)
        geometry.bind(network)

        def loss(rows):
            z = network(one.x[rows])
            return nn.functional.cross_entropy(z, one.y[rows]), z

        s, given = llqr.sharpness, {"batches": [torch.arange(*part) for part in parts], **options}
        worst = s.worst_case(loss, network, 0.2, geometry, steps=4, starts=2, **given)
        mean = s.m_sharpness(loss, network, 0.1, geometry, **given)
        plane = s.landscape(loss, network, 2, points=3, **given)
        numbers = [worst.rise, worst.standard_error, mean.rise, mean.standard_error]
        return torch.cat([plane.losses.flatten(), plane.standard_errors.flatten(),
                          torch.tensor(numbers, dtype=F64)])  # fmt: skip

    buffers = [b.clone() for b in model.buffers()]
    both = measure(model, mine)
    near({"found": both}, {"found": measure(one.model, cuts, process_group=alone())}, 1e-10)
    replicas_equal(both)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert float(both[18]) > 0 and float(both[:9].std()) > 0
