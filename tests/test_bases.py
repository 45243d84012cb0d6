"""transport="bases": the base steps in the coordinates of U's bases."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import llqr
from llqr.geometry._bases import Bases

X = torch.randn(24, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
EPS = 1e-4  # Adam's: a gradient of zero is rounding in other coordinates


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(5, 3)).to(dtype)


def forward_of(model, x=X):
    def forward():
        outputs = model(x.to(model[0].weight.dtype))
        outputs = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        return nn.functional.cross_entropy(outputs, Y), outputs

    return forward


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, eps=EPS)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.03, nesterov=True)


def wrap(model, base, transport="bases", geometry=None, **options):
    geometry = geometry or llqr.NaturalGradient(every=3, samples=4)
    base = base(list(model.parameters())) if callable(base) else base
    return llqr.Optimizer(base, model, geometry=geometry, transport=transport, **options)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def matrix(tensor):
    return tensor.reshape(len(tensor), -1)


def test_adamw_steps_in_the_bases():
    """Adam's formula in Q'w and Q'g, with means that turn with Q and second moments that stay."""
    model, naive = make_model(), make_model()
    optimizer = wrap(model, adamw)
    weights = dict(naive.named_parameters())
    known = {name: (torch.zeros_like(w), torch.zeros_like(w), None) for name, w in weights.items()}
    changes = 0
    for step in range(1, 9):
        optimizer.minimize(forward_of(model))
        learned = optimizer.geometry.state()
        gradients = torch.autograd.grad(forward_of(naive)()[0], list(weights.values()))
        for (name, w), g in zip(weights.items(), gradients, strict=True):
            mean, square, old = known[name]
            new = None
            if "QA.0" in learned[name]:
                new = learned[name]["QB.0"].clone(), learned[name]["QA.0"].clone()
                if old is not None:
                    changes += not torch.equal(new[1], old[1])
                    mean = from_bases(mean, old)
                    mean = to_bases(mean, new)
            g = to_bases(g, new)
            mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g.square()
            root = (square / (1 - 0.999**step)).sqrt() + EPS
            moved = from_bases(0.02 * mean / (1 - 0.9**step) / root, new)
            with torch.no_grad():
                w.mul_(1 - 0.02 * 0.1).sub_(moved)
            known[name] = mean, square, new
        torch.testing.assert_close(weights_of(model), weights_of(naive), rtol=0, atol=1e-10)
    assert changes  # some refresh turned some basis
    plain = make_model()
    reference = adamw(plain.parameters())
    for _ in range(8):
        reference.zero_grad()
        forward_of(plain)()[0].backward()
        reference.step()
    assert (weights_of(plain) - weights_of(model)).abs().max() > 0.01


def to_bases(x, bases):
    return x if bases is None else (bases[0].T @ matrix(x) @ bases[1]).reshape(x.shape)


def from_bases(x, bases):
    return x if bases is None else (bases[0] @ matrix(x) @ bases[1].T).reshape(x.shape)


def copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make_model(model[0].weight.dtype)
    other.load_state_dict(model.state_dict())
    fresh = wrap(other, sgd, transport=optimizer.transport)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return other, fresh


def switched(transport):
    def switch(model, optimizer):
        optimizer.transport = transport
        return model, optimizer

    return switch


def refreshed(model, optimizer):
    optimizer.refresh(forward_of(model))
    return model, optimizer


def refreshed_and_saved(model, optimizer):
    return saved(*refreshed(model, optimizer))


def reset(model, optimizer):
    optimizer.geometry.reset()
    return model, optimizer


@pytest.mark.parametrize(
    "event", [None, copied, saved, switched(False), refreshed, refreshed_and_saved, reset]
)
def test_sgd_is_the_same_in_all_coordinates(event):
    """What adds up vectors only goes where it goes without U, whatever happens to the bases."""
    perturbation = llqr.SAM(rho=0.1, along="gradient") if event is None else None
    models = make_model(), make_model()
    optimizer = wrap(models[0], sgd, perturbation=perturbation)
    plain = llqr.Optimizer(
        sgd(list(models[1].parameters())), models[1], perturbation=copy.deepcopy(perturbation)
    )
    model = models[0]
    for step in range(8):
        if step == 5 and event is not None:
            model, optimizer = event(model, optimizer)
        optimizer.minimize(forward_of(model))
        plain.minimize(forward_of(models[1]))
        torch.testing.assert_close(weights_of(model), weights_of(models[1]), rtol=0, atol=1e-12)


def join(model, optimizer):
    optimizer.add_param_group({"params": list(model[5].parameters())})


def carry(model, optimizer):
    """Put a new tensor in the place of a weight, with its state."""
    old, new = model[3].weight, nn.Parameter(model[3].weight.detach().clone())
    model[3].weight = new
    places = optimizer.param_groups[0]["params"]
    places[[p is old for p in places].index(True)] = new
    optimizer.state[new] = optimizer.state.pop(old)


def leave_for_a_step(model, optimizer):
    places = optimizer.param_groups[0]["params"]
    weight = places.pop(0)
    optimizer.minimize(forward_of(model))
    places.insert(0, weight)


def double(model, optimizer):
    model.double()
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = entry["momentum_buffer"].double()


def replace_for_a_step(model, optimizer):
    """Alternate two heads under one name; the base keeps the states of both."""
    head = model[5]
    places = optimizer.param_groups[0]["params"]
    for other in (nn.Linear(5, 3), head):
        if other is not head:
            other.load_state_dict(head.state_dict())
            other.to(head.weight.dtype)
        model[5] = other
        for old, new in zip(places[-2:], other.parameters(), strict=True):
            places[[p is old for p in places].index(True)] = new
        if other is not head:
            optimizer.minimize(forward_of(model))


@pytest.mark.parametrize("event", [join, carry, leave_for_a_step, replace_for_a_step, double])
@pytest.mark.parametrize(
    "geometry", [llqr.NaturalGradient(every=3, samples=4), llqr.GradientMoments(renew_every=2)]
)
@pytest.mark.filterwarnings("ignore:parameters were replaced")
def test_the_momentum_follows_parameters_that_change(geometry, event):
    """SGD goes where it goes without U, whichever step it happens at."""
    for at in range(1, 4):
        sides = []
        for u in (copy.deepcopy(geometry), None):
            model = make_model(torch.float32 if event is double else torch.float64)
            parts = model if event is not join else model[:4]
            base = sgd(list(parts.parameters()))
            transport = "bases" if u is not None else True
            sides.append((model, llqr.Optimizer(base, model, geometry=u, transport=transport)))
        for step in range(7):
            for side in sides:
                if step == at:
                    event(*side)
                side[1].minimize(forward_of(side[0]))
        ends = [weights_of(model).double() for model, _ in sides]
        atol = 1e-6 if event is double else 1e-12
        torch.testing.assert_close(*ends, rtol=0, atol=atol)


def test_a_mean_that_was_away_starts_anew():
    model = make_model()
    optimizer = wrap(model, sgd, geometry=llqr.GradientMoments(renew_every=1))
    optimizer.minimize(forward_of(model))
    optimizer.minimize(forward_of(model))
    places, weight = optimizer.param_groups[0]["params"], model[0].weight
    places.pop(0)
    kept = optimizer.state.pop(weight)
    optimizer.minimize(forward_of(model))
    places.insert(0, weight)
    optimizer.state[weight] = kept
    with pytest.warns(UserWarning, match=r"'0.weight' was away while the bases of U turned"):
        optimizer.minimize(forward_of(model))


def test_a_step_that_changes_nothing_is_in_the_bases_too():
    models = make_model(), make_model()
    optimizer = wrap(models[0], sgd, geometry=llqr.GradientMoments(renew_every=2))
    plain = llqr.Optimizer(sgd(list(models[1].parameters())), models[1])
    for step in range(5):
        for model, one in zip(models, (optimizer, plain), strict=True):
            if step == 3:  # as torch.distributed.checkpoint makes it; the decay has a part in it
                one.param_groups[0]["lr"] = 0.0
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                one.step()
                one.param_groups[0]["lr"] = 0.1
            one.minimize(forward_of(model))
    torch.testing.assert_close(weights_of(models[0]), weights_of(models[1]), rtol=0, atol=1e-12)


def test_a_mean_of_another_shape_starts_anew():
    """A layer that is widened in mid-training, its momentum with it."""
    model = make_model()
    optimizer = wrap(model, sgd, geometry=llqr.GradientMoments(renew_every=2))
    for _ in range(3):
        optimizer.minimize(forward_of(model))
    old = model[5].weight
    new = nn.Parameter(torch.cat([old.detach(), old.detach()]))
    momentum = optimizer.state.pop(old)["momentum_buffer"]
    places = optimizer.param_groups[0]["params"]
    places[[p is old for p in places].index(True)] = new
    model[5].weight, bias = new, model[5].bias
    bias.data = bias.detach().repeat(2)
    optimizer.state[new] = {"momentum_buffer": torch.cat([momentum, momentum])}
    optimizer.state[bias]["momentum_buffer"] = optimizer.state[bias]["momentum_buffer"].repeat(2)
    with pytest.warns(UserWarning) as caught:
        optimizer.minimize(forward_of(model))
    assert any("the shape of '5.weight' changed" in str(w.message) for w in caught)
    # As after a first step: the gradient, in the bases.
    found = optimizer.state[new]["momentum_buffer"]
    expected = new.grad + 0.03 * torch.cat([old.detach(), old.detach()])
    assert found.norm() == pytest.approx(float(expected.norm()), rel=1e-9)
    optimizer.minimize(forward_of(model))


class NewMemory(torch.optim.SGD):
    """A base that assigns p.data."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data = p - 0.1 * p.grad


@pytest.mark.parametrize(
    ("base", "geometry"),
    [
        (NewMemory, llqr.GradientMoments()),
        (sgd, llqr.LLQR("e-kfac", every=3, constraint="square")),
        (sgd, llqr.LLQR("e-kfac", every=3, constraint="none")),
    ],
)
def test_it_is_a_rotation_for_every_base_and_u(base, geometry):
    models = make_model(), make_model()
    optimizer = wrap(models[0], base, geometry=geometry)
    plain = llqr.Optimizer(base(list(models[1].parameters())), models[1])
    for _ in range(7):
        optimizer.minimize(forward_of(models[0]))
        plain.minimize(forward_of(models[1]))
    torch.testing.assert_close(weights_of(models[0]), weights_of(models[1]), rtol=0, atol=1e-12)
    if base is sgd:  # U itself is not turned by a rotation
        q = optimizer.geometry.state()["3.weight"]["QA.0"]
        assert (q.T @ q - torch.eye(len(q))).abs().max() > 1e-6


def test_a_turn_that_fails_turns_nothing(monkeypatch):
    models = make_model(), make_model()
    optimizer = wrap(models[0], sgd, geometry=llqr.GradientMoments(renew_every=1))
    plain = llqr.Optimizer(sgd(list(models[1].parameters())), models[1])
    for step in range(6):
        if step == 3:
            with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
                patch.setattr(Bases, "rotate", raise_out_of_memory)
                optimizer.minimize(forward_of(models[0]))
        optimizer.minimize(forward_of(models[0]))
        plain.minimize(forward_of(models[1]))
    torch.testing.assert_close(weights_of(models[0]), weights_of(models[1]), rtol=0, atol=1e-12)


def raise_out_of_memory(*_):
    raise torch.OutOfMemoryError("no memory")


def test_weights_beyond_float16_in_the_bases_skip_the_step():
    model = nn.Linear(64, 64, bias=False).half()
    nn.init.constant_(model.weight, 2000.0)  # 128,000 along the only direction of the gradient
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, geometry=llqr.GradientMoments(), transport="bases")
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    assert optimizer.skipped_steps == 1 and bool(model.weight.isfinite().all())
    assert "its weights in the bases of U left the range" in str(caught[0].message)


def test_the_momentum_is_in_the_bases():
    model = make_model()
    optimizer = wrap(model, sgd, geometry=llqr.NaturalGradient(every=100, samples=4))
    optimizer.minimize(forward_of(model))
    weight = model[3].weight
    bases = tuple(optimizer.geometry.state()["3.weight"][key] for key in ("QB.0", "QA.0"))
    inside = optimizer.state[weight]["momentum_buffer"].clone()
    for transport, expected in ((False, from_bases(inside, bases)), ("bases", inside)):
        optimizer.transport = transport
        optimizer.state_dict()  # holds the base's state in the coordinates of the next step
        found = optimizer.state[weight]["momentum_buffer"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert (from_bases(inside, bases) - inside).abs().max() > 1e-3


@pytest.mark.parametrize("way", [copied, saved], ids=["copied", "saved"])
@pytest.mark.parametrize("steps", [4, 6])  # between refreshes, and before one
def test_a_resumed_run_is_bitwise_the_same(way, steps):
    model = make_model(torch.float32)
    optimizer = wrap(model, sgd)
    for _ in range(steps):
        optimizer.minimize(forward_of(model))
    other, resumed = way(model, optimizer)
    for _ in range(5):
        optimizer.minimize(forward_of(model))
        resumed.minimize(forward_of(other))
        assert torch.equal(weights_of(model), weights_of(other))


def test_a_state_goes_to_other_coordinates_only_with_the_bases():
    model = make_model()
    optimizer = wrap(model, sgd)
    for _ in range(4):
        optimizer.minimize(forward_of(model))
    state = copy.deepcopy(optimizer.state_dict())
    # To an optimizer that steps along U g: the momentum comes back to the parameters' coordinates.
    other = copy.deepcopy(model)
    receiver = wrap(other, sgd, transport=False)
    receiver.load_state_dict(state)
    optimizer.transport = False
    for m, o in ((model, optimizer), (other, receiver)):
        o.minimize(forward_of(m))
    assert torch.equal(weights_of(model), weights_of(other))
    receiver.geometry.sharded = True  # as shard=True makes it in several processes
    with pytest.raises(ValueError, match=r"transport='bases'.*is sharded.*whole in every process"):
        receiver.load_state_dict(state)
    # Without the bases the momentum cannot be read.
    with pytest.raises(ValueError, match=r"transport='bases'.*geometry=None"):
        llqr.Optimizer(sgd(list(other.parameters())), other).load_state_dict(state)


def test_a_step_that_raises_leaves_the_weights():
    model = make_model()

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("broken")

    optimizer = wrap(model, lambda p: Broken(p, lr=0.1))
    before = weights_of(model).clone()
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.minimize(forward_of(model))
    moved = {name for name, p in model.named_parameters() if p.dim() == 1}
    after = dict(model.named_parameters())
    start = 0
    for name, p in after.items():
        kept = torch.equal(before[start : start + p.numel()], p.detach().flatten())
        assert kept == (name not in moved)
        start += p.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_new_groups(dtype):
    model = make_model(dtype)
    head = list(model[5].parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = wrap(model, torch.optim.AdamW(rest, lr=0.01), refresh_autocast=True)
    first = None
    for step in range(12):
        if step == 4:
            optimizer.add_param_group({"params": head, "lr": 0.02})
        loss = float(optimizer.minimize(forward_of(model)))
        first = first or loss
        for p in optimizer.state:
            assert p.grad is not None and p.grad.dtype == dtype
    assert loss < first
    assert optimizer.geometry.bases_for(dict(model.named_parameters())).names == {
        "0.weight",
        "3.weight",
        "5.weight",
    }


class Average(torch.optim.SGD):
    def eval(self):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": llqr.NaturalGradient("diagonal")}, r"needs bases of U.*e-kfac"),
        ({"graft": True}, r"graft=False"),
        ({"perturbation": llqr.MSAM()}, r"MSAM"),
        ({"base": lambda p: Average(p, lr=0.1)}, r"Average"),
        ({"base": lambda p: torch.optim.ASGD(p)}, r"ASGD"),
        ({"transport": "base"}, r"True, False or 'bases'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    model = make_model()
    with pytest.raises((ValueError, TypeError), match=message):
        wrap(model, **{"base": sgd} | options)
    with pytest.raises(ValueError, match="geometry=None"):
        llqr.Optimizer(sgd(list(model.parameters())), model, transport="bases")
    vectors = [p for p in model.parameters() if p.dim() == 1]
    with pytest.raises(ValueError, match=r"matrices have.*none for the 3 parameters"):
        wrap(model, sgd(vectors))


def test_what_is_set_later_is_checked_too():
    model = make_model()
    optimizer = wrap(model, sgd, transport=True, geometry=llqr.NaturalGradient("diagonal"))
    with pytest.raises(ValueError, match="needs bases of U"):
        optimizer.transport = "bases"
    with pytest.raises(TypeError, match="graft: expected"):
        optimizer.graft = 1
    optimizer = wrap(model, sgd)
    with pytest.raises(ValueError, match="graft=False"):
        optimizer.graft = True
    assert (optimizer.transport, optimizer.graft) == ("bases", False)


@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
    ],
)
def test_other_bases_train_in_the_bases(base):
    model = make_model()
    optimizer = wrap(model, base)
    losses = [float(optimizer.minimize(forward_of(model))) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_autocast_around_a_step_changes_nothing():
    model = make_model(torch.float32)
    optimizer = wrap(model, adamw, geometry=llqr.GradientMoments(renew_every=2))
    other, same = copied(model, optimizer)
    for _ in range(4):
        for m, o, on in ((model, optimizer, False), (other, same, True)):
            o.zero_grad()
            forward_of(m)()[0].backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                o.step()
        assert torch.equal(weights_of(model), weights_of(other))
