"""Bases beyond one plain optimizer in each framework: Muon with AdamW, and one that averages."""

import pytest
import torch

from integrations import small
from situations.test_bases import Averaging
from tables import muon
from tiny import same, weights

pytestmark = [
    # What Lightning itself warns of in so small a run.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


def muon_and_adamw(model):
    held = list(model.parameters())
    return [
        muon([p for p in held if p.dim() == 2], lr=0.02),
        torch.optim.AdamW([p for p in held if p.dim() != 2], lr=0.01),
    ]


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setattr(small, "base_of", muon_and_adamw)
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    small.forget_accelerator()
    yield
    small.forget_accelerator()


def test_lightning(monkeypatch, tmp_path):
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from integrations import test_lightning

    monkeypatch.setattr(test_lightning, "base_of", muon_and_adamw)
    module, hand = test_lightning.Automatic(), small.net()
    trainer = test_lightning.trained(
        module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=small.CLIP
    )
    small.by_hand(hand, 2, small.CLIP, in_groups=True)
    test_lightning.equal(module.net, hand)
    assert len(trainer.optimizers) == 1 and len(trainer.optimizers[0].base) == 2


def test_accelerate(monkeypatch):
    from integrations import test_accelerate

    monkeypatch.setattr(test_accelerate, "base_of", muon_and_adamw)
    ours, optimizer, losses = test_accelerate.trained(accumulate=2, clip=small.CLIP)
    hand = small.net()
    small.by_hand(hand, 2, small.CLIP)
    same(weights(ours), weights(hand))
    assert losses[-1] < losses[0] and [g["base"] for g in optimizer.param_groups] == [0, 1]


def test_trainer_of_transformers(monkeypatch, tmp_path):
    """A run also goes on from its checkpoint, bit for bit."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from integrations import test_transformers

    monkeypatch.setattr(test_transformers, "base_of", muon_and_adamw)
    model = test_transformers.causal()
    start = weights(model)
    trainer, optimizer = test_transformers.trained(tmp_path, model, accumulate=2, clip=small.CLIP)
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert trainer.state.global_step == 4 and len(optimizer.base) == 2
    test_transformers.test_a_checkpoint_of_the_trainer_resumes(tmp_path)


def test_the_trainer_evaluates_where_the_base_does(monkeypatch, tmp_path):
    """It calls train() in each training step, the second pass included, and eval() before eval."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from integrations import test_transformers

    monkeypatch.setattr(
        test_transformers, "base_of", lambda model: Averaging(list(model.parameters()))
    )
    model = test_transformers.causal()
    trainer, optimizer = test_transformers.trained(tmp_path, model, structure=None)
    trained = weights(model)
    trainer.evaluate(test_transformers.sentences())
    averages = weights(model)
    assert all(not torch.equal(averages[n], trained[n]) for n in trained)
    optimizer.train()
    same(weights(model), trained)
