"""What a refresh at step 0 sees in evaluation mode: the cosine of its gradient with training's.

At initialisation BatchNorm's running statistics are untouched (mean 0, variance 1), so that in
evaluation mode the network is another function than the one that is trained:

    python benchmarks/evaluation_mode.py [NETWORK ...]

Networks at the paper's size, normal noise as pictures, random labels, one thread.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llqr_lab.models.registry import build_network

NETWORKS = {  # classes, side of the pictures
    "vgg16-bn": (10, 32),
    "resnet18": (10, 32),
    "wrn-28-10": (10, 32),
    "pyramidnet-110": (10, 32),
    "resnet50": (1000, 224),
}


def flat_gradient(network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Return the gradient of the mean loss as one vector in float64, and the largest logit."""
    logits = network(x)
    parameters = list(network.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(logits, y), parameters)
    largest = float(logits.detach().abs().max())
    return torch.cat([g.flatten().double() for g in gradient]), largest


def main() -> None:
    """Print a line per network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=32, help="pictures (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("network          cosine   |g| evaluation / training   largest logit in evaluation")
    for name in arguments.networks:
        classes, side = NETWORKS[name]
        torch.manual_seed(0)
        network = build_network(name, classes)
        x = torch.randn(arguments.batch, 3, side, side)
        y = torch.randint(classes, (arguments.batch,))
        # Evaluation first: the training pass moves the running statistics.
        other, logit = flat_gradient(network.eval(), x, y)
        g, _ = flat_gradient(network.train(), x, y)
        cosine = float(g @ other / (g.norm() * other.norm()))
        print(f"{name:15} {cosine:7.3f} {float(other.norm() / g.norm()):13.3g} {logit:29.3g}")


if __name__ == "__main__":
    main()
