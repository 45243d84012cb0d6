"""U shared out over the processes: the same training and checkpoints, a share of the memory."""

from __future__ import annotations

import itertools
import warnings

import torch
from replicas import (
    all_equal,
    data_parallel,
    near,
    one_process,
    parameters,
    raises,
    rank,
    replicas_equal,
    wrapped,
)
from torch import nn

import llqr
from explicit import agree, vector
from llqr.curvature import curvature_samples
from llqr.distributed import Ranks
from moments import ByHand, in_model_order
from tables import PERTURBATIONS, SAMPLED, SOLVED
from tiny import (
    Problem,
    everything,
    llqr_of,
    mlp,
    natural_of,
    same,
    through_file,
    train,
)

CLOSED_FORMS = ("kfac", "e-kfac", "diag-kfac", "diagonal", "scalar", "dense")
STRUCTURES = [name for name in SOLVED if name != "none"]


def shared(name, **settings):
    """The geometry of the table, shared out."""
    of = {"e-kfac-gradient": {"bases": "gradient", "renew_every": 2}}.get(name, {})
    return llqr_of(name.removesuffix("-gradient"), **{"shard": True, **of, **settings})


def wide():
    """Several blocks a parameter, a bias of one entry, a transposed convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (5, 1, 1)), nn.ConvTranspose2d(5, 4, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 1), nn.Linear(1, 3),
    ).double()  # fmt: skip
    return Problem(model, torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,)))


def check_every_structure_against_one_process():
    for structure, make in itertools.product(STRUCTURES, (mlp, wide)):
        options = {"perturbation": PERTURBATIONS["SAM"]}
        settings = {"block_size": 3, "clip": 0.01, "lr": 0.3}
        whole = make()
        unshared = shared(structure, shard=False, **settings)
        joined = one_process(whole, geometry=unshared, **{k: f() for k, f in options.items()})
        optimizer, share = data_parallel(
            make(), geometry=shared(structure, **settings), **{k: f() for k, f in options.items()}
        )
        train(joined, whole, 3)
        train(optimizer, share, 3)
        tolerance = 1e-6 if structure == "e-kfac-gradient" else 1e-12
        near(parameters(share.model), parameters(whole.model), tolerance)
        all_equal(optimizer)
        ours, theirs = optimizer.geometry, joined.geometry
        assert ours.numel() == theirs.numel() and ours.summary() == theirs.summary()
        spectrum = ours.spectrum()
        replicas_equal(spectrum)
        if structure == "e-kfac-gradient":  # eigenvectors of equal eigenvalues are arbitrary
            continue
        for layer, ends in theirs.spectrum().items():
            assert all(abs(a - b) < 1e-6 for a, b in zip(spectrum[layer], ends, strict=True)), (
                structure,
                layer,
            )
        assert optimizer.last_report.products == joined.last_report.products
        for key in ("J_before", "J_after", "gradient_norm", "change", "cosine", "eigenvalue_min"):
            a, b = getattr(optimizer.last_report, key), getattr(joined.last_report, key)
            assert abs(a - b) <= 1e-6 * abs(b), (structure, key, a, b)


def check_solvers_and_products():
    for structure, settings in itertools.product(
        ("diagonal", "kfac"),
        ({"tolerance": 0}, {"solver": "adam"}, {"curvature": "newton", "lr": 0.2}, {"clip": None}),
    ):
        whole = mlp()
        joined = one_process(whole, geometry=llqr_of(structure, **settings))
        optimizer, share = data_parallel(mlp(), geometry=shared(structure, **settings))
        train(joined, whole, 4)
        train(optimizer, share, 4)
        near(parameters(share.model), parameters(whole.model), 1e-12)
    with raises(ValueError, "lbfgs"):
        data_parallel(mlp(), geometry=shared("diagonal", solver="lbfgs"))
    with raises(ValueError, "sync"):
        data_parallel(mlp(), geometry=shared("kfac"), perturbation=llqr.SAM(), sync=False)


def check_memory_falls_by_the_number_of_processes():
    torch.manual_seed(0)
    layers = [nn.Linear(48, 48) for _ in range(8)]
    problem = Problem(nn.Sequential(*layers), torch.randn(4, 48), torch.randint(48, (4,)))
    for structure in ("diagonal", "diag-kfac", "kfac", "e-kfac", "dense"):
        alone = one_process(problem, geometry=llqr_of(structure, block_size=64))
        whole = alone.geometry.memory()["preconditioner"]
        assert whole == 4 * alone.geometry.numel()
        ours = llqr_of(structure, block_size=64, shard=True)
        data_parallel(problem, geometry=ours)
        share = ours.memory()["preconditioner"]
        assert abs(share / whole - 0.5) < 0.01, (structure, share, whole)


def check_one_checkpoint_for_all_forms():
    """Saved shared out, loaded shared out or not, in two processes or one; and the other way."""
    for structure in ("diagonal", "kfac", "e-kfac-gradient", "dense"):

        def make(shard, structure=structure):
            return data_parallel(
                mlp(), geometry=shared(structure, shard=shard), perturbation=llqr.FriendlySAM(0.1)
            )

        for saved, loaded in ((True, True), (True, False), (False, True)):
            optimizer, share = make(saved)
            train(optimizer, share, 3)
            state = through_file(optimizer.state_dict())
            replicas_equal(state["state"])
            fresh, other = make(loaded)
            other.model.load_state_dict(share.model.state_dict())
            fresh.load_state_dict(state)
            same(fresh.geometry.state(), optimizer.geometry.state())
            train(optimizer, share, 4)
            train(fresh, other, 4)
            if saved == loaded:
                same(everything(fresh), everything(optimizer))
            else:
                near(parameters(other.model), parameters(share.model), 1e-7)


def check_a_state_that_does_not_fit_is_refused_by_all():
    optimizer, share = data_parallel(mlp(), geometry=shared("kfac"))
    train(optimizer, share, 1)
    state = through_file(optimizer.state_dict())
    key = next(k for k in state["state"][0] if k.endswith("A.0"))
    state["state"][0][key] = state["state"][0][key][:2]
    before = everything(optimizer)
    with raises(ValueError, "A.0"):
        optimizer.load_state_dict(state)
    same(everything(optimizer), before)


def check_a_value_that_is_not_finite_in_one_process():
    optimizer, share = data_parallel(mlp(), geometry=shared("kfac"), perturbation=llqr.SAM())
    train(optimizer, share, 1)
    before = optimizer.geometry.state()
    spoil = rank() == 1

    def forward():
        loss, z = share()
        return (loss * float("nan") if spoil else loss), z

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not optimizer.refresh(forward).accepted
    same(optimizer.geometry.state(), before)
    train(optimizer, share, 2)
    all_equal(optimizer)


def check_a_process_without_a_block():
    """One matrix and no bias: the other process has nothing to keep, and the products still run."""

    def make():
        torch.manual_seed(0)
        model = nn.Linear(5, 3, bias=False).double()
        return Problem(model, torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,)))

    for structure, settings in itertools.product(("kfac", "dense"), ({}, {"tolerance": 0})):
        whole = make()
        joined = one_process(whole, geometry=llqr_of(structure, **settings))
        optimizer, share = data_parallel(make(), geometry=shared(structure, **settings))
        train(joined, whole, 3)
        train(optimizer, share, 3)
        near(parameters(share.model), parameters(whole.model), 1e-12)
        sizes = [0, 0]
        torch.distributed.all_gather_object(sizes, optimizer.geometry.memory()["preconditioner"])
        assert sorted(sizes)[0] == 0 < sorted(sizes)[1], sizes


def check_added_parameters():
    optimizer, share = data_parallel(mlp(), geometry=shared("kfac"))
    optimizer = llqr.Optimizer(
        torch.optim.SGD(share.model.module[0].parameters(), lr=0.1),
        share.model,
        geometry=shared("kfac"),
    )
    train(optimizer, share, 2)
    learned = optimizer.geometry.state()["0.weight"]
    optimizer.add_param_group({"params": list(share.model.module[2].parameters())})
    same(optimizer.geometry.state()["0.weight"], learned)
    train(optimizer, share, 3)
    replicas_equal(parameters(share.model))


def samples_of_all(geometry, share):
    """The samples that the coming refresh draws in all processes, (m, P) in model order."""
    names = [n for n, _ in share.model.module.named_parameters()]
    inside = Problem(share.model.module, share.x, share.y)
    drawn = curvature_samples(inside, inside.model.parameters(), geometry.curvature).draw(
        geometry.settings.samples, geometry._generator()
    )
    own = in_model_order(inside.model, dict(zip(names, drawn, strict=True)))
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    assert not torch.equal(parts[0], parts[1])
    return torch.cat(parts)


def check_natural_gradient_learns_from_the_samples_of_all():
    """Whole in each process and sharded: U is that of all samples in one process."""
    for structure, make in itertools.product(CLOSED_FORMS, (mlp, wide)):
        whole = make()
        by_hand = ByHand(whole.model, structure, 3, damping=0.1, ema=0.5)
        pairs = [
            data_parallel(
                make(),
                geometry=natural_of(structure, block_size=3, damping=0.1, shard=s, report_J=True),
            )
            for s in (False, True)
        ]
        reports = []
        for step in range(2):
            by_hand.refresh(samples_of_all(pairs[0][0].geometry, pairs[0][1]))
            for optimizer, share in pairs:
                report = optimizer.geometry.refresh([share], step=step)
                assert report.accepted and report.samples == 8
                reports.append(report)
        model = llqr.quadratic_model(whole, whole.model.parameters())
        J = float(model.value([-g for g in model.gradient]))  # at U = I, of the joined batch
        for first, other in zip(reports[::2], reports[1::2], strict=True):
            assert abs(first.J_after - other.J_after) <= 1e-7 * abs(first.J_after)
        assert all(abs(report.J_before - J) <= 1e-9 * abs(J) for report in reports[:2])
        torch.manual_seed(3)
        g = {n: torch.randn_like(p) for n, p in whole.model.named_parameters()}
        expected = by_hand.U @ vector(g.values())
        for optimizer, _ in pairs:
            geometry = optimizer.geometry
            agree(vector(geometry.apply(g).values()), expected, 1e-7)
            replicas_equal(geometry.state())
            replicas_equal(geometry.spectrum())
        assert pairs[0][0].geometry.numel() == pairs[1][0].geometry.numel()


def check_natural_gradient_trains_alike_sharded_or_not():
    """With a probe, gradients that M follows, and a group that joins."""
    for geometry, joins in itertools.product(SAMPLED, (False, True)):
        ends = []
        for shard in (False, True):
            make = dict(SAMPLED[geometry]().settings.__dict__, shard=shard, every=2)
            share = wrapped(wide())
            held = list(share.model.parameters())
            late = 4 if joins else len(held)
            optimizer = llqr.Optimizer(
                torch.optim.SGD(held[:late], lr=0.1),
                share.model,
                geometry=llqr.NaturalGradient("e-kfac", **make),
                perturbation=llqr.SAM(0.05),
            )
            train(optimizer, share, 3)
            if joins:
                optimizer.add_param_group({"params": held[late:]})
            train(optimizer, share, 3)
            all_equal(optimizer)
            ends.append(parameters(share.model))
        near(*ends, 1e-7)


def check_rows_are_exchanged_with_and_without_an_all_to_all():
    ranks = Ranks(nn.Linear(2, 1))
    rows = torch.arange(6.0).view(2, 3) + 10 * rank()
    expected = torch.stack([torch.arange(3.0) + 3 * rank(), torch.arange(3.0) + 3 * rank() + 10])
    assert ranks._exchanges(torch.device("cpu")) and not ranks._exchanges(torch.device("cuda"))
    same(ranks.exchange(rows), expected)
    ranks._exchanges = lambda device: False
    same(ranks.exchange(rows), expected)
