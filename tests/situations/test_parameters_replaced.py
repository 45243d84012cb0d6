"""Parameters that are replaced, renamed, moved or resized during a training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import llqr
from tables import PERTURBATIONS
from tiny import F64, STRUCTURES, Problem, gradients, llqr_of, mlp, optimizer_of, same, sgd, train

NEW = "parameters were replaced"


def put(optimizer, group, position, new):
    """Put a parameter in a group's list, as people do it, and drop the old one's state."""
    old = optimizer.param_groups[group]["params"][position]
    optimizer.param_groups[group]["params"][position] = new
    optimizer.state.pop(old, None)


def grown(problem, rows=8):
    """The first layer of the network with more rows, and the second with as many columns."""
    first, last = nn.Linear(5, rows).to(F64), nn.Linear(rows, 3).to(F64)
    problem.model[0], problem.model[2] = first, last
    return [*first.parameters(), *last.parameters()]


class TestTheNewTensorIsTrained:
    @pytest.mark.parametrize("perturbation", PERTURBATIONS)
    def test_as_by_the_base(self, perturbation):
        """At a radius of 1e-12 the wrapper is the base, before and after an embedding grows."""
        ends = []
        for wrapped in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 3)).to(F64)
            groups = [{"params": [model[0].weight]}, {"params": model[2].parameters()}]
            base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            probe = PERTURBATIONS[perturbation]()
            if probe is not None:
                probe.rho = 1e-12
            if perturbation == "LookSAM":
                probe.alpha = 0.0  # what it adds between probes does not shrink with rho
            optimizer = optimizer_of(Problem(model, None, None), base, perturbation=probe)
            problem = Problem(model, torch.randint(10, (16, 2)), torch.randint(3, (16,)))
            new = nn.Parameter(torch.cat([model[0].weight.detach(), torch.randn(2, 4, dtype=F64)]))

            def step(problem=problem, base=base, optimizer=optimizer, wrapped=wrapped):
                if wrapped:
                    optimizer.minimize(problem)
                else:
                    base.zero_grad()
                    problem.backward()
                    base.step()

            step()
            put(base, 0, 0, new)
            model[0].weight = new
            problem.x = torch.randint(12, (16, 2))
            if wrapped and perturbation in ("FriendlySAM", "LookSAM"):
                with pytest.warns(UserWarning, match=NEW):
                    step()
            else:
                step()
            step()
            ends.append(copy.deepcopy(model.state_dict()))
        torch.testing.assert_close(*ends, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_with_a_metric_all_at_once(self, structure):
        """As when splats are added: every tensor is a new one, and their number is the same."""
        problem = mlp()
        optimizer = optimizer_of(
            problem, geometry=llqr_of(structure), perturbation=llqr.FriendlySAM(0.1)
        )
        train(optimizer, problem, 3)
        optimizer.param_groups[0]["params"] = grown(problem)
        optimizer.state.clear()
        g = problem.gradient()
        with pytest.warns(UserWarning, match=f"{NEW}.*'0.weight', '0.bias', '2.weight', ..."):
            assert optimizer.needs_second_pass
        same(optimizer.geometry.apply(g), g)
        zero = {n: {"memory": torch.zeros_like(x)} for n, x in g.items()}
        same(optimizer.perturbation.state(), zero)
        start = problem.model[0].weight.detach().clone()
        train(optimizer, problem, 3)
        assert not torch.equal(problem.model[0].weight, start)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def test_it_is_said_once(self):
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr_of())
        train(optimizer, problem, 1)
        for rows in (7, 8):
            optimizer.param_groups[0]["params"] = grown(problem, rows)
            if rows == 7:
                with pytest.warns(UserWarning, match=NEW):
                    train(optimizer, problem, 1)
            train(optimizer, problem, 1)

    def test_in_the_same_shape_it_is_a_new_parameter_too(self):
        """A head that starts anew gets the identity and a memory of zero; the rest stays."""
        problem = mlp()
        optimizer = optimizer_of(
            problem, geometry=llqr_of("kfac"), perturbation=llqr.FriendlySAM(0.1)
        )
        train(optimizer, problem, 3)
        known, memory = copy.deepcopy((optimizer.geometry.state(), optimizer.perturbation.state()))
        head = nn.Parameter(torch.randn(3, 6, dtype=F64))
        put(optimizer, 0, 2, head)
        problem.model[2].weight = head
        with pytest.warns(UserWarning, match="'2.weight'"):
            assert optimizer.needs_second_pass
        g = {"2.weight": problem.gradient()["2.weight"]}
        same(optimizer.geometry.apply(g), g)
        assert not optimizer.perturbation.state()["2.weight"]["memory"].any()
        for name in ("0.weight", "0.bias", "2.bias"):
            same(optimizer.geometry.state()[name], known[name])
            same(optimizer.perturbation.state()[name], memory[name])
        train(optimizer, problem, 2)

    @pytest.mark.parametrize("replaced", ["weight", "bias"])
    def test_a_block_that_it_shares_starts_anew(self, replaced):
        """A dense block couples weight and bias: half of it means nothing."""
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr_of("dense"))
        train(optimizer, problem, 3)
        new = nn.Parameter(getattr(problem.model[0], replaced).detach().clone())
        put(optimizer, 0, ["weight", "bias"].index(replaced), new)
        setattr(problem.model[0], replaced, new)
        with pytest.warns(UserWarning, match="anew"):
            train_nothing(optimizer)
        g = problem.gradient()
        moved = optimizer.geometry.apply(g)
        same(
            {n: moved[n] for n in ("0.weight", "0.bias")}, {n: g[n] for n in ("0.weight", "0.bias")}
        )
        assert not torch.equal(moved["2.weight"], g["2.weight"])

    def test_a_parameter_that_changes_its_shape_in_place(self):
        """Pruning by ``p.data = p.data[kept]`` keeps the tensor and changes its shape."""
        problem = mlp()
        optimizer = optimizer_of(
            problem, sgd(problem), geometry=llqr_of("kfac"), perturbation=llqr.FriendlySAM(0.1)
        )
        train(optimizer, problem, 3)
        first, last = problem.model[0], problem.model[2]
        for p, kept in ((first.weight, [4, 5]), (first.bias, [4]), (last.weight, [3, 4])):
            p.data = p.data[tuple(map(slice, kept))].clone()
            p.grad = None
        g = problem.gradient()
        moved, kept = optimizer.geometry.apply(g), g.pop("2.bias")
        assert not torch.equal(moved.pop("2.bias"), kept)  # the only one that is as it was
        same(moved, g)
        losses = train(optimizer, problem, 8)
        assert losses[-1] < losses[0]
        assert optimizer.perturbation.state()["0.bias"]["memory"].shape == (4,)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def train_nothing(optimizer):
    """Let the optimizer look at its parameters."""
    _ = optimizer.needs_second_pass


class TestTheSameTensorKeepsWhatIsKnownOfIt:
    def learned(self, structure="kfac"):
        problem = mlp()
        base = torch.optim.SGD(problem.model[0].parameters(), lr=0.1, momentum=0.9)
        optimizer = optimizer_of(
            problem, base, geometry=llqr_of(structure), perturbation=llqr.FriendlySAM(0.1)
        )
        train(optimizer, problem, 3)
        return problem, optimizer, optimizer.geometry.apply(problem.gradient_of("0"))

    @pytest.fixture(autouse=True)
    def gradient_by_layer(self, monkeypatch):
        def gradient_of(problem, layer):
            g = problem.gradient()
            return {n: x for n, x in g.items() if n.startswith(layer)}

        monkeypatch.setattr(Problem, "gradient_of", gradient_of, raising=False)

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_pruned_by_a_mask_and_then_a_group_joins(self, structure):
        """torch.nn.utils.prune moves "weight" to "weight_orig": another name and place."""
        problem, optimizer, moved = self.learned(structure)
        prune.custom_from_mask(problem.model[0], "weight", torch.ones(6, 5, dtype=F64))
        group = {"params": list(problem.model[2].parameters())}
        g = problem.gradient_of("0")
        if structure in ("scalar", "dense"):  # one block, whose parameters change their order
            with pytest.warns(UserWarning, match="anew at the identity .0.weight_orig"):
                optimizer.add_param_group(group)
            same(optimizer.geometry.apply(g), g)
        else:
            optimizer.add_param_group(group)
            now = optimizer.geometry.apply(g)
            torch.testing.assert_close(now["0.weight_orig"], moved["0.weight"])
            torch.testing.assert_close(now["0.bias"], moved["0.bias"])
        assert optimizer.perturbation.state()["0.weight_orig"]["memory"].any()
        train(optimizer, problem, 2)
        prune.remove(problem.model[0], "weight")

    def test_a_layer_is_wrapped_by_another(self):
        problem, optimizer, moved = self.learned()
        problem.model[0] = nn.Sequential(problem.model[0], nn.Identity())
        train_nothing(optimizer)
        now = optimizer.geometry.apply(problem.gradient_of("0"))
        same(list(now.values()), list(moved.values()))
        assert list(now) == ["0.0.weight", "0.0.bias"]

    def test_a_parametrization_is_put_on(self):
        problem, optimizer, moved = self.learned()
        parametrize.register_parametrization(problem.model[0], "weight", nn.Identity())
        train_nothing(optimizer)
        now = optimizer.geometry.apply(problem.gradient_of("0"))
        same(now["0.parametrizations.weight.original"], moved["0.weight"])
        train(optimizer, problem, 2)

    def test_a_weight_moves_between_groups(self):
        """Its radius is that of its new group."""
        problem, optimizer, moved = self.learned()
        weight = optimizer.param_groups[0]["params"].pop(0)
        optimizer.base.add_param_group({"params": [weight], "rho": 0.0})
        start = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        for i in optimizer.passes():
            problem.backward()
            if i:
                assert torch.equal(problem.model[0].weight, start["0.weight"])
                assert not torch.equal(problem.model[0].bias, start["0.bias"])
        now = optimizer.geometry.apply(problem.gradient_of("0"))
        same(list(now.values()), list(moved.values()))

    def test_it_moves_between_groups_whose_sizes_stay(self):
        problem, optimizer, _ = self.learned()
        optimizer.base.add_param_group({"params": list(problem.model[2].parameters()), "rho": 0.0})
        train_nothing(optimizer)
        a, b = (group["params"] for group in optimizer.param_groups)
        a[0], b[0] = b[0], a[0]
        start = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        for i in optimizer.passes():
            problem.backward()
            if i:
                moved = {n for n, p in problem.model.named_parameters() if p.ne(start[n]).any()}
        assert moved == {"0.bias", "2.weight"}

    def test_a_group_loses_a_parameter_and_the_model_too(self):
        problem, optimizer, _ = self.learned()
        optimizer.param_groups[0]["params"].pop(1)
        optimizer.state.pop(problem.model[0].bias)
        problem.model[0].bias = None
        known = optimizer.geometry.state()["0.weight"]
        train_nothing(optimizer)
        same(optimizer.geometry.state()["0.weight"], known)
        assert list(optimizer.geometry.state()) == ["0.weight"]
        train(optimizer, problem, 2)


class TestHalfAChangeIsNamed:
    def start(self):
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr_of(), perturbation=llqr.FriendlySAM(0.1))
        train(optimizer, problem, 2)
        return problem, optimizer

    def uses(self, optimizer, problem):
        return (
            lambda: optimizer.minimize(problem),
            lambda: optimizer.refresh(problem),
            optimizer.step,
            optimizer.state_dict,
            lambda: train_nothing(optimizer),
        )

    def test_in_the_model_alone(self):
        problem, optimizer = self.start()
        problem.model[2] = nn.Linear(6, 3).to(F64)
        for use in self.uses(optimizer, problem):
            with pytest.raises(ValueError, match=r"holds the old '2.weight'.*param_groups\[0"):
                use()
        optimizer.param_groups[0]["params"][2:] = problem.model[2].parameters()
        optimizer.state.clear()
        with pytest.warns(UserWarning, match=NEW):
            train(optimizer, problem, 2)

    def test_in_the_base_alone(self):
        problem, optimizer = self.start()
        new = nn.Parameter(torch.zeros(3, 6, dtype=F64))
        put(optimizer, 0, 2, new)
        for use in self.uses(optimizer, problem):
            with pytest.raises(
                ValueError, match=r"shape \(3, 6\).*still has '2.weight'.*model too"
            ):
                use()
        problem.model[2].weight = new
        with pytest.warns(UserWarning, match=NEW):
            train(optimizer, problem, 2)

    @pytest.mark.parametrize("place", ["o", "e"])
    def test_tied_weights_that_are_replaced_at_one_place(self, place):
        model = nn.ModuleDict({"e": nn.Embedding(6, 4), "o": nn.Linear(4, 6, bias=False)}).to(F64)
        model["o"].weight = model["e"].weight
        index = torch.arange(6)

        def forward():
            z = model["o"](model["e"](index).tanh())
            return F.cross_entropy(z, index), z

        optimizer = llqr.Optimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=llqr.SAM(0.05)
        )
        optimizer.minimize(forward)
        tied = model[place].weight
        model[place].weight = new = nn.Parameter(tied.detach().clone())
        with pytest.raises(ValueError, match=f"'{place}.weight' was tied to"):
            optimizer.minimize(forward)
        new.requires_grad_(False)
        optimizer.minimize(forward)
        new.requires_grad_(True)
        optimizer.add_param_group({"params": [new]})
        optimizer.minimize(forward)
        assert not torch.equal(new, tied)

    def test_weights_that_are_tied_later(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).to(F64)
        optimizer = optimizer_of(Problem(model, None, None), llqr_base(model))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match="'1.weight'"):
            optimizer.step()

    def test_a_layer_that_left_the_model(self):
        problem, optimizer = self.start()
        problem.model[0].bias = None
        with pytest.raises(ValueError, match="'0.bias', which the model no longer has: take"):
            optimizer.step()

    def test_the_old_ones_state_left_in_the_base(self):
        """torch raises a KeyError with a number for it."""
        problem = mlp()
        base = sgd(problem, momentum=0.9)
        optimizer = optimizer_of(problem, base, perturbation=llqr.SAM(0.1))
        train(optimizer, problem, 1)
        optimizer.param_groups[0]["params"] = grown(problem)
        train(optimizer, problem, 1)
        with pytest.raises(RuntimeError, match=r"state of a parameter.*state.pop"):
            optimizer.state_dict()

    def test_a_metric_that_does_not_fit_any_more_is_named_at_each_use(self):
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr.FixedGeometry(torch.eye(57, dtype=F64)))
        optimizer.param_groups[0]["params"] = grown(problem)
        for _ in range(2):
            with pytest.raises(ValueError, match="U: expected shape"):
                optimizer.minimize(problem)

    @pytest.mark.parametrize("perturbation", [llqr.FriendlySAM, llqr.SAM])
    def test_another_model_is_not_a_replaced_parameter(self, perturbation):
        probe = perturbation(0.1)
        problem = mlp()
        train(optimizer_of(problem, perturbation=probe), problem, 1)
        if perturbation is llqr.SAM:
            optimizer_of(mlp(), perturbation=probe)
        else:
            with pytest.raises(ValueError, match="another '0.weight'; make a new one"):
                optimizer_of(mlp(), perturbation=probe)


def llqr_base(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


class TestBetweenThePasses:
    def test_a_copy_sees_what_is_changed_in_the_copy(self):
        problem = mlp()
        optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM(0.1))
        train(optimizer, problem, 2)
        again, fresh = copy.deepcopy((problem, optimizer))
        again.model[2] = nn.Linear(6, 3).to(F64)
        with pytest.raises(ValueError, match="'2.weight'"):
            fresh.step()
        train(optimizer, problem, 1)

    def test_a_head_that_is_replaced_after_the_backward(self):
        """The new tensor has no gradient yet: it waits, and nothing of the old one reaches it."""
        problem = mlp()
        optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM(0.1))
        for _ in optimizer.passes():
            problem.backward()
        head = nn.Parameter(torch.randn(3, 6, dtype=F64))
        put(optimizer, 0, 2, head)
        problem.model[2].weight = head
        start = head.detach().clone()
        with pytest.warns(UserWarning, match=NEW):
            optimizer.step()
        same(head.detach(), start)
        assert gradients(problem.model)["2.weight"] is None
        assert not optimizer.perturbation.state()["2.weight"]["memory"].any()
        assert optimizer.perturbation.state()["2.bias"]["memory"].any()

    def test_a_loss_of_a_forward_that_swaps_parameters_for_a_moment(self):
        """functional_call puts other tensors in the model's tables and takes them out again."""
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr_of(), perturbation=llqr.SAM(0.1))

        def forward():
            weights = {n: 1.0 * p for n, p in problem.model.named_parameters()}
            z = torch.func.functional_call(problem.model, weights, problem.x)
            return F.cross_entropy(z, problem.y), z

        losses = [float(optimizer.minimize(forward, refresh=problem)) for _ in range(3)]
        assert losses[-1] < losses[0]
