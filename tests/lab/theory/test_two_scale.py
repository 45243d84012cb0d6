"""The recursions, and that the checks would notice another formula."""

import pytest
import torch

from llqr_lab.theory import two_scale
from llqr_lab.theory.two_scale import check_recursions, full_step, optimizer_path, random_two_scale


def test_every_recursion_is_exact():
    found = check_recursions()
    assert [f.source for f in found] == ["(3), (11)", "(10)", "(12)", "(4), (13)"]
    for finding in found:
        assert finding.verdict == "holds"
        assert finding.measured["cases"] == 200
        assert finding.measured["largest relative error"] < 5e-14


@pytest.mark.parametrize("name", ["full_step", "whitened_step", "coordinate_step", "scalar_step"])
def test_another_formula_is_noticed(name, monkeypatch):
    right = getattr(two_scale, name)
    # The kick a tenth of a percent too large.
    monkeypatch.setattr(two_scale, name, lambda *a: right(*a[:-1], 1.001 * a[-1]))
    verdicts = [f.verdict for f in check_recursions(cases=5)]
    assert sorted(verdicts) == ["NOT CONFIRMED", "holds", "holds", "holds"]


def test_many_steps_follow_the_recursion():
    generator = torch.Generator().manual_seed(3)
    model = random_two_scale(4, commuting=False, generator=generator).model
    e = torch.ones(4, dtype=torch.float64)
    path = optimizer_path(e, model.H, model.U, 0.01, 0.05, steps=20)
    for step in range(20):
        e = full_step(path[step], model, 0.01, 0.05)
        torch.testing.assert_close(path[step + 1], e, rtol=0, atol=1e-10)


def test_the_random_problem_is_what_it_says():
    case = random_two_scale(5, commuting=True, generator=torch.Generator().manual_seed(0))
    H_bar, H, vectors = case.model.H_bar, case.model.H, case.vectors
    torch.testing.assert_close(H_bar @ vectors, vectors * case.average, rtol=0, atol=1e-12)
    torch.testing.assert_close(H @ vectors, vectors * case.average * case.mu, rtol=0, atol=1e-10)
    free = random_two_scale(5, commuting=False, generator=torch.Generator().manual_seed(0)).model
    assert float((free.H_bar @ free.H_eps - free.H_eps @ free.H_bar).abs().max()) > 0.1
    torch.testing.assert_close(free.root @ free.root, free.H_bar, rtol=0, atol=1e-12)
