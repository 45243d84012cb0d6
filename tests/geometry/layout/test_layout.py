"""From parameters to layers, matrix views, blocks and one flat vector, and back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import llqr
from explicit import F64, as_matrix, block_indices
from llqr.geometry.layout import Layout, layers_of, matrix_shape, unwrap_model
from llqr.geometry.structures import Vector, find_structure
from nets import Tied, Zoo
from tiny import STRUCTURES, says


def layout_of(model: nn.Module, structure="kfac", block_size: int | None = 512) -> Layout:
    layers, transposed = layers_of(model)
    of = partial(find_structure, structure)
    return Layout(dict(model.named_parameters()), layers, of, Vector, block_size, transposed)


def indices(model: nn.Module) -> dict[str, Tensor]:
    """Every entry's own number, shaped like the parameters."""
    start, found = 0, {}
    for name, p in model.named_parameters():
        found[name] = torch.arange(start, start + p.numel(), dtype=torch.float32).view(p.shape)
        start += p.numel()
    return found


def random_like(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {n: torch.randn(p.shape).to(dtype) for n, p in model.named_parameters()}


# -- layers ----------------------------------------------------------------------------------------


def test_a_layer_is_what_one_module_owns():
    layers, transposed = layers_of(Zoo())
    assert layers == {
        "cls": "", "position": "", "temperature": "",
        "conv.weight": "conv", "conv.bias": "conv",
        "up.weight": "up", "up.bias": "up",
        "embed.weight": "embed",
        "norm.weight": "norm", "norm.bias": "norm",
        "head.weight": "head", "head.bias": "head",
    }  # fmt: skip
    assert transposed == {"up.weight"}


def test_a_tied_parameter_belongs_to_its_first_module():
    layers, _ = layers_of(Tied())
    assert list(layers) == [n for n, _ in Tied().named_parameters()]
    assert layers["embed.weight"] == "embed" and "head.weight" not in layers


def test_layers_inside_layers():
    block = nn.TransformerEncoderLayer(4, 2, 8)
    layers, _ = layers_of(block)
    assert layers["self_attn.in_proj_weight"] == "self_attn"
    assert layers["self_attn.out_proj.weight"] == "self_attn.out_proj"
    assert list(layers) == [n for n, _ in block.named_parameters()]


def test_transposed_convolutions_of_all_kinds():
    model = nn.Sequential(
        nn.ConvTranspose1d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2), nn.ConvTranspose3d(2, 3, 2)
    )
    assert layers_of(model)[1] == {"0.weight", "1.weight", "2.weight"}


def test_unwrap():
    model = nn.Linear(2, 2)
    assert unwrap_model(model) is model
    assert unwrap_model(nn.DataParallel(model)) is model
    holder = nn.Module()
    holder.module = model  # an ordinary model may have a part of that name
    assert unwrap_model(holder) is holder


# -- matrix views ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, transposed, matrix",
    [
        ((), False, None),
        ((5,), False, None),
        ((1,), False, None),
        ((3, 4), False, (3, 4)),
        ((1, 4), False, (1, 4)),
        ((6, 3, 2), False, (6, 6)),
        ((6, 3, 2, 2), False, (6, 12)),
        ((6, 3, 2, 2, 2), False, (6, 24)),
        ((1, 7, 4), False, (7, 4)),
        ((1, 1, 4), False, (1, 4)),
        ((1, 1, 1, 4), False, (1, 4)),
        ((1, 1, 5, 4), False, (5, 4)),
        ((1, 3, 2, 2), False, (3, 4)),
        ((3, 6, 2, 2), True, (6, 12)),
        ((3, 1, 2, 2), True, (3, 4)),
        ((1, 6, 2), True, (6, 2)),
    ],
)
def test_matrix_shape(shape, transposed, matrix):
    assert matrix_shape(shape, transposed) == matrix
    mine = as_matrix(torch.zeros(shape), transposed)
    assert (None if mine is None else tuple(mine.shape)) == matrix


def test_views_read_and_write():
    model = Zoo()
    layout = layout_of(model)
    for name, x in indices(model).items():
        view = layout.views[name]
        expected = as_matrix(x, name == "up.weight")
        if expected is None:
            assert view.matrix is None
            continue
        assert torch.equal(view.read_matrix(x), expected)
        assert torch.equal(view.write_matrix(view.read_matrix(x)), x)


def test_a_transposed_convolution_puts_out_first():
    layout = layout_of(nn.ConvTranspose1d(2, 3, 2))
    w = torch.arange(12.0).view(2, 3, 2)  # (in, out, kernel)
    row = layout.views["weight"].read_matrix(w)[1]  # all that leads to output 1
    assert row.tolist() == [2.0, 3.0, 8.0, 9.0]


# -- the flat vector -------------------------------------------------------------------------------

BLOCK_SIZES = (None, 512, 5, 3, 1)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("make", [Zoo, Tied, lambda: nn.TransformerEncoderLayer(4, 2, 8)])
def test_round_trip(make, structure, block_size):
    model = make()
    layout = layout_of(model, structure, block_size)
    tensors = random_like(model)
    flat = layout.pack(tensors)
    assert flat.shape == (layout.numel,) and layout.numel == sum(
        p.numel() for p in model.parameters()
    )
    back = layout.unpack(flat)
    assert list(back) == list(tensors)
    for name, x in tensors.items():
        assert torch.equal(back[name], x), name
    some = layout.unpack(flat, ["embed.weight"] if "embed.weight" in tensors else [])
    assert all(torch.equal(v, tensors[n]) for n, v in some.items())


def mixed(name: str, parameter: Tensor) -> str:
    """Another structure for each parameter, also within one layer."""
    return STRUCTURES[sorted(layers_of(Zoo())[0]).index(name) % len(STRUCTURES)]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("structure", [*STRUCTURES, mixed])
def test_blocks_are_the_explicit_ones(structure, block_size):
    """Each block's run of the flat vector is exactly the entries that the rules say."""
    model = Zoo()
    layout = layout_of(model, structure, block_size)
    flat = layout.pack(indices(model)).long()
    assert sorted(flat.tolist()) == list(range(layout.numel))
    found, start = [], 0
    for group in layout.groups:
        assert group.start == start
        kind = group.kind.name
        for block in group.blocks:
            run = flat[start : start + block.numel]
            found.append((kind, run.tolist(), group.shape or ()))
            start += block.numel
        if group.shape is not None:
            assert group.view_of(flat).shape == (len(group.blocks), *group.shape)
    expected = []
    for kind, _, _, index in block_indices(model, structure, block_size):
        shape = tuple(index.shape) if kind.endswith("kfac") or kind == "dense" else ()
        expected.append((kind, index.reshape(-1).tolist(), shape))
    assert sorted(found) == sorted(expected)


def test_absent_gradients_are_zero():
    model = Zoo()
    layout = layout_of(model)
    tensors = {**random_like(model), "conv.weight": None}
    del tensors["embed.weight"]
    back = layout.unpack(layout.pack(tensors))
    assert not back["conv.weight"].any() and not back["embed.weight"].any()
    assert torch.equal(back["head.weight"], tensors["head.weight"])
    assert not layout.pack({}).any()


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_strides_do_not_matter(structure):
    model = Zoo()
    layout = layout_of(model, structure, 3)
    tensors = random_like(model)
    tensors["conv.weight"] = tensors["conv.weight"].to(memory_format=torch.channels_last)
    tensors["up.weight"] = tensors["up.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["head.weight"] = tensors["head.weight"].T.contiguous().T
    assert not tensors["head.weight"].is_contiguous()
    for name, x in layout.unpack(layout.pack(tensors)).items():
        assert torch.equal(x, tensors[name])


def test_precision():
    """float32 for half precision, float64 where a parameter has it."""
    half = Zoo().to(torch.bfloat16)
    flat = layout_of(half).pack(random_like(half, torch.bfloat16))
    assert flat.dtype == torch.float32
    mixed = Zoo()
    mixed.head.double()
    layout = layout_of(mixed, "kfac")
    assert layout.dtype == torch.float64
    dtypes = {b.layer: g.dtype for g in layout.groups for b in g.blocks}
    assert dtypes["head"] == torch.float64 and dtypes["conv"] == torch.float32


def test_unknown_structures_are_refused_by_name():
    with says(ValueError, "structure", "'kron'", "'conv.weight'"):
        layout_of(Zoo(), lambda name, p: "kron" if name == "conv.weight" else "diagonal")


def test_dot():
    a, b = torch.randn(3, 5, dtype=F64), torch.randn(5, dtype=F64)
    dot = layout_of(Zoo()).space.dot
    assert float(dot(a[0], b)) == pytest.approx(float((a[0] * b).sum()), rel=1e-14)
    torch.testing.assert_close(dot(a, b), (a * b).sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "dense"])
def test_gram_and_combine_go_block_by_block(structure):
    layout = layout_of(Zoo(), structure, block_size=4)
    sizes = [block.numel for group in layout.groups for block in group.blocks]
    assert layout.space.block_count == len(sizes) >= len(set(sizes)) > 1
    rows, b = torch.randn(3, layout.numel, dtype=F64), torch.randn(layout.numel, dtype=F64)
    parts = torch.split(rows * b, sizes, dim=1)
    explicit = torch.stack([part.sum(1) for part in parts])
    torch.testing.assert_close(
        layout.space.dots_per_block(rows, b), explicit, rtol=1e-12, atol=1e-12
    )

    c = torch.randn(len(sizes), 3, dtype=F64)
    out = b.clone()
    layout.space.add_combination(c, rows, out)
    repeated = torch.repeat_interleave(c, torch.tensor(sizes), dim=0)
    torch.testing.assert_close(out, b + (repeated.mT * rows).sum(0), rtol=1e-12, atol=1e-12)


# -- wide sides are cut ----------------------------------------------------------------------------


def bound(model: nn.Module, structure: str, block_size: int | None = 512) -> llqr.LLQR:
    geometry = llqr.LLQR(structure, block_size=block_size)
    geometry.bind(model)
    return geometry


def test_an_embedding_of_30000_rows():
    model = nn.Embedding(30_000, 6)
    geometry = bound(model, "kfac")
    assert len(geometry.layout.slices_of("weight")) == 59
    assert geometry.numel() == 58 * 512**2 + 304**2 + 59 * 6**2
    g = {"weight": torch.randn(30_000, 6)}
    assert torch.equal(geometry.apply(g)["weight"], g["weight"])
    with torch.device("meta"):
        whole = nn.Embedding(30_000, 6)
    assert bound(whole, "kfac", None).numel() == 30_000**2 + 36
    assert bound(whole, "e-kfac").numel() == geometry.numel() + 180_000
    assert bound(whole, "diag-kfac").numel() == 30_000 + 59 * 6


def test_a_wide_convolution_and_a_head_of_30000_classes():
    with torch.device("meta"):
        conv, head = nn.Conv2d(512, 512, 3), nn.Linear(64, 30_000)
    geometry = bound(conv, "kfac")
    assert len(geometry.layout.slices_of("weight")) == 9  # nine independent 512 x 512 problems
    assert geometry.numel() == 9 * 2 * 512**2 + 512
    geometry = bound(head, "dense", 100)
    assert geometry.numel() == (30_000 * 65 // 100) * 100**2


def test_splitting_keeps_corners():
    """A side that is no multiple of the block size ends in a smaller block."""
    geometry = bound(nn.Linear(7, 5, bias=False), "kfac", 3)
    shapes = sorted(p.shape for p in geometry.layout.slices_of("weight"))
    assert shapes == [(2, 1), (2, 3), (2, 3), (3, 1), (3, 3), (3, 3)]
