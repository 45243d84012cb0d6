"""Classification of images: in memory, or decoded from folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.vision import is_packaged
from ..data.augment import Augment
from ..data.cifar import cifar10, cifar100
from ..data.digits import digit_images
from ..data.errors import DataError
from ..data.fashion_mnist import fashion_mnist
from ..data.image_folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolder
from ..data.images import Images, Split
from ..data.noise import flip_labels
from ..data.tiny_imagenet import tiny_imagenet
from ..data.torchvision_transforms import Mixing, RandAugment
from .build import network_of
from .config import source_of
from .digest import describe_data
from .draws import generator_for
from .task import Forward
from .workers import Workers

__all__ = ["Classification", "FolderClassification", "in_memory"]

READERS: dict[str, Callable[..., Split]] = {
    "cifar-10": cifar10,
    "cifar-100": cifar100,
    "tinyimagenet-200": tiny_imagenet,
    "fashion-mnist": fashion_mnist,
}
IMAGENET_CLASSES = 1000
EVALUATED = 500  # pictures a batch, without gradients
Batch = tuple[Tensor, Tensor]  # pixels (bytes) and labels


def in_memory(config: DictConfig) -> Split:
    """Load, hold out and cut to size, as the configuration says; the labels are the true ones.

    Raises:
        ValueError: there is no such data set, or too few pictures are left.
        DataError: the data are missing or damaged.
    """
    name = source_of(config).lower()
    if name == "digits":
        split = digit_images()
    elif name not in READERS:
        raise ValueError(f"read: expected one of digits, {', '.join(READERS)}, got {name!r}")
    elif config.data is None and name != "fashion-mnist":
        raise DataError(
            f"data: {name} needs data=FOLDER (the documentation's page Data says where it comes "
            "from); scale=small and scale=smoke need none"
        )
    else:
        split = READERS[name](*([config.data] if config.data else []))
    order = train_order(config, len(split.train))
    if held := config.input.holdout:
        split = Split(_images_at(split.train, order[held:]), _images_at(split.train, order[:held]))
    if config.input.limit:
        split = Split(
            *(_images_at(p, limited_order(config, len(p))) for p in (split.train, split.test))
        )
    return split


def train_order(config: DictConfig, count: int) -> Tensor:
    """Return the training pictures in an order of which the first ``holdout`` are evaluated on.

    Raises:
        ValueError: as many are to be held out as there are, or more.
    """
    if not 0 <= config.input.holdout < count:
        raise ValueError(f"input.holdout: expected 1 .. {count - 1}, got {config.input.holdout}")
    # Not the run's seed: all seeds are evaluated on the same pictures.
    return torch.randperm(count, generator=generator_for(0, "holdout"))


def limited_order(config: DictConfig, count: int) -> Tensor:
    """Return which pictures of a part are used, in random order."""
    order = torch.randperm(count, generator=generator_for(0, "limit"))
    return order[: config.input.limit]


def noisy_labels(config: DictConfig, labels: Tensor, classes: int) -> Tensor:
    """Return the labels to train on, of which the share ``noise`` is wrong."""
    draws = generator_for(config.seed, "noise")
    return flip_labels(labels, config.noise, classes, draws) if config.noise else labels


def _images_at(images: Images, chosen: Tensor) -> Images:
    return Images(images.pixels[chosen], images.labels[chosen], images.classes)


class Classification:
    """Images in memory, as bytes on the device.

    Args:
        config: of the run.
        workers: the processes.
    """

    metric = "test_accuracy"
    keys = frozenset(
        {"noise", "read", "data", "train.batch", "train.label_smoothing", "refresh.batch"}
        | {f"input.{key}" for key in ("limit", "holdout", "padding", "flip", "cutout_side")}
        | {f"input.{key}" for key in ("rand_augment", "mixup", "cutmix")}
    )

    def __init__(self, config: DictConfig, workers: Workers) -> None:
        """Load the data and build the network."""
        self.config, self.workers = config, workers
        self.load()
        given = config.input
        self.mix = Mixing(self.classes, mixup=given.mixup or 0, cutmix=given.cutmix or 0)
        sizes = {"channels": self.channels}
        if is_packaged(config.model):  # ours say it themselves
            sizes["image"] = self.side
        self.network = network_of(config, workers.device, self.classes, **sizes)
        batch = config.train.batch
        self.steps = -(-self.count // batch)
        if 0 < self.count % batch < workers.size:
            self.steps -= 1  # the last batch has no picture for some process
        self.loss = partial(F.cross_entropy, label_smoothing=config.train.label_smoothing)

    def load(self) -> None:
        """Read the data; set how many there are and what they look like."""
        split = in_memory(self.config)
        self.count, self.classes = len(split.train), split.train.classes
        _, self.channels, self.side, _ = split.train.pixels.shape
        self.data_about = describe_data(
            f"{len(split.train):,} and {len(split.test):,} pictures in memory, {self.side} pixels",
            *(
                values
                for part in (split.train, split.test)
                for values in (part.pixels, part.labels)
            ),
        )
        labels = noisy_labels(self.config, split.train.labels, self.classes)
        noisy = Images(split.train.pixels, labels, self.classes)
        self.data = Split(*(part.to(self.workers.device) for part in (noisy, split.test)))
        self.augment = self.augmentation(*split.train.channel_statistics())

    def augmentation(self, mean: Sequence[float], std: Sequence[float]) -> Augment:
        """Return what the configuration says is done to each picture."""
        given = self.config.input
        policy = RandAugment(given.rand_augment) if given.rand_augment is not None else None
        hole = given.cutout_side or 0
        return Augment(mean, std, given.padding or 0, bool(given.flip), hole, policy)

    def index_batches(self, epoch: int, first: int) -> Iterator[Sequence[int]]:
        """Yield this process's indices of every batch."""
        order = torch.randperm(
            self.count, generator=generator_for(self.config.seed, "order", epoch)
        )
        for chosen in order.split(self.config.train.batch)[first : self.steps]:
            yield self.workers.own_part(chosen.tolist())

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this process's part of every batch of an epoch, from number ``first`` on."""
        train = self.data.train
        for chosen in self.index_batches(epoch, first):
            yield train.pixels[chosen], train.labels[chosen]

    def forward(self, model: nn.Module, batch: Batch, step: int) -> Forward:
        """Return the pass of an augmented batch."""
        return self._augmented_pass(model, batch, "augmentation", step)

    def refresh(self, model: nn.Module, step: int) -> Forward:
        """Return the pass of an augmented minibatch of its own."""
        draws = generator_for(self.config.seed, "refresh", step)
        chosen = torch.randperm(self.count, generator=draws)[: self.config.refresh.batch]
        batch = self.fetch(self.workers.own_part(chosen.tolist()), step)
        return self._augmented_pass(model, batch, "refresh augmentation", step)

    def fetch(self, chosen: Sequence[int], step: int) -> Batch:
        """Return the training pictures of these indices."""
        return self.data.train.pixels[chosen], self.data.train.labels[chosen]

    def _augmented_pass(self, model: nn.Module, batch: Batch, purpose: str, step: int) -> Forward:
        pixels, labels = batch
        moment = (step, self.workers.rank)
        draws = generator_for(self.config.seed, purpose, *moment, device=pixels.device)
        x, targets = self.mix(self.augment(pixels, draws), labels, draws)

        def forward() -> tuple[Tensor, Tensor]:
            logits = model(x)
            return self.loss(logits, targets), logits

        return forward

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield this process's part of the pictures to evaluate on."""
        test = self.data.test
        mine = torch.arange(len(test), device=test.labels.device)
        # Parts may differ by one picture: sums are taken over the processes, not means.
        for chosen in mine[self.workers.rank :: self.workers.size].split(EVALUATED):
            yield test.pixels[chosen], test.labels[chosen]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy (percent) on the pictures to evaluate on."""
        self.network.eval()
        loss = right = 0.0
        count = 0
        for pixels, labels in self.evaluation_batches():
            logits = self.network(self.augment.without_augmentation(pixels)).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(1) == labels).sum())
            count += len(labels)
        loss, right, total = self.workers.sum_over_processes([loss, right, count])
        return {"test_loss": loss / total, "test_accuracy": 100 * right / total}

    def finish(self) -> dict[str, float]:
        """Return nothing more: every epoch's end is measured."""
        return {}


class FolderClassification(Classification):
    """Pictures that are decoded when they are needed, as ImageNet's (``train/`` and ``val/``)."""

    keys = Classification.keys | {"workers", "input.image"}

    def load(self) -> None:
        """List the files."""
        if self.config.data is None:
            raise DataError("data: ImageNet needs data=FOLDER with train/ and val/ in it")
        root, self.side = Path(self.config.data), self.config.input.image
        train, test = (ImageFolder(root / part, side=self.side) for part in ("train", "val"))
        self._refuse_other_folders(root, train, test)
        self.classes, self.channels = train.classes, 3
        order = train_order(self.config, len(train))
        if held := self.config.input.holdout:
            train, test = train.part(order[held:]), train.part(order[:held])
        if self.config.input.limit:
            train, test = (p.part(limited_order(self.config, len(p))) for p in (train, test))
        # Names, not pixels: to read them all would take as long as an epoch.
        self.data_about = describe_data(
            f"{len(train):,} and {len(test):,} pictures decoded from folders, {self.side} pixels",
            *(f"{p.parent.name}/{p.name} {label}" for p, label in train.files + test.files),
        )
        labels = torch.tensor([label for _, label in train.files])
        train.relabel(noisy_labels(self.config, labels, self.classes))
        self.folders, self.count = (train, test), len(train)
        self.augment = self.augmentation(IMAGENET_MEAN, IMAGENET_STD)

    def _refuse_other_folders(self, root: Path, train: ImageFolder, val: ImageFolder) -> None:
        """Refuse what is not ImageNet: another number of classes, or other ones to evaluate on."""
        if train.names != val.names:
            raise DataError(f"data: the class folders of {root}/train and {root}/val differ")
        if self.config.scale == "paper" and train.classes != IMAGENET_CLASSES:
            raise DataError(
                f"data: {root}/train has {train.classes} class folders, ImageNet 1,000; a part of "
                "it is another data set, whose numbers would stand beside the paper's"
            )

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this process's part of every batch, decoded by worker processes."""
        draws = generator_for(self.config.seed, "crops", epoch)
        crops = torch.randint(2**62, (self.count,), generator=draws).tolist()
        keys = [[(i, crops[i]) for i in chosen] for chosen in self.index_batches(epoch, first)]
        yield from self._decoded_batches(self.folders[0], keys)

    def fetch(self, chosen: Sequence[int], step: int) -> Batch:
        """Return the training pictures of these indices, randomly cropped."""
        draws = generator_for(self.config.seed, "refresh crops", step, self.workers.rank)
        crops = torch.randint(2**62, (len(chosen),), generator=draws).tolist()
        pictures, labels = zip(
            *(self.folders[0][i, c] for i, c in zip(chosen, crops, strict=True)), strict=True
        )
        device = self.workers.device
        return torch.stack(pictures).to(device), torch.tensor(labels, device=device)

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield this process's part of the pictures to evaluate on, the middle of each."""
        mine = range(self.workers.rank, len(self.folders[1]), self.workers.size)
        yield from self._decoded_batches(
            self.folders[1], [mine[i : i + EVALUATED] for i in range(0, len(mine), EVALUATED)]
        )

    def _decoded_batches(self, folder: ImageFolder, keys: Sequence[Any]) -> Iterator[Batch]:
        device = self.workers.device
        loader = torch.utils.data.DataLoader(
            folder,
            batch_sampler=keys,
            num_workers=self.config.workers,
            pin_memory=device.type == "cuda",
        )
        for pixels, labels in loader:
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
