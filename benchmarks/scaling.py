"""How the time of a refresh grows with the number of parameters: vision transformers, diagonal U.

The exponent is of a straight line through log time against log parameters; the paper reports 1.27
for its own code on ImageNet transformers. "steps" is the refresh over a training step, which is
flat when a refresh costs what its products cost.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import Classifier, Clock, arguments, show
from refresh import STRUCTURES, Refresh

from llqr_lab.models.vit import vit

# width, depth
SIZES = ((96, 4), (128, 6), (192, 6), (192, 12), (256, 12))


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, structures=tuple(STRUCTURES))
    parser.set_defaults(structures=["diagonal"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock, rows = Clock(options.device), []
    for structure in options.structures:
        points = []
        for width, depth in SIZES:
            torch.manual_seed(0)
            model = vit(100, size="Ti", patch=8, image=64, width=width, depth=depth, heads=2)
            x, y = torch.randn(8, 3, 64, 64), torch.randint(100, (8,))
            p = Classifier(model, x, y, options.device)
            refresh = Refresh(p, **STRUCTURES[structure], lr=0.1)
            times = clock.medians({"step": p.step, "refresh": refresh}, options.repeats)
            parameters = sum(q.numel() for q in model.parameters())
            points.append((math.log(parameters), math.log(times["refresh"])))
            rows.append(
                {
                    "structure": structure,
                    "width": width,
                    "depth": depth,
                    "parameters": parameters,
                    "step s": times["step"],
                    "refresh s": times["refresh"],
                    "steps": times["refresh"] / times["step"],
                    "products": refresh.report.products,
                }
            )
            print(rows[-1], flush=True)
        rows.append({"structure": structure, "width": "exponent", "refresh s": slope(points)})
    show("A refresh against the number of parameters (paper: exponent 1.27)", rows, options)


def slope(points: list[tuple[float, Any]]) -> float:
    """Return the slope of the least-squares line."""
    mx, my = (sum(v) / len(points) for v in zip(*points, strict=True))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


if __name__ == "__main__":
    main()
