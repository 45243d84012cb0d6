"""The authors' numbers (tests/reference), and the translation between their names and ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import llqr

FOLDER = Path(__file__).parent.parent / "reference"
LAYERS = ("fc0", "fc1", "fc2")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
CURVATURES = {"ngd": ("fisher", "sum"), "newton": ("newton", "mean")}


class Reference:
    """One file; remembers which arrays were read as inputs and which were compared."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(FOLDER / f"{name}.npz"))
        self.read: set[str] = set()
        self.compared: dict[str, float] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.add(key)
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def cases(self, *tails: str) -> list[str]:
        """The prefixes of all keys that end in one of the tails."""
        found = {k[: -len(t) - 1] for k in self.arrays for t in tails if k.endswith("/" + t)}
        return sorted(found)

    def tree(self, prefix: str) -> dict[str, str]:
        """All keys below a prefix: {rest: key}."""
        return {k[len(prefix) + 1 :]: k for k in self.arrays if k.startswith(prefix + "/")}

    def compare(self, key: str, value: torch.Tensor | float, tolerance: float) -> None:
        """Assert equality relative to the array's largest entry."""
        expected = torch.from_numpy(np.asarray(self.arrays[key])).double()
        value = torch.as_tensor(value).detach().double()
        assert value.numel() == expected.numel(), f"{key}: {value.shape} vs {expected.shape}"
        scale = float(expected.abs().max())
        error = float((value.reshape(-1) - expected.reshape(-1)).abs().max()) / max(scale, 1e-12)
        self.compared[key] = error
        assert error <= tolerance, f"{key}: relative error {error:.2e} > {tolerance}"

    def compare_tree(self, prefix: str, values: dict[str, torch.Tensor], tolerance: float) -> None:
        """Compare all arrays below a prefix."""
        tree = self.tree(prefix)
        assert tree, prefix
        for rest, key in tree.items():
            self.compare(key, values[rest], tolerance)

    def report(self) -> str:
        """Say how many arrays were compared, and the worst error."""
        worst = max(self.compared, key=self.compared.get)  # type: ignore[arg-type]
        return (
            f"{len(self.compared)} compared, {len(self.read)} read as inputs, "
            f"worst {self.compared[worst]:.1e} ({worst})"
        )

    def assert_complete(self, compared: int) -> None:
        """Assert that no array was left out, and that the count is the one written down."""
        print(self.report())
        assert set(self.arrays) - self.read - set(self.compared) == set()
        assert len(self.compared) == compared


def mlp(ref: Reference, activation: str, dtype: torch.dtype, prefix: str = "param") -> nn.Module:
    """The 6-8-8-4 network with the reference weights; it ends in logits."""
    act = ACTIVATIONS[activation]
    model = nn.Sequential()
    for name, (m, n) in zip(LAYERS, [(6, 8), (8, 8), (8, 4)], strict=True):
        layer = nn.Linear(m, n, dtype=dtype)
        layer.weight.data = ref[f"{prefix}/{name}/kernel"].T.contiguous().to(dtype)
        layer.bias.data = ref[f"{prefix}/{name}/bias"].clone().to(dtype)
        model.add_module(name, layer)
        if name != "fc2":
            model.add_module(name + "_act", act())
    return model


def forward_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, smoothing: float = 0.0):
    """A forward that returns (mean cross-entropy, logits)."""

    def forward():
        z = model(x)
        return nn.functional.cross_entropy(z, y.long(), label_smoothing=smoothing), z

    return forward


def to_tree(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{fc0.weight: (out, in)} -> {fc0/kernel: (in, out)}."""
    return {
        n.replace(".", "/").replace("weight", "kernel"): (v.T if v.dim() == 2 else v)
        for n, v in named.items()
    }


def from_tree(ref: Reference, prefix: str) -> dict[str, torch.Tensor]:
    """{fc0/kernel: (in, out)} -> {fc0.weight: (out, in)}, in model order."""
    named = {}
    for layer in LAYERS:
        named[f"{layer}.weight"] = ref[f"{prefix}/{layer}/kernel"].T.contiguous()
        named[f"{layer}.bias"] = ref[f"{prefix}/{layer}/bias"]
    return named


def flat(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    """Layer by layer, bias then kernel."""
    parts = [tree[f"{layer}/{leaf}"].reshape(-1) for layer in LAYERS for leaf in ("bias", "kernel")]
    return torch.cat(parts)


def _dense_order(layer: nn.Linear) -> torch.Tensor:
    """Our flat index (weight (out, in), then bias) of each entry of theirs (bias, kernel)."""
    out, into = layer.weight.shape
    kernel = torch.arange(out * into).view(out, into).T.reshape(-1)
    return torch.cat([out * into + torch.arange(out), kernel])


def blocks(
    state: dict[str, dict[str, torch.Tensor]], model: nn.Module, structure: str
) -> dict[str, torch.Tensor]:
    """Our exported state as the reference names and orders it."""
    found: dict[str, torch.Tensor] = {}
    for layer in LAYERS:
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        if structure == "diagonal":
            found[layer] = torch.cat([bias["U"], weight["U"].T.reshape(-1)])
        elif structure == "scalar":
            found[layer] = weight["U.0"].reshape(1)
        elif structure == "dense":
            order = _dense_order(getattr(model, layer))
            found[layer] = weight["U.0"][order][:, order]
        else:
            found[f"{layer}/bias"] = bias["U"]
            own = {k.partition(".")[0]: v for k, v in weight.items()}
            if "S" in own:
                own["S"] = own["S"].T.reshape(-1)
            names = {"QB": "QG"}
            for k in sorted(own):
                found[f"{layer}/kernel/{names.get(k, k)}"] = own[k]
    return found


def ours(
    ref: Reference, prefix: str, model: nn.Module, structure: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Reference blocks below a prefix as a state that a geometry loads."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for layer in LAYERS:
        module = getattr(model, layer)
        out, into = module.weight.shape
        if structure == "diagonal":
            u = ref[f"{prefix}/{layer}"]
            state[f"{layer}.bias"] = {"U": u[:out]}
            state[f"{layer}.weight"] = {"U": u[out:].view(into, out).T}
        elif structure == "scalar":
            state[f"{layer}.weight"] = {"U.0": ref[f"{prefix}/{layer}"].reshape(())}
        elif structure == "dense":
            back = torch.argsort(_dense_order(module))
            state[f"{layer}.weight"] = {"U.0": ref[f"{prefix}/{layer}"][back][:, back]}
        else:
            state[f"{layer}.bias"] = {"U": ref[f"{prefix}/{layer}/bias"]}
            entries = {}
            for rest in ref.tree(f"{prefix}/{layer}/kernel"):
                value = ref[f"{prefix}/{layer}/kernel/{rest}"]
                if rest == "S":
                    value = value.view(into, out).T
                entries[{"QG": "QB"}.get(rest, rest) + ".0"] = value
            state[f"{layer}.weight"] = entries
    return state


def llqr_of(
    structure: str, divergence: str, model: nn.Module, **changes: object
) -> tuple[llqr.LLQR, str]:
    """An LLQR in the authors' arithmetic, bound; and the structure's name in our terms."""
    curvature, scale = CURVATURES[divergence]
    constraint = "square" if structure == "psd-e-kfac" else "none"
    name = "e-kfac" if structure == "psd-e-kfac" else structure
    settings = {"scale": scale, "constraint": constraint, "ema": 0.0, **changes}
    geometry = llqr.LLQR.paper(name, curvature, **settings)
    geometry.bind(model)
    return geometry, name
