"""What a pass or a refresh cannot do, it says where the mistake is and what helps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llqr
from llqr._refresher import EVALUATION_NOTE, add_note
from tiny import llqr_of, mlp, optimizer_of, says


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


# -- what only training mode returns ---------------------------------------------------------------


class Auxiliary(nn.Module):
    """Inception and its like return a second head in training mode only."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = self.body(x).tanh()
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


class Detector(nn.Module):
    """Detectors return a dict of losses in training mode, and boxes otherwise."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        z = self.body(x)
        return {"loss": z.square().mean(), "z": z} if self.training else [z]


def forward_of(kind, model, x, y):
    def two_heads():
        z, aux = model(x)
        return F.cross_entropy(z, y) + 0.4 * F.cross_entropy(aux, y), (z, aux)

    def losses():
        out = model(x)
        return out["loss"], out["z"]

    return {"auxiliary": two_heads, "detector": losses}[kind]


@pytest.mark.parametrize(
    "kind, model, error, own",
    [
        ("auxiliary", Auxiliary, ValueError, "too many values to unpack"),
        ("detector", Detector, TypeError, "list indices"),
    ],
)
def test_an_error_in_a_refresh_tells_that_it_evaluates(kind, model, error, own):
    model, x, y = model(), torch.randn(16, 4), torch.randint(3, (16,))
    forward = forward_of(kind, model, x, y)
    optimizer = llqr.Optimizer(sgd_of(model), model, geometry=llqr_of("kfac"))
    with pytest.raises(error, match=own) as raised:
        optimizer.minimize(forward)
    assert any("evaluation mode" in note for note in notes(raised.value))
    assert model.training  # and training goes on, with a forward of its own for the refresh
    z = {"auxiliary": lambda: model(x), "detector": lambda: model(x)[0]}[kind]
    optimizer.minimize(forward, refresh=lambda: (F.cross_entropy(out := z(), y), out))


def notes(error):
    return [*getattr(error, "__notes__", ()), str(error)]


def test_an_error_in_a_pass_has_no_such_note():
    problem = mlp()
    with pytest.raises(ValueError, match="own") as raised:
        optimizer_of(problem, perturbation=llqr.SAM(0.1)).minimize(fails)
    assert not any("evaluation mode" in note for note in notes(raised.value))


def fails():
    raise ValueError("own")


def test_the_note_is_added_once_and_keeps_type_and_cause():
    error = ValueError("own")
    for _ in range(2):
        add_note(error, EVALUATION_NOTE)
    assert "".join(notes(error)).count("evaluation mode") == 1


class OldError(Exception):
    """As of Python 3.10, where an error takes no notes."""

    add_note = property(lambda self: self.missing)


@pytest.mark.parametrize("arguments, changed", [(("own", 3), True), ((7,), False), ((), False)])
def test_before_python_311_the_note_joins_the_message(arguments, changed):
    error = OldError(*arguments)
    for _ in range(2):
        add_note(error, EVALUATION_NOTE)
    assert (EVALUATION_NOTE in str(error)) is changed
    assert error.args[1:] == arguments[1:]
    assert str(error).count("evaluation mode") == changed


# -- parameters without values ---------------------------------------------------------------------


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


WAYS = {
    "minimize": lambda o, f: o.minimize(f),
    "closure": lambda o, f: o.step(lambda: f()[0]),
    "passes": lambda o, f: list(o.passes()),
    "perturbed": lambda o, f: o.perturbed().__enter__(),
    "refresh": lambda o, f: o.refresh(f),
}


@pytest.mark.parametrize("materialised", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_parameters_on_meta_are_refused_by_name(way, materialised):
    model = on_meta()
    optimizer = llqr.Optimizer(
        sgd_of(model), model, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.1)
    )
    if materialised:  # the base still holds the old ones
        model.to_empty(device="cpu")
    with says(RuntimeError, "base: .*'0.weight'.*meta device", "then make the base"):
        WAYS[way](optimizer, lambda: (model(torch.randn(2, 4)).sum(), None))


def test_an_optimizer_made_after_the_values_trains():
    model = on_meta().to_empty(device="cpu")
    for module in (model[0], model[2]):
        module.reset_parameters()
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = llqr.Optimizer(
        sgd_of(model), model, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.1)
    )

    def forward():
        z = model(x)
        return F.cross_entropy(z, y), z

    losses = [float(optimizer.minimize(forward)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_one_parameter_on_meta_among_others():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3, device="meta"))
    optimizer = llqr.Optimizer(sgd_of(model), model, perturbation=llqr.SAM(0.1))
    with says(RuntimeError, "base: .*'1.weight'.*meta device"):
        optimizer.minimize(lambda: model[0](torch.randn(2, 4)).sum())
