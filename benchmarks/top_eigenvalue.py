"""The largest eigenvalue of the Hessian of a ResNet-18 on some hundred images: products, residual.

Images of Fashion-MNIST, padded to 32 x 32, of three equal channels; the network has taken a few
steps on others of them and is measured in evaluation mode, on a list of batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import arguments, show
from torch import Tensor, nn
from torch.nn import functional as F

from llqr import sharpness
from llqr_lab.data.fashion_mnist import DEBIAN, fashion_mnist
from llqr_lab.models.resnet import resnet18

TRAINED_ON = slice(10_000, 60_000)


def main() -> None:
    """Train a little, measure, and print."""
    parser = arguments(__doc__)
    parser.add_argument("--data", default=DEBIAN, help="folder of Fashion-MNIST's files")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="of the training before")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    train = fashion_mnist(options.data).train
    images, labels = as_cifar(train.pixels), train.labels
    network = resnet18(10).to(options.device)
    train_briefly(network, batches_of(images, labels, TRAINED_ON, options), options.steps)
    measured = list(batches_of(images, labels, slice(0, options.images), options))
    found = sharpness.eigenvalues(
        lambda batch: F.cross_entropy(network(batch[0]), batch[1]),
        network.eval(),
        batches=measured,
        tolerance=options.tolerance,
        progress=lambda done, _: print(f"product {done}", flush=True),
    )
    print(found)
    row = {
        "images": found.examples,
        "batches": found.batches,
        "products": found.evaluations,
        "eigenvalue": f"{float(found.values[0]):.6g}",
        "residual": float(found.residuals[0]),
        "between batches": float(found.standard_errors[0]),
        "converged": found.converged,
        "minutes": found.seconds / 60,
    }
    show("The largest eigenvalue of the Hessian of ResNet-18", [row], options)


def as_cifar(pixels: Tensor) -> Tensor:
    """Return (N, 1, 28, 28) as (N, 3, 32, 32), of mean 0 and size 1."""
    x = F.pad(pixels[:20_000].float() / 255, (2, 2, 2, 2))
    return ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1)


def batches_of(
    images: Tensor, labels: Tensor, rows: slice, options: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of these rows."""
    x, y = images[rows].split(options.batch), labels[rows][: len(images[rows])].split(options.batch)
    for batch in zip(x, y, strict=True):
        yield tuple(part.to(options.device) for part in batch)


def train_briefly(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """Take some steps of SGD with momentum, so that the norms have statistics."""
    base = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for _, (x, y) in zip(range(steps), batches, strict=False):
        base.zero_grad()
        F.cross_entropy(network(x), y).backward()
        base.step()


if __name__ == "__main__":
    main()
