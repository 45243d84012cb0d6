"""DeepSpeed is refused where it meets llqr; its own optimizers may be a base."""

import sys
import types

import pytest
import torch
from torch import nn

import llqr
from tiny import mlp, says, sgd, train

INSTEAD = "use DistributedDataParallel, or fully_shard"


@pytest.fixture
def deepspeed(monkeypatch):
    """A stand-in, with classes at the places of DeepSpeed's."""
    modules = {}
    for name, classes in {
        "deepspeed": {},
        "deepspeed.runtime.engine": {"DeepSpeedEngine": Engine},
        "deepspeed.runtime.zero.stage_1_and_2": {"DeepSpeedZeroOptimizer": ZeroOptimizer},
        "deepspeed.ops.adam.fused_adam": {"FusedAdam": torch.optim.AdamW},
    }.items():
        module = modules[name] = types.ModuleType(name)
        for kind, like in classes.items():
            setattr(module, kind, type(kind, (like,), {"__module__": name}))
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(
        engine=modules["deepspeed.runtime.engine"].DeepSpeedEngine,
        zero=modules["deepspeed.runtime.zero.stage_1_and_2"].DeepSpeedZeroOptimizer,
        adam=modules["deepspeed.ops.adam.fused_adam"].FusedAdam,
    )


class Engine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class ZeroOptimizer:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_an_engine_as_the_model(deepspeed):
    problem = mlp()
    for model in (deepspeed.engine(problem.model), nn.Sequential(deepspeed.engine(problem.model))):
        with says(ValueError, "model: DeepSpeedEngine of DeepSpeed is not", INSTEAD):
            llqr.Optimizer(sgd(problem), model)


def test_parameters_that_zero_has_partitioned():
    problem = mlp()
    problem.model[0].weight.ds_id = 0
    with says(ValueError, "ZeRO partitioned is not", INSTEAD):
        llqr.Optimizer(sgd(problem), problem.model)


def test_its_wrapper_of_an_optimizer_as_the_base(deepspeed):
    problem = mlp()
    wrapper = deepspeed.zero(sgd(problem))
    for base, where in ((wrapper, "base: "), ([sgd(problem), wrapper], r"base\[1\]: ")):
        with says(TypeError, f"{where}DeepSpeedZeroOptimizer of DeepSpeed is not", INSTEAD):
            llqr.Optimizer(base, problem.model)


def test_flat_copies_in_the_groups_at_the_first_step(deepspeed):
    """What initialize does to the optimizer that it was given."""
    problem = mlp()
    optimizer = llqr.Optimizer(sgd(problem), problem.model, perturbation=llqr.SAM(0.1))
    held = optimizer.param_groups[0]["params"]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in held]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with says(ValueError, "not a parameter of the model", "deepspeed.initialize", INSTEAD):
        optimizer.step()


def test_its_own_optimizers_may_be_the_base(deepspeed):
    problem = mlp()
    base = deepspeed.adam(problem.model.parameters(), lr=0.01)
    train(llqr.Optimizer(base, problem.model, perturbation=llqr.SAM(0.1)), problem, 2)
