"""torch.distributed.checkpoint: saved by two processes, loaded by two and by one."""

from __future__ import annotations

import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from replicas import alone, data_parallel, near, one_process, parameters
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import llqr
from tiny import everything, llqr_of, mlp, same, train

BASES = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
}


def folder():
    """One temporary folder, known to all."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def elsewhere():
    """The same batch, other weights."""
    problem = mlp()
    problem.model.load_state_dict(mlp(seed=1).model.state_dict())
    return problem


def save(optimizer, path):
    model, state = get_state_dict(optimizer.model, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=path)


def load(optimizer, path, **options):
    model, state = get_state_dict(optimizer.model, optimizer)
    template = {"model": model, "optimizer": state}
    dcp.load(template, checkpoint_id=path, **options)
    set_state_dict(
        optimizer.model,
        optimizer,
        model_state_dict=template["model"],
        optim_state_dict=template["optimizer"],
    )


def check_save_on_two_load_on_two_and_on_one():
    for base, geometry in zip(BASES.values(), ("diagonal", "e-kfac"), strict=True):

        def options(base=base, geometry=geometry):
            return {
                "base": base,
                "geometry": llqr_of(geometry),
                "perturbation": llqr.FriendlySAM(0.1),
            }

        optimizer, share = data_parallel(mlp(), **options())
        train(optimizer, share, 3)
        path = folder()
        save(optimizer, path)
        other, fresh = data_parallel(elsewhere(), **options())
        load(other, path)
        whole = elsewhere()
        single = one_process(whole, **options())
        load(single, path, process_group=alone())
        same(list(parameters(whole.model).values()), list(parameters(share.model).values()))
        same(single.geometry.state(), optimizer.geometry.state())
        same(single.perturbation.state(), optimizer.perturbation.state())
        train(optimizer, share, 4)
        train(other, fresh, 4)
        same(everything(other), everything(optimizer))
        train(single, whole, 4)
        near(parameters(share.model), parameters(whole.model), 1e-12)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path)


def check_local_memory():
    """The memory of local probes is saved for each process and comes back to it."""

    def make(seed):
        return data_parallel(
            elsewhere() if seed else mlp(), perturbation=llqr.FriendlySAM(0.1), sync=False
        )

    optimizer, share = make(0)
    train(optimizer, share, 3)
    path = folder()
    save(optimizer, path)
    other, fresh = make(1)
    load(other, path)
    train(optimizer, share, 3)
    train(other, fresh, 3)
    same(everything(other), everything(optimizer))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path)
