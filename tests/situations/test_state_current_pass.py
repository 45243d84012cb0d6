"""Code that runs in every pass of a step can ask which one it is in, and so act once."""

import asyncio
import threading

import pytest
import torch

import llqr
from tiny import WAYS, llqr_of, mlp, optimizer_of, sgd, train


def asked(problem):
    """The answers of current_pass() in each forward, and in each backward."""
    answers = []
    problem.model.register_forward_hook(lambda *_: answers.append(llqr.current_pass()))
    return answers


@pytest.mark.parametrize("way", WAYS)
def test_each_forward_knows_its_pass(way):
    problem = mlp()
    answers = asked(problem)
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1), geometry=llqr_of("kfac"))
    train(optimizer, problem, 1, way)
    first = None if way == "perturbed" else "clean"  # there the clean backward is the caller's own
    assert answers[-2:] == [first, "perturbed"]
    assert set(answers[:-2]) == {"refresh"}
    assert llqr.current_pass() is None


def test_the_only_pass_is_clean():
    problem = mlp()
    answers = asked(problem)
    train(optimizer_of(problem), problem, 2)
    assert answers == ["clean", "clean"]


def test_a_metric_counts_each_batch_once():
    problem, seen = mlp(), []

    def forward():
        loss, z = problem()
        if llqr.current_pass() in ("clean", None):
            seen.append(float(loss.detach()))
        return loss, z

    geometry = llqr_of("kfac", every=1)
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1), geometry=geometry)
    losses = [float(optimizer.minimize(forward)) for _ in range(4)]
    assert seen == losses


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("leave", ["break", "raise"])
def test_no_pass_is_left_behind_by_a_body_that_leaves(when, leave):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1))
    try:
        for i in optimizer.passes():
            problem.backward()
            if i == when:
                if leave == "break":
                    break
                raise KeyError
    except KeyError:
        pass
    assert llqr.current_pass() is None


def test_no_pass_is_left_behind_by_a_refresh_that_raises():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of("kfac"))

    def forward():
        assert llqr.current_pass() == "refresh"
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.refresh(forward)
    assert llqr.current_pass() is None


def test_a_refresh_within_the_clean_pass_is_a_refresh():
    problem = mlp()
    answers = asked(problem)
    optimizer = optimizer_of(problem, geometry=llqr_of("kfac"))
    for _ in optimizer.passes():
        optimizer.refresh(problem)
        assert set(answers) == {"refresh"} and llqr.current_pass() == "clean"
        problem.backward()
    optimizer.step()
    assert llqr.current_pass() is None


def test_an_iterator_left_open_ends_with_the_step():
    problem = mlp()
    optimizer = optimizer_of(problem, sgd(problem), perturbation=llqr.SAM(0.1))
    old = optimizer.passes()
    next(old)
    problem.backward()
    next(old)
    problem.backward()
    assert llqr.current_pass() == "perturbed"
    optimizer.zero_grad()
    optimizer.step()
    assert llqr.current_pass() is None
    newer = optimizer.passes()
    next(newer)
    old.close()  # late: it ends nothing newer
    assert llqr.current_pass() == "clean"
    newer.close()
    assert llqr.current_pass() is None


def test_an_iterator_closed_from_another_context():
    """As the garbage collector may do it in another thread."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1))
    passes = optimizer.passes()
    next(passes)
    thread = threading.Thread(target=passes.close)
    thread.start()
    thread.join()
    assert llqr.current_pass() is None


def test_two_trainings_in_one_thread_and_a_bystander():
    one, two = mlp(), mlp()
    a, b = (optimizer_of(p, perturbation=llqr.SAM(0.1)) for p in (one, two))
    bystander = []
    for i in a.passes():
        one.backward()
        for j in b.passes():
            two.backward()
            assert llqr.current_pass() == ("perturbed" if j else "clean")
            thread = threading.Thread(target=lambda: bystander.append(llqr.current_pass()))
            thread.start()
            thread.join()
        b.step()
        assert llqr.current_pass() == ("perturbed" if i else "clean")
    a.step()
    assert llqr.current_pass() is None and set(bystander) == {None}


def test_tasks_have_their_own():
    """Two trainings that take turns in one thread, as asyncio tasks."""

    async def training(answers):
        problem = mlp()
        optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1))
        for _ in optimizer.passes():
            problem.backward()
            await asyncio.sleep(0)
            answers.append(llqr.current_pass())
        optimizer.step()
        await asyncio.sleep(0)
        answers.append(llqr.current_pass())

    async def both():
        first, second = [], []
        await asyncio.gather(training(first), training(second))
        return first, second

    for answers in asyncio.run(both()):
        assert answers == ["clean", "perturbed", None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_it_compiles():
    net = torch.nn.Linear(3, 1)

    @torch.compile(backend="eager")
    def f(x):
        y = net(x)
        return y * 2 if llqr.current_pass() == "perturbed" else y

    x = torch.ones(2, 3)
    optimizer = llqr.Optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net)
    optimizer.minimize(lambda: f(x).mean())
    torch.testing.assert_close(f(x), net(x))
