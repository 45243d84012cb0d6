"""``llqr plan`` against what training a small network takes."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import llqr
from allocations import peak_of_allocations
from llqr_lab.cli import main
from llqr_lab.plan.cost import Setting, make_plan
from llqr_lab.plan.counts import count_geometry, count_network
from llqr_lab.plan.rates import Rates
from llqr_lab.plan.work import Work, answered, fused_attention, measure_work
from llqr_lab.plan.workload import PlanError, load_workload

RATES = Rates(1e11, 1e10, 1e9)


def three_layers(width=64):
    return nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)
    )


def planned(structure="diagonal", kind=llqr.LLQR, setting=None, products=5, **options):
    workload = load_workload(f"{__name__}:three_layers", 512, (32,), options)
    network = count_network(workload)
    counts = count_geometry(structure, kind(structure), workload, network, products)
    return network, counts, make_plan(network, counts, setting or Setting(passes=1), RATES)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module():
    import types

    module = types.ModuleType(__name__)
    module.three_layers = three_layers
    return module


def real_problem():
    torch.manual_seed(0)
    model, x, y = three_layers(), torch.randn(512, 32), torch.randint(8, (512,))

    def forward():
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    return model, forward


def test_operations_of_a_step_are_counted_by_hand():
    network, _, plan = planned()
    # Forward, and two products of the same size backward; none for the gradient of the images.
    a, b, c = 32 * 64, 64 * 64, 64 * 8
    assert network.step.flops == 2 * 512 * (3 * (a + b + c) - a)
    assert network.parameters == a + b + c + 64 + 64 + 8
    assert plan.parameters == plan.base == plan.gradients == 4 * network.parameters


def test_memory_of_a_step_is_what_the_allocator_gives():
    network, _, _ = planned()
    model, forward = real_problem()
    forward()[0].backward()
    model.zero_grad()
    measured = peak_of_allocations(lambda: forward()[0].backward())
    assert network.step.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_memory_of_a_refresh_is_what_the_allocator_gives(structure):
    model, forward = real_problem()
    geometry = llqr.LLQR(structure)
    geometry.bind(model)
    geometry.refresh([forward])
    reports = []
    measured = peak_of_allocations(lambda: reports.append(geometry.refresh([forward], step=1)))
    _, counts, plan = planned(structure, products=reports[0].products)
    told = plan.refresh_graph + plan.refresh_vectors
    assert told == pytest.approx(measured, rel=0.15)


def test_devices_share_what_is_cut():
    one = planned("kfac")[2]
    for fsdp in (True, False):
        plan = planned("kfac", setting=Setting(world=8, fsdp=fsdp, shard=True, passes=1))[2]
        assert plan.preconditioner == one.preconditioner // 8
        assert plan.base == (one.base // 8 if fsdp else one.base)
        assert plan.refresh_vectors < one.refresh_vectors
        assert plan.step_sent > 0 and one.step_sent == 0
    # An all-reduce sends 2 (N - 1) / N of the gradient.
    plain = planned("kfac", setting=Setting(world=8, passes=1))[2]
    assert plain.step_sent == pytest.approx(2 * 7 / 8 * plain.gradients)


def test_overhead_falls_with_the_cadence_and_counts_in_steps():
    network, counts, often = planned("kfac", setting=Setting(every=10))
    seldom = make_plan(network, counts, Setting(every=1000), RATES)
    apply = often.apply_seconds / often.step_seconds
    refresh = often.refresh_seconds / often.step_seconds
    assert often.overhead == pytest.approx(apply + refresh / 10)
    assert seldom.overhead == pytest.approx(apply + refresh / 1000)
    fast = replace(RATES, flops=2e11, memory=2e10, call=RATES.call / 2)
    twice = make_plan(network, counts, Setting(every=10), fast)
    assert twice.overhead == pytest.approx(often.overhead)


def test_seconds_are_those_of_operations_traffic_and_calls():
    rates = Rates(1e9, 1e8, call=1e-3, convolution=0.5, factorisation=0.1, float32=0.25)
    rates = replace(rates, functions=0.5)
    work = Work(flops=1e9, convolved=1e9, factored=1e8, moved=2e8, evaluated=1e8, calls=500)
    assert rates.seconds(work) == pytest.approx(1 + 2 + 1 + 2 + 2 + 0.5)
    assert rates.of_algebra.seconds(work) == pytest.approx(4 + 8 + 4 + 2 + 2 + 0.5)


def test_natural_gradient_is_planned_by_its_samples():
    network, counts, plan = planned("e-kfac", llqr.NaturalGradient)
    backward = network.step.flops - network.forward.flops
    assert counts.passes.flops == network.forward.flops + 9 * backward
    # Each of 8 samples is rotated into the bases by half of an application of U.
    assert counts.products == 8 and counts.algebra.flops > 4 * counts.apply.flops
    model, forward = real_problem()
    geometry = llqr.NaturalGradient("e-kfac")
    geometry.bind(model)
    for step in (0, 1):
        geometry.refresh([forward], step=step)
    measured = peak_of_allocations(lambda: geometry.refresh([forward], step=2))
    assert plan.refresh_graph + plan.refresh_vectors == pytest.approx(measured, rel=0.02)


def test_moments_are_planned_by_averages_and_rotations():
    network, counts, plan = planned("kfac", llqr.GradientMoments)
    # g g' and g'g, and three rotations of as many operations: g and w there, a change back.
    sides = [(64, 32), (64, 64), (8, 64)]
    assert counts.apply.flops == 4 * sum(2 * m * n * (m + n) for m, n in sides)
    assert counts.passes == Work() and counts.messages == 0
    assert counts.algebra.factored > 0  # new bases, at each renew_every-th step
    model, forward = real_problem()
    geometry = llqr.GradientMoments(renew_every=1)
    base = torch.optim.AdamW(model.parameters())
    optimizer = llqr.Optimizer(base, model, geometry=geometry, transport="bases")
    assert counts.stored == geometry.memory()["preconditioner"]
    for _ in range(2):
        optimizer.minimize(forward)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    measured = peak_of_allocations(lambda: geometry.observe(gradients))
    assert plan.refresh_vectors - network.step.held == pytest.approx(measured, rel=0.1)


def test_moments_on_the_command_line(capsys):
    given = ["plan", f"{__name__}:three_layers", "--input", "32", "--metric", "moments"]
    given += ["--flops", "1e11", "--memory-rate", "1e10"]
    assert main([*given, "--structure", "diagonal", "kfac"]) == 0
    assert "new bases (refresh) every 10." in capsys.readouterr().out
    assert main([*given, "--shard"]) == 2
    assert "--metric moments: a base in the bases needs whole" in capsys.readouterr().err


def test_attention_is_fused_and_products_hide_their_traffic():
    q = torch.empty(2, 4, 32, 16, device="meta", requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    apart = measure_work(lambda: attend(q, q, q))
    with fused_attention():
        fused = measure_work(lambda: attend(q, q, q))
    assert fused.flops == apart.flops == 2 * (2 * 2 * 4 * 32 * 32 * 16)
    assert fused.held < apart.held
    a, v = torch.empty(512, 512, device="meta"), torch.empty(512, device="meta")
    assert measure_work(lambda: a @ a).moved == 0
    assert measure_work(lambda: v.mul_(2)).moved == 2 * v.nbytes  # read and written
    assert measure_work(lambda: v.zero_()).moved == v.nbytes


def test_an_inner_solve_that_ends_early_costs_less():
    workload = load_workload(f"{__name__}:three_layers", 512, (32,), {})
    network = count_network(workload)
    few, all_ = (
        count_geometry("kfac", llqr.LLQR("kfac"), workload, network, 5, steps) for steps in (10, 50)
    )
    one = (all_.algebra.flops - few.algebra.flops) / 40
    # On full-rank (m, n) gradients a step of kfac takes 6 m^2 n + 2 n m^2 operations, m <= n.
    assert one >= sum(8 * min(s) ** 2 * max(s) for s in [(64, 32), (64, 64), (8, 64)])


def test_numbers_of_the_meta_device_are_answered():
    x = torch.empty(3, device="meta")
    with answered(2.0, whether_all=[False]):
        assert float(x.sum()) == 2.0 and x.tolist() == [2.0] * 3
        assert [bool(x.isfinite().all()) for _ in range(2)] == [False, True]
        assert bool(x.any()) and not bool((x > 1).any())


def test_the_command_prints_a_table_and_json(capsys):
    words = ["plan", "resnet18", "--set", "width=8", "--set", "blocks=(1,1)", "--set", "classes=10"]
    words += ["--input", "3x32x32", "--batch", "4", "--structure", "diagonal", "kfac"]
    words += ["--flops", "1e11", "--memory-rate", "1e10", "--budget", "0.001"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "overhead %" in out and "no" in out and "diagonal" in out
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in content["plans"]] == ["diagonal", "kfac"]
    assert content["plans"][0]["peak"] > 0 and content["rates"]["flops"] == 1e11


@pytest.mark.parametrize(
    "spec, part",
    [
        ("resnet", "package.module:factory"),
        ("no_such_package:make", "cannot import no_such_package"),
        ("json:no_such_function", "no 'no_such_function'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(spec, part, capsys):
    with pytest.raises(PlanError, match=part):
        load_workload(spec, 1, (4,), {})
    assert main(["plan", spec]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_configuration_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    fields = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    path.write_text(json.dumps({"model_type": "llama", "intermediate_size": 32, **fields}))
    workload = load_workload(f"transformers/{path}", 2, (8,), {"num_hidden_layers": 1})
    network = count_network(workload)
    one_layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert network.parameters == one_layer + 2 * 50 * 16 + 16
    assert network.product.flops > network.step.flops / 3
