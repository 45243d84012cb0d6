"""State outside the model's buffers: modules beside it, parameters written in a forward, modes,
random state of Python and numpy, metrics."""

import copy
import functools
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llqr
from llqr import _module_state
from tiny import WAYS, buffers, close, gradients, llqr_of, mlp, same, sgd, train, weights

F64 = torch.float64


class Centred(nn.Module):
    """DINO's loss: the teacher's outputs are centred by a running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1, 3, dtype=F64))

    def forward(self, student, teacher):
        target = F.softmax((teacher - self.centre) / 0.1, -1)
        self.centre = 0.9 * self.centre + 0.1 * teacher.mean(0, keepdim=True)
        return -(target * F.log_softmax(student, -1)).sum(-1).mean()


class Distilled:
    """A problem for tiny.train: model, loss module and teacher in three places."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3, dtype=F64)
        self.loss = Centred()
        self.teacher = nn.Sequential(nn.Linear(4, 3, dtype=F64), nn.BatchNorm1d(3, dtype=F64))
        self.x = torch.randn(8, 4, dtype=F64)

    def __call__(self):
        with torch.no_grad():
            for p in self.teacher.parameters():
                p.mul_(0.99)
            target = self.teacher(self.x)
        z = self.model(self.x)
        return self.loss(z, target), z

    def backward(self):
        loss, _ = self()
        loss.backward()
        return loss.detach()

    def beside(self):
        return {
            **buffers(self.loss),
            **buffers(self.teacher),
            **weights(self.teacher),
        }


def alone(steps=1):
    """The plain loop's state beside the model, which its weights have no part in."""
    problem = Distilled()
    for _ in range(steps):
        problem()
    return problem.beside()


@pytest.mark.parametrize("way", WAYS)
def test_modules_beside_the_model_move_once_per_step(way):
    problem = Distilled()
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.1),
        problem.model,
        modules=(problem.loss, problem.teacher),
        perturbation=llqr.SAM(0.1),
        geometry=llqr_of("kfac", every=1),
    )
    train(optimizer, problem, 3, way)
    same(problem.beside(), alone(3))


@pytest.mark.parametrize("way", ["minimize", "closure", "refresh"])
def test_modules_that_the_forward_names_are_found(way):
    problem = Distilled()
    criterion, teacher, model = problem.loss, problem.teacher, problem.model
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        perturbation=llqr.SAM(0.1),
        geometry=llqr_of("kfac", every=1),
    )

    def targets():
        with torch.no_grad():
            for p in teacher.parameters():
                p.mul_(0.99)
            return teacher(problem.x)

    def forward():  # the teacher is named by a function that it names
        z = model(problem.x)
        return criterion(z, targets()), z

    def closure():
        optimizer.zero_grad()
        loss, _ = forward()
        loss.backward()
        return loss.detach()

    if way == "minimize":
        optimizer.minimize(forward)
    elif way == "closure":
        with pytest.warns(UserWarning, match="refresh of the geometry is due"):
            optimizer.step(closure)
    else:
        optimizer.refresh(forward)
    same(problem.beside(), alone(0 if way == "refresh" else 1))


class Trainer:
    """Modules are attributes of the object whose method is the forward."""

    def __init__(self, problem):
        self.model, self.criterion, self.x = problem.model, problem.loss, problem.x
        self.target = torch.ones(8, 3, dtype=F64)

    def forward(self):
        z = self.model(self.x)
        return self.criterion(z, self.target), z

    __call__ = forward


@pytest.mark.parametrize("how", ["method", "object", "partial"])
def test_modules_of_the_object_of_a_method_are_found(how):
    problem = Distilled()
    trainer = Trainer(problem)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.1),
        problem.model,
        perturbation=llqr.SAM(0.1),
        geometry=llqr_of("kfac"),
    )
    forwards = {
        "method": trainer.forward,
        "object": trainer,
        "partial": functools.partial(trainer.forward),
    }
    optimizer.minimize(forwards[how])
    expected = 0.1 * torch.ones(1, 3, dtype=F64)
    torch.testing.assert_close(problem.loss.centre, expected, rtol=0, atol=1e-15)


def test_gradients_of_a_module_beside_the_model_do_not_add_up():
    """A learned temperature in the loss, which an optimizer of its own trains."""
    model, scale = nn.Linear(3, 2), nn.Linear(1, 1, bias=False)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    optimizer = llqr.Optimizer(sgd_of(model), model, modules=[scale], perturbation=llqr.SAM(0.1))

    def loss():
        return F.cross_entropy(model(x) * scale.weight, y)

    expected = torch.autograd.grad(loss(), [scale.weight])[0]
    for _ in optimizer.passes():
        loss().backward()
    torch.testing.assert_close(scale.weight.grad, expected)


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("value", [nn.Linear(2, 2), [torch.zeros(2)], 3, ["loss"]])
def test_modules_that_are_none_are_refused(value):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="modules: expected"):
        llqr.Optimizer(sgd_of(model), model, modules=value)


# -- parameters that a forward writes to -----------------------------------------------------------


def embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(3)
    return model, torch.randint(5, (16, 2)), torch.randint(3, (16,))


@pytest.mark.parametrize("refreshes", [1, 3])
def test_a_refresh_changes_no_weight_of_an_embedding_with_max_norm(refreshes):
    model, x, y = embedding()
    optimizer = llqr.Optimizer(sgd_of(model), model, geometry=llqr_of("kfac"))
    before = weights(model)
    for i in range(refreshes):
        part = x[4 * i : 4 * i + 8]

        def forward(part=part, i=i):
            z = model(part)
            return F.cross_entropy(z, y[4 * i : 4 * i + 8]), z

        optimizer.refresh(forward)
        same(weights(model), before)


def test_an_embedding_with_max_norm_that_the_probe_leaves_alone():
    """rho = 0 in its group: the second pass writes to weights that did not move."""
    model, x, y = embedding()
    plain = copy.deepcopy(model)
    groups = [{"params": [model[0].weight], "rho": 0.0}, {"params": model[2].parameters()}]
    optimizer = llqr.Optimizer(torch.optim.SGD(groups, lr=0.1), model, perturbation=llqr.SAM(1e-9))
    base = sgd_of(plain)
    for i in range(3):
        part = slice(4 * i, 4 * i + 8)

        class Once:  # other rows in the second pass: what it writes must not stay
            def __init__(self, part):
                self.part = part

            def __call__(self):
                loss = F.cross_entropy(model(x[self.part]), y[self.part])
                if llqr.current_pass() == "perturbed":
                    model[0](torch.arange(10))
                return loss

        optimizer.minimize(Once(part))
        base.zero_grad()
        F.cross_entropy(plain(x[part]), y[part]).backward()
        base.step()
    close(weights(model), weights(plain), 1e-7)


def test_a_large_frozen_body_is_not_copied(monkeypatch):
    """What the base does not hold may be much larger than what it holds."""
    monkeypatch.setattr(_module_state, "COPIED_ANYWAY", 0)
    head, body = [torch.zeros(10)], [torch.zeros(1000), torch.ones(1000)]
    written = _module_state.WrittenParameters()
    values = written.values_of(body, "start", head)
    assert not values._copied._copies
    body[1].add_(1)
    assert values.learn() == [body[1]]  # not to be put back this time, but from now on
    values = written.values_of(body, "start", head)
    body[1].add_(1)
    assert values.learn() == []
    values.restore()
    same(body, [torch.zeros(1000), 2 * torch.ones(1000)])


def test_a_write_that_cannot_be_put_back_is_told_once(monkeypatch):
    monkeypatch.setattr(_module_state, "COPIED_ANYWAY", 0)
    model, huge = nn.Linear(2, 2), nn.Linear(40, 40).requires_grad_(False)
    optimizer = llqr.Optimizer(sgd_of(model), model, modules=[huge], perturbation=llqr.SAM(0.1))

    def forward():
        if llqr.current_pass() == "perturbed":
            huge.weight.mul_(0.5)
        return model(torch.ones(1, 2)).square().mean()

    first = huge.weight.detach().clone()
    with pytest.warns(UserWarning, match="a second pass wrote to parameters.*'weight'"):
        optimizer.minimize(forward)
    optimizer.minimize(forward)
    optimizer.minimize(forward)
    torch.testing.assert_close(huge.weight, 0.5 * first)


@pytest.mark.parametrize("when", [0, 1])
def test_a_skipped_step_puts_everything_beside_the_model_back(when):
    problem = Distilled()
    optimizer = llqr.Optimizer(
        sgd_of(problem.model),
        problem.model,
        modules=[problem.loss, problem.teacher],
        perturbation=llqr.SAM(0.1),
    )
    train(optimizer, problem, 1)
    before = problem.beside()
    for i in optimizer.passes():
        loss, _ = problem()
        (loss * (float("nan") if i == when else 1.0)).backward()
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    same(problem.beside(), before)
    train(optimizer, problem, 1)
    same(problem.beside(), alone(2))


def test_a_frozen_part_on_meta_is_left_alone():
    model = nn.Linear(2, 2)
    ghost = nn.Linear(2, 2, device="meta").requires_grad_(False)
    ghost.register_buffer("table", torch.zeros(3, device="meta"))
    optimizer = llqr.Optimizer(sgd_of(model), model, modules=[ghost], perturbation=llqr.SAM(0.1))
    x = torch.ones(1, 2)
    optimizer.minimize(lambda: model(x).square().mean())
    optimizer.refresh_if_due(lambda: model(x).square().mean())


def test_the_second_pass_of_a_copied_optimizer_knows_what_is_written():
    problem = Distilled()
    options = {"modules": [problem.loss, problem.teacher], "perturbation": llqr.SAM(0.1)}
    optimizer = llqr.Optimizer(sgd_of(problem.model), problem.model, **options)
    train(optimizer, problem, 2)
    problem, optimizer = copy.deepcopy((problem, optimizer))
    train(optimizer, problem, 1)
    same(problem.beside(), alone(3))


# -- modes -----------------------------------------------------------------------------------------


class Adapter(nn.Linear):
    """As loralib's: train() and eval() take the low-rank part out of the weight and put it in."""

    def __init__(self):
        super().__init__(4, 3)
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(3, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x):
        low = 0 if self.merged else x @ self.a.T @ self.b.T
        return super().forward(x) + low


def test_a_refresh_calls_neither_train_nor_eval():
    torch.manual_seed(0)
    model = nn.Sequential(Adapter(), nn.Tanh(), nn.Linear(3, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer = llqr.Optimizer(base, model, geometry=llqr_of("kfac"))
    before, modes = weights(model), []

    def forward():
        modes.append([m.training for m in model.modules()])
        z = model(x)
        return F.cross_entropy(z, y), z

    optimizer.refresh(forward)
    same(weights(model), before)
    assert not model[0].merged and all(m.training for m in model.modules())
    assert not any(any(mode) for mode in modes)


def test_parts_that_were_frozen_by_eval_stay_so():
    problem = mlp()
    problem.model[0].eval()
    optimizer = llqr.Optimizer(sgd(problem), problem.model, geometry=llqr_of("kfac"))
    with pytest.raises(KeyError):
        optimizer.refresh(lambda: {}["missing"])
    modes = [m.training for m in problem.model.children()]
    assert modes == [False] + [True] * (len(modes) - 1) and problem.model.training


# -- random state ----------------------------------------------------------------------------------


def drawing_problem(draw):
    torch.manual_seed(0)
    model, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []

    def forward():
        seen.append((llqr.current_pass(), draw()))
        z = model(x) * (1 + 0.1 * seen[-1][1])
        return F.cross_entropy(z, torch.tensor([0, 1, 0, 1])), z

    return model, forward, seen


def numpy_draw(kind):
    numpy = pytest.importorskip("numpy")
    return {"normal": lambda: float(numpy.random.randn()), "uniform": lambda: numpy.random.rand()}[
        kind
    ]


DRAWS = {
    "random": lambda: random.random,
    "random.gauss": lambda: lambda: random.gauss(0, 1),
    "numpy": lambda: numpy_draw("uniform"),
    "numpy normal": lambda: numpy_draw("normal"),  # which keeps every second number for later
    "torch": lambda: lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("name", DRAWS)
def test_global_generators_are_replayed_and_a_refresh_takes_none(name):
    draw = DRAWS[name]()
    model, forward, seen = drawing_problem(draw)
    optimizer = llqr.Optimizer(
        sgd_of(model), model, perturbation=llqr.SAM(0.1), geometry=llqr_of("diagonal", every=2)
    )
    seed_all()
    for _ in range(4):
        optimizer.minimize(forward)
    last = draw()
    clean = [v for where, v in seen if where == "clean"]
    assert clean == [v for where, v in seen if where == "perturbed"]
    seed_all()
    assert [draw() for _ in range(5)] == [*clean, last]  # as many as of plain training
    for i, (where, v) in enumerate(seen):
        if where == "refresh":  # the numbers of the clean pass to come, each time
            assert v == next(c for w, c in seen[i:] if w == "clean")


def seed_all():
    torch.manual_seed(1)
    random.seed(1)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1)


def test_replay_can_be_switched_off_for_all():
    model, forward, seen = drawing_problem(random.random)
    optimizer = llqr.Optimizer(sgd_of(model), model, perturbation=llqr.SAM(0.1), replay_rng=False)
    optimizer.minimize(forward)
    assert seen[0][1] != seen[1][1]


def test_numpy_is_not_imported():
    code = (
        "import sys, torch; before = 'numpy.random' in sys.modules\n"
        "from llqr._random_state import RandomState; RandomState().restore()\n"
        "assert ('numpy.random' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_of_torchmetrics_count_once():
    """Sums, lists and the number of updates, in the model or beside it."""
    torchmetrics = pytest.importorskip("torchmetrics")
    problem = mlp()
    problem.model.register_module("mean", torchmetrics.MeanMetric())
    net = nn.Sequential(*list(problem.model.children())[:-1])
    listed, plain = torchmetrics.CatMetric(), torchmetrics.CatMetric()
    losses = []

    def forward():
        z = net(problem.x)
        loss = z.square().mean()
        problem.model.mean.update(loss.detach())
        listed.update(loss.detach())
        if llqr.current_pass() == "clean":
            losses.append(float(loss.detach()))
            plain.update(loss.detach())
        return loss, z

    optimizer = llqr.Optimizer(
        sgd(problem),
        problem.model,
        perturbation=llqr.SAM(0.1),
        geometry=llqr_of("diagonal", every=1),
    )
    for _ in range(3):
        optimizer.minimize(forward)
    assert len(losses) == 3
    assert int(problem.model.mean.weight) == 3 and problem.model.mean.update_count == 3
    assert listed.update_count == 3
    same(listed.compute(), plain.compute())


def test_nothing_of_the_users_is_touched_by_a_refresh():
    problem = Distilled()
    optimizer = llqr.Optimizer(
        sgd_of(problem.model),
        problem.model,
        modules=[problem.loss, problem.teacher],
        geometry=llqr_of("dense"),
    )
    problem.backward()
    before = [problem.beside(), weights(problem.model), gradients(problem.model)]
    states = [random.getstate(), torch.get_rng_state()]
    optimizer.refresh(problem)
    same([problem.beside(), weights(problem.model), gradients(problem.model)], before)
    same([random.getstate(), torch.get_rng_state()], states)


# -- however a forward reaches a module ------------------------------------------------------------


class Counting(nn.Module):
    """A loss that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        return z.square().mean()


class Holder:
    """An object of the user's that holds modules."""

    def __init__(self, model, crit):
        self.model, self.crit, self.losses = model, crit, {"a": crit}

    def by_attribute(self):
        z = self.model(torch.ones(4, 5))
        return self.crit(z), z

    def by_entry(self):
        z = self.model(torch.ones(4, 5))
        return self.losses["a"](z), z

    def nested(self):
        return lambda: (self.crit(z := self.model(torch.ones(4, 5))), z)


def ways_to_reach(model, crit):
    holder, losses, x = Holder(model, crit), [crit], torch.ones(4, 5)

    def plain():
        z = model(x)
        return crit(z), z

    def listed():
        z = model(x)
        return losses[0](z), z

    def through_object():
        z = model(x)
        return holder.losses["a"](z), z

    return {
        "decorated": torch.enable_grad()(plain),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16)(plain),
        "compiled": torch.compile(plain, backend="eager"),
        "list": listed,
        "object": through_object,
        "method": holder.by_attribute,
        "entry": holder.by_entry,
        "nested": holder.nested(),
    }


@pytest.mark.parametrize("way", ways_to_reach(nn.Linear(5, 3), Counting()))
@pytest.mark.filterwarnings("ignore:the forward's autocast is switched off")
def test_a_loss_module_counts_once_however_it_is_reached(way):
    model, crit = nn.Linear(5, 3), Counting()
    forward = ways_to_reach(model, crit)[way]
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        geometry=llqr.LLQR("diagonal", every=1),
        perturbation=llqr.SAM(0.1),
    )
    for _ in range(2):
        optimizer.minimize(forward)
    assert float(crit.calls) == 2
