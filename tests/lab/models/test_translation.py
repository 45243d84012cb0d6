"""The translation model against torch's layers; its count, its masks and its cache."""

import pytest
import torch
from torch import Tensor, nn

from llqr_lab.data.tokens import EOS, PAD
from llqr_lab.models.attention import Attention
from llqr_lab.models.registry import build_network
from llqr_lab.models.translation import DecoderLayer, EncoderLayer, Translator, sine_positions

F64 = torch.float64


def attention_into(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    projections = (ours.q, ours.k, ours.v)
    theirs.in_proj_weight.data = torch.cat([f.weight.data for f in projections])
    theirs.in_proj_bias.data = torch.cat([f.bias.data for f in projections])
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def noisy(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.normal_(std=0.5)
    return module.double().eval()


def into(ours: nn.Module, theirs: nn.Module, norms: int) -> None:
    attention_into(ours.attention, theirs.self_attn)
    theirs.linear1.load_state_dict(ours.network[0].state_dict())
    theirs.linear2.load_state_dict(ours.network[2].state_dict())
    for i in range(1, norms + 1):
        getattr(theirs, f"norm{i}").load_state_dict(getattr(ours, f"norm{i}").state_dict())


def test_layers_are_torchs():
    options = dict(dropout=0.0, batch_first=True, dtype=F64)
    ours = noisy(EncoderLayer(8, 16, 2, 0.0))
    theirs = nn.TransformerEncoderLayer(8, 2, 16, **options)
    into(ours, theirs, 2)
    x = torch.randn(3, 5, 8, dtype=F64)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    expected = theirs(x, src_key_padding_mask=~real)
    torch.testing.assert_close(ours(x, real[:, None, None])[real], expected[real])

    ours = noisy(DecoderLayer(8, 16, 2, 0.0))
    theirs = nn.TransformerDecoderLayer(8, 2, 16, **options)
    into(ours, theirs, 3)
    attention_into(ours.cross, theirs.multihead_attn)
    y = torch.randn(3, 4, 8, dtype=F64)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=F64)
    expected = theirs(y, x, tgt_mask=causal, memory_key_padding_mask=~real)
    got, _ = ours(y, ours.cross.keys_values(x), real[:, None, None])
    torch.testing.assert_close(got, expected)


def test_positions_are_sines_and_cosines():
    table = sine_positions(3, 2, 8, torch.zeros((), dtype=F64))
    for row, where in zip(table, (3, 4), strict=True):
        angles = [where / 10000 ** (k / 3) for k in range(4)]
        expected = [f(torch.tensor(a)) for f in (torch.sin, torch.cos) for a in angles]
        torch.testing.assert_close(row, torch.stack(expected).double(), atol=1e-6, rtol=0)


def parameters(source: int, target: int, d: int, hidden: int, layers: int) -> int:
    """Count by hand: matrices and biases of each kind of part."""
    attention = 4 * d * d + 4 * d
    network = 2 * d * hidden + hidden + d
    norm = 2 * d
    encoder = attention + network + 2 * norm
    decoder = 2 * attention + network + 3 * norm
    return (source + target) * d + layers * (encoder + decoder)  # no last layer: it is tied


def test_parameters():
    with torch.device("meta"):
        model = build_network("transformer-iwslt", 6632, source=8848)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(8848, 6632, 512, 1024, 6) == 39_469_056
    small = Translator(31, 37, width=6, hidden=10, heads=2, layers=2)
    assert sum(p.numel() for p in small.parameters()) == parameters(31, 37, 6, 10, 2)


def test_the_last_layer_is_the_decoders_embedding():
    model = tiny()
    prefix = torch.tensor([[EOS, 4]])
    before = model(SOURCE[:1], prefix)
    with torch.no_grad():
        model.embed_target.weight[7] *= 2
    after = model(SOURCE[:1], prefix)
    torch.testing.assert_close(after[..., 7], 2 * before[..., 7])
    rest = torch.arange(13) != 7
    torch.testing.assert_close(after[..., rest], before[..., rest])


SOURCE = torch.tensor([[5, 6, 7, 8, EOS], [9, 3, EOS, PAD, PAD]])
PREFIX = torch.tensor([[EOS, 3, 4, 5], [EOS, 6, 7, 8]])


def tiny() -> Translator:
    torch.manual_seed(0)
    return Translator(11, 13, width=8, hidden=16, heads=2, layers=2).double().eval()


def test_the_whole_is_its_parts():
    model = tiny()
    source, prefix = SOURCE[:1], PREFIX[:1]
    x = 8**0.5 * model.embed_source.weight[source[0]] + sine_positions(
        0, 5, 8, model.embed_source.weight
    )
    y = 8**0.5 * model.embed_target.weight[prefix[0]] + sine_positions(
        0, 4, 8, model.embed_source.weight
    )
    x, y = x[None], y[None]
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    for layer in model.encoder:
        x = layer(x, mask)
    for layer in model.decoder:
        y, _ = layer(y, layer.cross.keys_values(x), mask)
    torch.testing.assert_close(model(source, prefix), y @ model.embed_target.weight.T)


def test_padding_and_the_future_change_nothing():
    model = tiny()
    z = model(SOURCE, PREFIX)
    assert z.shape == (2, 4, 13)
    torch.testing.assert_close(model(SOURCE[1:, :3], PREFIX[1:]), z[1:])
    other = PREFIX.clone()
    other[:, 2:] = 9
    changed = model(SOURCE, other)
    torch.testing.assert_close(changed[:, :2], z[:, :2])
    assert (changed[:, 2:] - z[:, 2:]).abs().amax(-1).gt(1e-2).all()


def test_one_token_at_a_time_is_all_at_once():
    model = tiny()
    memory, mask = model.encode(SOURCE)
    cache, logits = model.empty_cache(memory), []
    for t in range(PREFIX.shape[1]):
        z, cache = model.decode(PREFIX[:, t : t + 1], cache, mask, start=t)
        logits.append(z)
    torch.testing.assert_close(torch.cat(logits, 1), model(SOURCE, PREFIX))


@pytest.mark.parametrize("wrong", [dict(width=9, heads=3), dict(width=8, heads=3)])
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="width"):
        Translator(11, 13, **wrong)


def test_padding_starts_at_zero():
    model: Translator = tiny()
    rows: list[Tensor] = [e.weight[PAD] for e in (model.embed_source, model.embed_target)]
    assert all((row == 0).all() for row in rows)
