"""The vision transformer against torch's encoder layer and against transformers' model."""

import pytest
import torch
from torch import nn

from llqr_lab.models.vit import EPS, Block, VisionTransformer, vit

# parts of names: transformers' and ours
NAMES = {
    "vit.": "",
    "embeddings.cls_token": "token",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.projection": "patches",
    "layers.": "blocks.",
    "_proj": "",
    "attention.o.": "attention.out.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.": "",
    "layernorm": "norm",
    "classifier": "head",
}


def test_the_block_is_torchs_encoder_layer():
    torch.manual_seed(0)
    ours = Block(8, heads=2).double()
    theirs = nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, "gelu", layer_norm_eps=EPS, batch_first=True, norm_first=True
    ).double()
    projections = (ours.attention.q, ours.attention.k, ours.attention.v)
    theirs.self_attn.in_proj_weight.data = torch.cat([f.weight.data for f in projections])
    theirs.self_attn.in_proj_bias.data = torch.cat([f.bias.data for f in projections])
    for mine, their in (
        (ours.attention.out, theirs.self_attn.out_proj),
        (ours.fc1, theirs.linear1),
        (ours.fc2, theirs.linear2),
    ):
        their.load_state_dict(mine.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_the_transformer_sees_every_patch_in_its_place():
    torch.manual_seed(0)
    model = VisionTransformer(width=8, depth=2, heads=2, patch=4, image=8, classes=3)
    x = torch.randn(2, 3, 8, 8)
    assert model(x).shape == (2, 3)
    moved = x.roll(4, dims=3)
    assert not torch.allclose(model(x), model(moved), atol=1e-4)
    model.positions.data.zero_()
    torch.testing.assert_close(model(x), model(moved), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"image": 9}, {"heads": 3}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    sizes = {"width": 8, "depth": 1, "heads": 2, "patch": 4, "image": 8, "classes": 3}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VisionTransformer(**{**sizes, **wrong})


def test_a_name_that_is_no_size_is_refused():
    with pytest.raises(ValueError, match="size: expected one of Ti, S, B, L, got 'XL'"):
        vit(10, size="XL")


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip(
        "transformers", reason="transformers, the oracle, is not installed (it is no dependency)"
    )
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=12,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_labels=5,
            layer_norm_eps=EPS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    theirs = theirs.double().eval()
    ours = VisionTransformer(width=12, depth=3, heads=3, patch=4, image=8, classes=5).double()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-12)
