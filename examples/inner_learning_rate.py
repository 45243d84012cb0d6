"""Print how far one refresh moves U, for structures and inner learning rates (Markdown)."""

import warnings

import torch
from torch import nn

import llqr

RATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
GEOMETRIES = {
    "scalar": {"structure": "scalar"},
    "diagonal": {"structure": "diagonal"},
    "diag-kfac": {"structure": "diag-kfac"},
    "kfac": {"structure": "kfac"},
    "e-kfac, learned bases": {"structure": "e-kfac"},
    "e-kfac, gradient bases": {"structure": "e-kfac", "bases": "gradient"},
}


def cell(report: llqr.RefreshReport) -> str:
    """Return |Ug - g| / |g| and cos(g, Ug), or that the refresh was refused."""
    return f"{report.change:.2g} ({report.cosine:.2f})" if report.accepted else "refused"


def main() -> None:
    """Refresh new geometries on one batch of a small network at its initialization."""
    torch.manual_seed(0)
    x = torch.randn(512, 20, dtype=torch.float64)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).double()

    def forward():
        logits = model(x)
        return nn.functional.cross_entropy(logits, y), logits

    print("| structure |", " | ".join(f"lr {lr:g}" for lr in RATES), "|")
    print("|---" * (len(RATES) + 1) + "|")
    for name, settings in GEOMETRIES.items():
        cells = []
        for lr in RATES:
            geometry = llqr.LLQR(**settings, lr=lr, ema=0.0)
            geometry.bind(model)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "a refresh was refused")
                cells.append(cell(geometry.refresh([forward])))
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
