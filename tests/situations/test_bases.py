"""Bases of people's own: states in a form of their own, containers, hooks on all optimizers."""

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import llqr
from tiny import (
    F64,
    WAYS,
    Problem,
    everything,
    llqr_of,
    mlp,
    optimizer_of,
    same,
    sgd,
    through_file,
    train,
    train_plainly,
    weights,
)


class Lookahead(torch.optim.Optimizer):
    """Around another optimizer; saves {"slow": ..., "fast": ...}, and no "state"."""

    def __init__(self, fast, every=2):
        self.fast, self.every, self.count = fast, every, 0
        self.defaults = fast.defaults
        self.state = defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        for p in self.parameters():
            self.state[p]["slow"] = p.detach().clone()

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def param_groups(self):
        return self.fast.param_groups

    def state_dict(self):
        slow = [self.state[p]["slow"] for p in self.parameters()]
        return {"slow": slow, "count": self.count, "fast": self.fast.state_dict()}

    def load_state_dict(self, state):
        self.fast.load_state_dict(state["fast"])
        self.count = state["count"]
        for p, slow in zip(self.parameters(), state["slow"], strict=True):
            self.state[p]["slow"] = slow.clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.fast.step()
        self.count += 1
        if self.count % self.every == 0:
            for p in self.parameters():
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class Pair(torch.optim.Optimizer):
    """One optimizer for matrices and another for the rest; saves a list of both states."""

    def __init__(self, model):
        ps = list(model.parameters())
        self.parts = [
            torch.optim.SGD([p for p in ps if p.dim() > 1], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in ps if p.dim() < 2], lr=0.01),
        ]
        super().__init__([p for part in self.parts for p in part.param_groups[0]["params"]], {})

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups):
        pass

    @property
    def state(self):
        return {p: s for part in self.parts for p, s in part.state.items()}

    @state.setter
    def state(self, state):
        pass

    def add_param_group(self, group):
        pass

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()


class Counting(torch.optim.SGD):
    """Keeps a counter of its own among the states of parameters, as MADGRAD does."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        self.state["k"] = torch.tensor([0])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1 / (1 + float(self.state["k"]))
        super().step(closure)
        self.state["k"] += 1


class Plain(torch.optim.SGD):
    """Keeps a mere number there."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        self.state["steps"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.state["steps"] += 1


class Averaging(torch.optim.SGD):
    """Evaluates the average of its steps, and trains elsewhere, as schedule-free ones do."""

    def __init__(self, params):
        super().__init__([{"params": list(params), "trains": True, "count": 0}], lr=0.1)

    def _swap(self, trains):
        for group in self.param_groups:
            if group["trains"] is not trains:
                group["trains"] = trains
                for p in group["params"]:
                    if "other" in self.state[p]:
                        other = self.state[p]["other"].clone()
                        self.state[p]["other"].copy_(p.data)
                        p.data.copy_(other)

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        assert all(group["trains"] for group in self.param_groups)
        super().step()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                average = self.state[p].setdefault("other", p.detach().clone())
                average.lerp_(p, 1 / group["count"])


BASES = {
    "Lookahead": lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "Pair": Pair,
    "a tensor": lambda model: Counting(model.parameters()),
    "a number": lambda model: Plain(model.parameters()),
}


def start(base, **options):
    problem = mlp()
    options = options or {"geometry": llqr_of("kfac"), "perturbation": llqr.FriendlySAM(0.1)}
    return problem, optimizer_of(problem, BASES[base](problem.model), **options)


class TestStatesOfAnyForm:
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("options", ["all", "nothing"])
    def test_resume_is_bitwise(self, base, options):
        chosen = {"graft": False} if options == "nothing" else {}
        problem, optimizer = start(base, **chosen)
        train(optimizer, problem, 3)
        state = through_file([problem.model.state_dict(), optimizer.state_dict()])
        again, fresh = start(base, **chosen)
        again.model.load_state_dict(state[0])
        fresh.load_state_dict(state[1])
        train(optimizer, problem, 3)
        train(fresh, again, 3)
        same(weights(again.model), weights(problem.model))
        same(fresh.base.state_dict(), optimizer.base.state_dict())

    @pytest.mark.parametrize("base", BASES)
    def test_the_state_of_the_base_alone_loads(self, base):
        plain = mlp()
        alone = BASES[base](plain.model)
        plain.backward()
        alone.step()
        problem, optimizer = start(base)
        before = copy.deepcopy(optimizer.geometry.state())
        with pytest.warns(UserWarning, match="plain optimizer"):
            optimizer.load_state_dict(through_file({"it": alone.state_dict()})["it"])
        same(optimizer.base.state_dict(), alone.state_dict())
        same(optimizer.geometry.state(), before)

    @pytest.mark.parametrize("base", ["Lookahead", "Pair"])
    def test_without_the_entry_of_its_own_it_is_refused(self, base):
        """torch.distributed.checkpoint keeps "state" and "param_groups" only."""
        problem, optimizer = start(base)
        train(optimizer, problem, 3)
        kept = {k: optimizer.state_dict()[k] for k in ("state", "param_groups")}
        again, fresh = start(base)
        train(fresh, again, 1)
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=f"no 'llqr.base'.*{base}.*torch.save"):
            fresh.load_state_dict(kept)
        same(fresh.state_dict(), before)

    def test_a_state_of_no_form_is_refused(self):
        problem = mlp()
        optimizer = optimizer_of(problem)
        for wrong in ({"model": problem.model.state_dict()}, [optimizer.state_dict()], {}):
            with pytest.raises(ValueError, match=r"expected the keys 'state' and 'param_groups'"):
                optimizer.load_state_dict(wrong)

    def test_when_a_base_of_its_own_form_refuses_nothing_changes(self):
        problem, optimizer = start("Lookahead")
        train(optimizer, problem, 3)
        state = copy.deepcopy(optimizer.state_dict())
        del state["llqr.base"]["count"]
        again, fresh = start("Lookahead")
        train(fresh, again, 2)
        before = copy.deepcopy((fresh.geometry.state(), fresh.geometry.counters()))
        with pytest.raises(KeyError):
            fresh.load_state_dict(state)
        same((fresh.geometry.state(), fresh.geometry.counters()), before)

    def test_an_optimizer_that_lacks_what_all_have_is_refused_at_once(self):
        class Shell(torch.optim.Optimizer):
            def __init__(self, inner):
                self.inner = inner
                self.param_groups = inner.param_groups

        problem = mlp()
        with pytest.raises(TypeError, match="base: Shell has no 'state'.*super"):
            llqr.Optimizer(Shell(sgd(problem)), problem.model)


@pytest.mark.parametrize("option", ["maximize", "capturable", "differentiable"])
def test_an_option_that_a_base_keeps_on_itself_is_refused(option):
    """pytorch_optimizer's keep maximize there and not in their groups."""
    problem = mlp()
    base = sgd(problem)
    setattr(base, option, True)
    for bases in (base, [base]):
        with pytest.raises(ValueError, match=f"base: {option}=True is not supported"):
            llqr.Optimizer(bases, problem.model)


class TestWeightsForEvaluation:
    """Bases that train the weights elsewhere than they evaluate them."""

    @pytest.mark.parametrize("several", [False, True])
    def test_they_are_there_between_eval_and_train(self, several):
        problem, seen = mlp(), []
        held = list(problem.model.parameters())
        base = [sgd_of(held[:1]), Averaging(held[1:])] if several else Averaging(held)
        optimizer = llqr.Optimizer(base, problem.model, perturbation=llqr.SAM(0.1))
        for _ in range(4):
            train(optimizer, problem, 1)
            seen.append(weights(problem.model))
        optimizer.eval()
        average = torch.stack([w["2.weight"] for w in seen]).mean(0)
        torch.testing.assert_close(problem.model[2].weight.detach(), average)
        assert torch.equal(problem.model[0].weight, seen[-1]["0.weight"]) is several
        optimizer.train()
        same(weights(problem.model), seen[-1])

    def test_not_within_a_perturbed_pass(self):
        problem = mlp()
        optimizer = optimizer_of(
            problem, Averaging(problem.model.parameters()), perturbation=llqr.SAM(0.1)
        )
        train(optimizer, problem, 2)
        for i in optimizer.passes():
            optimizer.train()
            problem.backward()
            if i:
                with pytest.raises(RuntimeError, match="eval: called within a perturbed pass"):
                    optimizer.eval()
        optimizer.step()

    def test_for_other_bases_nothing_happens(self):
        problem = mlp()
        optimizer = optimizer_of(problem)
        before = everything(optimizer)
        optimizer.eval()
        optimizer.train()
        same(everything(optimizer), before)


def sgd_of(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class TestAnotherSetOfPartsLoads:
    """A run that gets a metric, or another probe, half-way: what is new starts anew, said once."""

    OPTIONS = {
        "none": dict,
        "SAM": lambda: {"perturbation": llqr.SAM(0.1)},
        "FriendlySAM": lambda: {"perturbation": llqr.FriendlySAM(0.1)},
        "LLQR": lambda: {"geometry": llqr_of("kfac")},
        "all": lambda: {"geometry": llqr_of("kfac"), "perturbation": llqr.FriendlySAM(0.1)},
    }

    def make(self, parts):
        problem = mlp()
        return problem, optimizer_of(problem, sgd(problem, momentum=0.9), **self.OPTIONS[parts]())

    @pytest.mark.parametrize("receiver", ["new", "used"])
    @pytest.mark.parametrize(
        ("saved", "mine", "named"),
        [
            ("none", "LLQR", "geometry"),
            ("SAM", "LLQR", "geometry"),
            ("SAM", "FriendlySAM", "perturbation"),
            ("LLQR", "all", "perturbation"),
            ("FriendlySAM", "all", "geometry"),
            ("SAM", "all", "geometry and a perturbation"),
        ],
    )
    def test_it_starts_anew(self, saved, mine, named, receiver):
        problem, optimizer = self.make(saved)
        train(optimizer, problem, 3)
        state = through_file([problem.model.state_dict(), optimizer.state_dict()])
        again, other = self.make(mine)
        blank = copy.deepcopy(
            [part and part.state() for part in (other.geometry, other.perturbation)]
        )
        if receiver == "used":
            train(other, again, 2)
        again.model.load_state_dict(state[0])
        with pytest.warns(UserWarning, match=f"without a {named} that") as said:
            other.load_state_dict(state[1])
        assert len(said) == 1
        if "geometry" in named:
            same(other.geometry.state(), blank[0])
            assert other.refresh_due and other.geometry.counters()["refreshes"] == 0
        else:
            mine, theirs = (o.geometry and o.geometry.state() for o in (other, optimizer))
            same(mine, theirs)
        if "perturbation" in named:
            same(other.perturbation.state(), blank[1])
        assert other._progress.step == 3
        same(other.base.state_dict()["state"], optimizer.base.state_dict()["state"])
        losses = train(other, again, 8)
        assert losses[-1] < losses[0]

    def test_when_the_base_refuses_nothing_starts_anew(self):
        problem, optimizer = self.make("SAM")
        train(optimizer, problem, 3)
        again, other = self.make("all")
        train(other, again, 3)
        before = everything(other)

        def refuse(*_):
            raise RuntimeError("no")

        other.base.register_load_state_dict_pre_hook(refuse)
        with pytest.warns(UserWarning, match="anew"), pytest.raises(RuntimeError, match="no"):
            other.load_state_dict(optimizer.state_dict())
        same(everything(other), before)


class TestHooksOfAllOptimizers:
    """register_optimizer_step_pre_hook and its sister count the steps of a user."""

    @pytest.fixture
    def seen(self):
        seen = []
        handles = [
            register_optimizer_step_pre_hook(lambda opt, *_: seen.append(("pre", opt))),
            register_optimizer_step_post_hook(lambda opt, *_: seen.append(("post", opt))),
        ]
        yield seen
        for handle in handles:
            handle.remove()

    @pytest.mark.parametrize("way", WAYS)
    def test_they_fire_once_per_step(self, way, seen):
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr_of(), perturbation=llqr.SAM(0.1))
        train(optimizer, problem, 2, way)
        assert seen == [("pre", optimizer), ("post", optimizer)] * 2

    def test_the_bases_own_still_fire(self, seen):
        problem = mlp()
        base = sgd(problem)
        optimizer = optimizer_of(problem, base)
        base.register_step_pre_hook(lambda opt, *_: seen.append(("base pre", opt)))
        base.register_step_post_hook(lambda opt, *_: seen.append(("base post", opt)))
        optimizer.step(problem.closure_of(optimizer))
        assert seen == [
            ("pre", optimizer),
            ("base pre", base),
            ("base post", base),
            ("post", optimizer),
        ]

    @pytest.fixture(autouse=True)
    def closures(self, monkeypatch):
        def closure_of(problem, optimizer):
            def closure():
                optimizer.zero_grad()
                return problem.backward()

            return closure

        monkeypatch.setattr(Problem, "closure_of", closure_of, raising=False)

    def test_the_step_is_the_same_with_them(self, seen):
        problem, plain = mlp(), mlp()
        optimizer = optimizer_of(problem, torch.optim.Adam(problem.model.parameters(), lr=0.01))
        train(optimizer, problem, 3)
        train_plainly(torch.optim.Adam(plain.model.parameters(), lr=0.01), plain, 3)
        same(weights(problem.model), weights(plain.model))
        assert len(seen) == 12

    def test_a_scheduler_on_the_base_knows_that_it_stepped(self, seen):
        """It warns if its optimizer did not step before it."""
        problem = mlp()
        base = sgd(problem)
        optimizer = optimizer_of(problem, base)
        scheduler = lr_scheduler.StepLR(base, 1)
        train(optimizer, problem, 1)
        scheduler.step()
        assert seen == [("pre", optimizer), ("post", optimizer)]

    def test_a_skipped_step_is_a_step_of_the_users(self, seen):
        problem = mlp()
        optimizer = optimizer_of(problem)
        problem.backward()
        problem.model[0].weight.grad.fill_(float("nan"))
        with pytest.warns(UserWarning, match="skipped"):
            optimizer.step()
        assert seen == [("pre", optimizer), ("post", optimizer)]

    def test_a_step_that_someone_put_on_the_base_runs(self, seen):
        problem, ran = mlp(), []
        base = sgd(problem)
        optimizer = optimizer_of(problem, base)
        own = base.step
        base.step = lambda *args: (ran.append(1), own(*args))
        train(optimizer, problem, 2)
        assert ran == [1, 1]

    def test_another_optimizer_beside_ours_is_seen_as_ever(self, seen):
        problem, beside = mlp(), nn.Linear(2, 1)
        optimizer, other = optimizer_of(problem), torch.optim.SGD(beside.parameters(), lr=0.1)
        train(optimizer, problem, 1)
        other.step()
        assert [opt for _, opt in seen] == [optimizer, optimizer, other, other]


class TestMetaParameters:
    def test_the_base_holds_those_of_before(self):
        """to_empty() makes new parameters; a base made before would train none of them."""
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = llqr.Optimizer(base, model, geometry=llqr.LLQR(), perturbation=llqr.SAM(0.1))
        model.to_empty(device="cpu")
        with pytest.raises(ValueError, match=r"'0.weight'.*on the meta device: to_empty"):
            optimizer.step()
        with pytest.raises(ValueError, match=r"on the meta device: to_empty"):
            llqr.Optimizer(base, model)

    @pytest.mark.parametrize("structure", ["identity", "diagonal", "kfac", "e-kfac", "dense"])
    def test_the_parts_follow_tensors_that_are_filled_in_place(self, structure):
        """With torch.__future__.set_swap_module_params_on_conversion the tensors stay the same."""
        problem = mlp()
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = llqr.Optimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            geometry=llqr_of(structure),
            perturbation=llqr.FriendlySAM(0.1),
        )
        with pytest.raises(ValueError, match="meta device"):
            optimizer.load_state_dict(optimizer.state_dict())
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to_empty(device="cpu").to(F64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        model.load_state_dict(problem.model.state_dict())
        filled = Problem(model, problem.x, problem.y)
        twin = optimizer_of(
            problem,
            torch.optim.SGD(problem.model.parameters(), lr=0.1),
            geometry=llqr_of(structure),
            perturbation=llqr.FriendlySAM(0.1),
        )
        train(optimizer, filled, 4)
        train(twin, problem, 4)
        same(weights(model), weights(problem.model))
