"""Several optimizers under one: Muon with AdamW and others, against each of them by hand."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_post_hook

import llqr
from byhand import sam_step
from situations.test_bases import Counting, Lookahead
from tables import muon as muon_of
from tiny import (
    F64,
    SCALED_WAYS,
    WAYS,
    everything,
    llqr_of,
    mlp,
    norm_net,
    poisoned,
    random_metric,
    same,
    scaler_of,
    sgd,
    through_file,
    train,
    train_plainly,
    weights,
)

optim = torch.optim


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2]


def rest(model):
    return [p for p in model.parameters() if p.dim() != 2]


def muon_and_adamw(model, **form):
    return [muon_of(matrices(model), lr=0.02), optim.AdamW(rest(model), lr=0.01, **form)]


def muon_and_sgd(model, **form):
    return [muon_of(matrices(model), lr=0.02), optim.SGD(rest(model), 0.1, 0.9, **form)]


PAIRS = {"Muon, AdamW": muon_and_adamw, "Muon, SGD": muon_and_sgd}
each_pair = pytest.mark.parametrize("pair", PAIRS)


def start(pair=muon_and_adamw, make=mlp, steps=0, **options):
    """A problem and its optimizer; with everything that keeps state unless options say else."""
    options = options or {"geometry": llqr_of("kfac"), "perturbation": llqr.FriendlySAM(0.05)}
    problem = make()
    bases = PAIRS.get(pair, pair)(problem.model)
    optimizer = llqr.Optimizer(bases, problem.model, **options)
    train(optimizer, problem, steps)
    return problem, optimizer


def stepped_by_hand(problem, bases):
    """What a loop by hand needs of an optimizer, the bases stepped one after the other."""
    return SimpleNamespace(
        param_groups=[{"params": list(problem.model.parameters())}],
        zero_grad=problem.model.zero_grad,
        step=lambda: [base.step() for base in bases],
    )


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("rho", [0.0, 0.1])
@each_pair
def test_steps_are_those_of_separate_optimizers(pair, rho, form):
    ours, theirs = mlp(), mlp()
    probe = llqr.SAM(rho) if rho else None
    optimizer = llqr.Optimizer(PAIRS[pair](ours.model, **form), ours.model, perturbation=probe)
    bases = PAIRS[pair](theirs.model, **form)
    train(optimizer, ours, 4)
    if rho:
        for _ in range(4):
            sam_step(stepped_by_hand(theirs, bases), theirs.backward, rho)
    else:
        train_plainly(stepped_by_hand(theirs, bases), theirs, 4)
    same(weights(ours.model), weights(theirs.model))
    for mine, other in zip(optimizer.base, bases, strict=True):
        same(list(mine.state.values()), list(other.state.values()))


@each_pair
def test_a_metric_comes_before_all_of_them(pair):
    ours, theirs = mlp(), mlp()
    U, theirs_U = random_metric(ours), random_metric(theirs)
    optimizer = llqr.Optimizer(PAIRS[pair](ours.model), ours.model, geometry=U)
    bases = PAIRS[pair](theirs.model)
    llqr.Optimizer(sgd(theirs), theirs.model, geometry=theirs_U)  # tells it the names
    for _ in range(4):
        optimizer.minimize(ours)
        for name, g in theirs_U.apply(theirs.gradient()).items():
            theirs.model.get_parameter(name).grad = g
        stepped_by_hand(theirs, bases).step()
    same(weights(ours.model), weights(theirs.model))


ONE_KIND = {
    "SGD": lambda groups: optim.SGD(groups, 0.1, 0.9, weight_decay=0.01),
    "AdamW": lambda groups: optim.AdamW(groups, lr=0.01),
    "Adadelta": lambda groups: optim.Adadelta(groups, lr=1.0),  # whose own rho is no radius
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ONE_KIND)
def test_a_list_of_one_kind_is_that_kind_with_groups(kind, way):
    def groups(model):
        return [{"params": matrices(model)}, {"params": rest(model), "weight_decay": 0.0}]

    ends = []
    for made in (
        lambda model: ONE_KIND[kind](groups(model)),
        lambda model: [ONE_KIND[kind]([group]) for group in groups(model)],
    ):
        problem = mlp()
        options = {"geometry": llqr_of("kfac"), "perturbation": llqr.FriendlySAM(0.1)}
        optimizer = llqr.Optimizer(made(problem.model), problem.model, **options)
        train(optimizer, problem, 4, way)
        ends.append((weights(problem.model), optimizer.perturbation.state()))
    same(*ends)


def test_accumulation_is_the_step_of_the_joined_batch():
    (whole, one), (parts, two) = (start(perturbation=llqr.SAM(0.1)) for _ in range(2))
    for _ in range(3):
        one.minimize(whole)
        two.minimize([parts.part(0, 6), parts.part(6, 12)])
    for a, b in zip(weights(whole.model).values(), weights(parts.model).values(), strict=True):
        # Muon orthogonalises in bfloat16, so the order of a sum shows in its third digit.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_an_adadelta_beside_another_has_its_radius():
    """Where not all optimizers have an option of that name, it is still Adadelta's own."""
    problem = mlp()
    bases = [optim.Adadelta(matrices(problem.model), rho=0.5), optim.SGD(rest(problem.model), 0.1)]
    optimizer = llqr.Optimizer(bases, problem.model, perturbation=llqr.SAM(0.1))
    optimizer.param_groups[1]["rho"] = 0.2
    assert optimizer._probing.radii == {"0.weight": 0.1, "0.bias": 0.2, "2.weight": 0.1,
                                       "2.bias": 0.2}  # fmt: skip


# -- groups and state are those of the optimizers --------------------------------------------------


def test_groups_and_state_are_the_optimizers_own():
    problem, optimizer = start(steps=2)
    muon, adamw = optimizer.base
    assert len(optimizer.base) == 2 and optimizer.base[0] is muon
    groups = optimizer.param_groups
    assert groups is optimizer.base.param_groups and groups is optimizer.param_groups
    assert groups[0] is muon.param_groups[0] and groups[1] is adamw.param_groups[0]
    assert [group["base"] for group in groups] == [0, 1]
    assert set(optimizer.state) == set(problem.model.parameters()) and len(optimizer.state) == 4
    assert optimizer.state[problem.model[0].bias] is adamw.state[problem.model[0].bias]
    assert repr(muon) in repr(optimizer) and repr(adamw) in repr(optimizer)


def test_what_is_written_to_the_state_goes_to_its_holder():
    problem, optimizer = start(perturbation=None)
    weight, stranger = problem.model[0].weight, nn.Parameter(torch.zeros(2))
    state, muon = optimizer.state, optimizer.base[0]
    assert weight not in state and state.get(weight) is None and not state
    state[weight]["note"] = 1
    assert muon.state[weight] == {"note": 1} and repr(state) == repr(dict(muon.state))
    state[weight] = {"momentum_buffer": torch.ones_like(weight)}
    assert list(muon.state[weight]) == ["momentum_buffer"]
    del state[weight]
    assert not muon.state and state.pop(stranger, None) is None
    with pytest.raises(KeyError):
        state[stranger] = {}


def test_gradients_are_cleared():
    problem, optimizer = start(perturbation=None)
    problem.backward()
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in problem.model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("through", ["ours", "base", "the optimizer itself", "the list"])
def test_a_group_joins_the_optimizer_it_names(through):
    """It is the last one, so that the rates of a scheduler stay with their groups."""
    problem = mlp()
    first, second = problem.model[0], problem.model[2]
    bases = [
        muon_of([first.weight], lr=0.02),
        optim.AdamW([first.bias, second.bias], lr=0.01),
    ]
    optimizer = llqr.Optimizer(bases, problem.model, geometry=llqr_of("kfac"))
    train(optimizer, problem, 3)
    known, before = copy.deepcopy(optimizer.geometry.state()), second.weight.detach().clone()
    group = {"params": [second.weight], "lr": 0.5, "base": 0}
    if through == "ours":
        optimizer.add_param_group(group)
    elif through == "base":
        optimizer.base.add_param_group(group)
    elif through == "the list":
        optimizer.param_groups.append({**bases[0].defaults, **group})
    else:
        bases[0].add_param_group({"params": [second.weight], "lr": 0.5})
    assert [(g["base"], g["lr"]) for g in optimizer.param_groups] == [
        (0, 0.02),
        (1, 0.01),
        (0, 0.5),
    ]
    assert bases[0].param_groups[1] is optimizer.param_groups[2]
    train(optimizer, problem, 1)
    same(optimizer.geometry.state()["0.weight"], known["0.weight"])
    assert not torch.equal(second.weight, before)
    again, fresh = copy.deepcopy((problem, optimizer))
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    for p, o in ((problem, optimizer), (again, fresh)):
        train(o, p, 2)
    same(everything(fresh), everything(optimizer))


@pytest.mark.parametrize(
    "group, said",
    [
        ({}, r"base=None.*0 \(Muon\), 1 \(AdamW\)"),
        ({"base": 2}, "base=2"),
        ({"base": "Muon"}, "base='Muon'"),
        ({"base": 0, "params": "held"}, "'0.bias' is in groups 1 and 2"),
        ({"base": 1, "maximize": True}, "maximize"),
    ],
)
def test_a_bad_group_is_refused_and_nothing_changes(group, said):
    problem = mlp()
    bases = [muon_of(matrices(problem.model)), optim.AdamW([problem.model[0].bias])]
    optimizer = llqr.Optimizer(bases, problem.model, geometry=llqr_of(), perturbation=llqr.SAM())
    train(optimizer, problem, 2)
    before = everything(optimizer)
    held = group.get("params") == "held"
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({**group, "params": [problem.model[0 if held else 2].bias]})
    same(everything(optimizer), before)
    assert [len(base.param_groups) for base in bases] == [1, 1]
    train(optimizer, problem, 1)


def test_a_group_leaves_and_comes_back_through_the_list():
    problem, optimizer = start(perturbation=None)
    muon = optimizer.base[0]
    group = optimizer.param_groups.pop(0)
    before = weights(problem.model)
    train(optimizer, problem, 1)
    assert muon.param_groups == [] and torch.equal(before["0.weight"], problem.model[0].weight)
    optimizer.param_groups = [group, *optimizer.param_groups]
    assert muon.param_groups == [group] and optimizer.param_groups[0] is group
    train(optimizer, problem, 1)
    assert not torch.equal(before["0.weight"], problem.model[0].weight)
    copies = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups = copies
    assert [base.param_groups[0] for base in optimizer.base] == copies
    train(optimizer, problem, 1)
    optimizer.param_groups.append({"params": []})
    with pytest.raises(ValueError, match=r"param_groups: the group says base=None"):
        optimizer.step()


def test_two_lists_of_the_same_optimizers_do_not_move_groups():
    """The entry "base" is written anew; what an optimizer has stays with it."""
    problem, optimizer = start(perturbation=None)
    muon, adamw = optimizer.base
    other = llqr.Optimizer([adamw, muon], problem.model)
    for o in (optimizer, other, optimizer):
        train(o, problem, 1)
        assert o.param_groups == [group for base in o.base for group in base.param_groups]
        assert [group["base"] for group in o.param_groups] == [0, 1]
    held = optimizer.param_groups
    train(other, problem, 1)
    held.reverse()
    assert [group["base"] for group in optimizer.param_groups] == [1, 0]
    assert "momentum" in muon.param_groups[0] and "betas" in adamw.param_groups[0]


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_no_list_of_optimizers_is_refused():
    problem, other = mlp(), mlp()
    muon, adamw = muon_and_adamw(problem.model)
    for bases, error, said in (
        ([], ValueError, "at least one"),
        ([muon, None], TypeError, r"base\[1\].*NoneType"),
        ([muon, optim.LBFGS(rest(problem.model))], TypeError, r"base\[1\]: LBFGS"),
        ([muon, llqr.Optimizer(adamw, problem.model)], TypeError, r"base\[1\].*got Optimizer"),
        ([muon, llqr.Optimizer([adamw], problem.model).base], TypeError, "one flat list"),
        ({"a": muon}, TypeError, "optimizer or a list of them, got dict"),
        ([muon, adamw, optim.SGD([problem.model[2].bias])], ValueError, "'2.bias' is in groups 1"),
        ([adamw, muon, muon], ValueError, r"base\[2\]: Muon is in the list twice"),
        ([muon, optim.AdamW(rest(other.model))], ValueError, r"shape \(6,\) in group 1 is not"),
        ([muon, optim.AdamW(rest(problem.model), maximize=True)], ValueError, "maximize"),
    ):
        with pytest.raises(error, match=said):
            llqr.Optimizer(bases, problem.model)


# -- schedulers, hooks, scalers --------------------------------------------------------------------

SCHEDULERS = {
    "OneCycleLR": lambda o, **cycle: lrs.OneCycleLR(o, [0.3, 0.2], total_steps=8, **cycle),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=5),
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda t: 0.9**t, lambda t: 0.5**t]),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_each_groups_rate(name):
    """As on one SGD with as many groups; the momentum is cycled too, which both have."""
    problem, optimizer = start(muon_and_sgd, perturbation=llqr.SAM(0.1))
    groups = [{"params": matrices(problem.model), "lr": 0.02, "momentum": 0.95},
              {"params": rest(problem.model)}]  # fmt: skip
    plain = optim.SGD(groups, 0.1, 0.9)
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    seen = set()
    for _ in range(5):
        loss = train(optimizer, problem, 1)
        plain.step()
        for scheduler in (ours, theirs):
            scheduler.step(*(loss if name == "ReduceLROnPlateau" else []))
        rates, expected = (
            [(g["lr"], g["momentum"]) for g in o.param_groups] for o in (optimizer, plain)
        )
        assert rates == expected
        seen.add(tuple(rates))
    assert len(seen) > 1


def test_a_momentum_that_not_all_have_is_not_cycled():
    problem, optimizer = start(muon_and_adamw, perturbation=llqr.SAM(0.1))
    with pytest.raises(ValueError, match="momentum"):
        SCHEDULERS["OneCycleLR"](optimizer)
    scheduler = SCHEDULERS["OneCycleLR"](optimizer, cycle_momentum=False)
    train(optimizer, problem, 1)
    scheduler.step()
    assert set(optimizer.defaults) == {"lr", "weight_decay", "eps"}


def test_a_scheduler_on_one_of_them():
    problem, optimizer = start(perturbation=llqr.SAM(0.1))
    scheduler = lrs.StepLR(optimizer.base[1], 1)
    train(optimizer, problem, 1)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, pytest.approx(0.001)]


@pytest.mark.parametrize("way", WAYS)
def test_hooks_fire_once_a_step(way):
    problem, optimizer = start()
    muon, adamw = optimizer.base
    seen = []
    for o in (optimizer, optimizer.base, muon, adamw):
        o.register_step_pre_hook(lambda o, *_: seen.append(o))
    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(("any", o)))
    try:
        train(optimizer, problem, 2, way)
    finally:
        handle.remove()
    assert seen == [optimizer, optimizer.base, muon, adamw, ("any", optimizer)] * 2


def test_a_closure_of_the_base():
    problem, optimizer = start(perturbation=None)
    before = weights(problem.model)
    assert optimizer.base.step(problem.backward) is not None
    assert all(not torch.equal(p, before[n]) for n, p in problem.model.named_parameters())


def test_hooks_of_state_dicts():
    problem, optimizer = start(steps=1)
    seen = []
    for o in (optimizer.base, *optimizer.base):
        o.register_state_dict_pre_hook(lambda o: seen.append(("save", o)))
        o.register_load_state_dict_post_hook(lambda o: seen.append(("load", o)))
    state, (muon, adamw) = optimizer.state_dict(), optimizer.base
    assert seen == [("save", optimizer.base), ("save", muon), ("save", adamw)]
    optimizer.load_state_dict(state)
    assert seen[-3:] == [("load", muon), ("load", adamw), ("load", optimizer.base)]


@pytest.mark.parametrize("form", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("way", SCALED_WAYS)
def test_a_scaler(way, form):
    """Scaled by a power of two, the steps are those without; after an infinity nothing moves."""
    ends = []
    for scaler in (scaler_of(), scaler_of(1.0)):
        problem, optimizer = start(
            lambda model: muon_and_adamw(model, **form), perturbation=llqr.SAM(0.1)
        )
        for _ in range(3):
            SCALED_WAYS[way](optimizer, problem, scaler)
        ends.append(weights(problem.model))
    same(*ends)
    poisoned(problem, {1}, float("inf"))
    before = everything(optimizer)
    SCALED_WAYS[way](optimizer, problem, scaler)
    same(everything(optimizer), before)
    assert scaler.get_scale() == 0.5


# -- checkpoints and copies ------------------------------------------------------------------------


def lookahead_and_sgd(model):
    return [Lookahead(optim.SGD(matrices(model), 0.1, 0.9)), optim.SGD(rest(model), 0.1, 0.9)]


def two_that_count(model):
    return [Counting(matrices(model)), Counting(rest(model))]


FORMS = {**PAIRS, "Lookahead, SGD": lookahead_and_sgd, "Counting twice": two_that_count}


@pytest.mark.parametrize("options", ["all", "nothing"])
@pytest.mark.parametrize("pair", FORMS)
def test_resume_is_bitwise(pair, options):
    """Also if one of them saves another form than torch's, or entries of no parameter."""
    chosen = {"perturbation": None} if options == "nothing" else {}
    problem, optimizer = start(FORMS[pair], steps=3, **chosen)
    state = through_file([problem.model.state_dict(), optimizer.state_dict()])
    assert ("llqr.base" in state[1]) is (pair not in PAIRS)
    again, fresh = start(FORMS[pair], **chosen)
    again.model.load_state_dict(state[0])
    fresh.load_state_dict(state[1])
    assert fresh.param_groups[1] is fresh.base[1].param_groups[0]
    for p, o in ((problem, optimizer), (again, fresh)):
        train(o, p, 3)
    same(everything(fresh), everything(optimizer))


def test_the_state_dict_has_torchs_form():
    """That of one optimizer with all groups: numbers count on from group to group."""
    problem, optimizer = start(steps=2, perturbation=None)
    state, (muon, adamw) = optimizer.base.state_dict(), optimizer.base
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    theirs = [*muon.state_dict()["state"].values(), *adamw.state_dict()["state"].values()]
    same(state["state"], dict(enumerate(theirs)))


def test_the_states_of_separate_optimizers_load():
    """From a run without this library, which saved one state dict each."""
    plain = mlp()
    bases = muon_and_adamw(plain.model)
    plain.backward()
    stepped_by_hand(plain, bases).step()
    problem, optimizer = start(perturbation=llqr.SAM(0.1))
    problem.model.load_state_dict(plain.model.state_dict())
    states = [base.state_dict() for base in bases]
    optimizer.base.load_state_dict(through_file(states))
    for mine, theirs in zip(optimizer.base, bases, strict=True):
        same(list(mine.state.values()), list(theirs.state.values()))
    optimizer.base[0].load_state_dict(through_file(states[0]))
    optimizer.minimize(problem)
    sam_step(stepped_by_hand(plain, bases), plain.backward, 0.1)
    same(weights(problem.model), weights(plain.model))


MISFITS = {
    "order": r"group 0 belongs to optimizer 1 of the list, here to optimizer 0 \(Muon\)",
    "groups": "parameter groups of sizes",
    "sizes": "parameter groups of sizes",
    "count": "the states of 1 optimizers, expected 2",
    "refusal": "the second will not",
}


@pytest.mark.parametrize("wrong", MISFITS)
def test_a_state_that_does_not_fit_changes_nothing(wrong):
    problem, optimizer = start(steps=3)
    state, load = copy.deepcopy(optimizer.state_dict()), optimizer.load_state_dict
    if wrong == "order":
        for group in state["param_groups"]:
            group["base"] = 1 - group["base"]
    elif wrong == "groups":
        del state["param_groups"][1]
    elif wrong == "sizes":
        state["param_groups"][1]["params"].pop()
    elif wrong == "count":
        state, load = [optimizer.base[0].state_dict()], optimizer.base.load_state_dict
    else:

        def refuse(*_):
            raise ValueError("the second will not")

        optimizer.base[1].register_load_state_dict_pre_hook(refuse)
    train(optimizer, problem, 1)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=MISFITS[wrong]):
        load(state)
    same(everything(optimizer), before)
    train(optimizer, problem, 1)


@pytest.mark.parametrize("through", ["ours", "base"])
@pytest.mark.parametrize("options", [{}, {"geometry": None}])
def test_optimizers_in_another_order_are_told_apart_by_their_options(options, through):
    """Where the groups are as large, before the state of one is another's."""
    _, optimizer = start(steps=2, **options)
    problem, other = start(lambda model: muon_and_adamw(model)[::-1], **options)
    receiver, sender = (other, optimizer) if through == "ours" else (other.base, optimizer.base)
    before = everything(other)
    said = r"group 0 has the options of optimizer 1 \(Muon\), here it belongs to optimizer 0 \(Ad"
    with pytest.raises(ValueError, match=said):
        receiver.load_state_dict(sender.state_dict())
    same(everything(other), before)
    train(other, problem, 1)


@pytest.mark.parametrize("kind", [lambda ps: optim.SGD(ps, 0.1, 0.9), Counting])
def test_two_of_one_kind_in_another_order_are_told_apart_by_the_names(kind):
    """Neither options nor sizes tell; a saved name that is not here, of another model, may be."""

    def in_order(model):
        return [kind(matrices(model)), kind(rest(model))]

    _, optimizer = start(in_order, steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    problem, other = start(lambda model: in_order(model)[::-1])
    before = everything(other)
    said = "group 0 has the state of '0.weight', which optimizer 1 .* not optimizer 0; give the opt"
    with pytest.raises(ValueError, match=said):
        other.load_state_dict(state)
    same(everything(other), before)
    for group in state["param_groups"]:
        group["llqr.names"] = group["llqr.names"].replace("0.", "first.")
    start(in_order)[1].load_state_dict(state)
    for group in state["param_groups"]:
        del group["llqr.names"]  # as saved by earlier versions
    start(in_order)[1].load_state_dict(state)


def test_an_option_that_the_saved_state_lacks_is_no_other_optimizer():
    """As of an older torch: it stays as it is."""
    problem, optimizer = start(steps=1)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["nesterov"]
    optimizer.base.check_saved_groups(state["param_groups"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("pair", ["Muon, AdamW", "Counting twice"])
def test_copies_go_on_the_same(pair, how):
    problem, optimizer = start(FORMS[pair], steps=2)
    again, fresh = how((problem, optimizer))
    assert fresh.param_groups[0] is fresh.base[0].param_groups[0]
    train(fresh, again, 2)
    train(optimizer, problem, 2)
    same(everything(fresh), everything(optimizer))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("steps", [0, 3])
@each_pair
def test_distributed_checkpoint(pair, steps, tmp_path):
    problem, optimizer = start(pair, norm_net, steps=steps)
    model, state = get_state_dict(problem.model, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path)
    again, fresh = start(pair, norm_net)
    model, state = get_state_dict(again.model, fresh)
    template = {"model": model, "optimizer": state}
    dcp.load(template, checkpoint_id=tmp_path)
    set_state_dict(
        again.model,
        fresh,
        model_state_dict=template["model"],
        optim_state_dict=template["optimizer"],
    )
    for p, o in ((problem, optimizer), (again, fresh)):
        train(o, p, 3)
    same(everything(fresh), everything(optimizer))


def test_training_learns_and_keeps_the_parameters_dtype():
    for dtype in (F64, torch.float32, torch.bfloat16):
        problem, optimizer = start(make=lambda dtype=dtype: mlp(dtype))
        losses = train(optimizer, problem, 15)
        assert losses[-1] < losses[0]
        assert {p.dtype for p in problem.model.parameters()} == {dtype}
