"""Labelled data sets that torchvision fetches and checks: CIFAR-10 and Imagenette.

`CIFAR10`     60,000 small photographs of 10 classes
`Imagenette`  13,394 photographs of 10 of ImageNet's classes, labelled 0 ... 9 or as ImageNet does

Both have what every data set of `gnetlab.net.data` has; `data.load()` makes them by name (`NAMES`).
They lie in `ROOT`, are fetched there once, and never where the environment variable GNETLAB_OFFLINE
is set.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gnetlab.net import data

ROOT = "~/.cache/gnetlab"
# Imagenette's classes in order, with their numbers among ImageNet's 1000.
IMAGENET_CLASSES = {
    "tench": 0,
    "English springer": 217,
    "cassette player": 482,
    "chain saw": 491,
    "church": 497,
    "French horn": 566,
    "garbage truck": 569,
    "gas pump": 571,
    "golf ball": 574,
    "parachute": 701,
}


class CIFAR10(data._Indexed):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32 x 32.

    The whole set lies on the device, as bytes. `size` 32 (None) leaves the images as they are;
    another size resizes. `folder` holds cifar-10-batches-py (None: `ROOT`, fetched there).
    """

    in_channels = 3

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        from torchvision.datasets import CIFAR10 as Listed

        self.size, self.device = size or 32, torch.device(device)
        self._images, self._labels = {}, {}
        for split in ("train", "test"):
            listed = _listed("CIFAR-10", Listed, folder, train=split == "train")
            pixels = torch.from_numpy(listed.data).permute(0, 3, 1, 2).contiguous()
            self._images[split] = pixels.to(self.device)
            self._labels[split] = torch.tensor(listed.targets, device=self.device)
            self.classes = tuple(listed.classes)

    def _count(self, split: str) -> int:
        return len(self._labels[split])

    def _fetch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.device)
        images = data.normalize(self._images[split][indices])
        if self.size != 32:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return images, self._labels[split][indices]


class Imagenette(data._Indexed):
    """Imagenette (https://github.com/fastai/imagenette), its edition of 160 px, read lazily.

    9,469 images to train on and 3,925 to test on (its folder "val"), resized and cropped to `size`
    (None: 128) as `data.preprocess` does; above 140 that enlarges. `folder` holds imagenette2-160
    (None: `ROOT`, fetched there).

    labels   "own": 0 ... 9; "imagenet": the number among ImageNet's 1000 classes, so that
             `measure.loop.evaluate` gives the accuracy of a network with ImageNet weights.
             `classes` are the ten in either case, `imagenet_classes` their numbers
    """

    in_channels = 3
    classes = tuple(IMAGENET_CLASSES)
    imagenet_classes = tuple(IMAGENET_CLASSES.values())

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        size: int | None = None,
        labels: str = "own",
        device: torch.device | str = "cpu",
    ) -> None:
        from torchvision.datasets import Imagenette as Listed

        if labels not in ("own", "imagenet"):
            raise ValueError(f"labels={labels!r} asked; choose 'own' or 'imagenet'")
        self.size, self.device = size or 128, torch.device(device)
        self._samples = {}
        for split, name in (("train", "train"), ("test", "val")):
            listed = _listed("Imagenette", Listed, folder, split=name, size="160px")
            own = [self.classes.index(names[0]) for names in listed.classes]
            numbers = self.imagenet_classes if labels == "imagenet" else range(len(self.classes))
            self._samples[split] = [(p, numbers[own[label]]) for p, label in listed._samples]

    def _count(self, split: str) -> int:
        return len(self._samples[split])

    def _fetch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self._samples[split][i] for i in indices.tolist()]
        images = [data.preprocess(data.open_image(path).pixels, self.size) for path, _ in chosen]
        labels = torch.tensor([label for _, label in chosen])
        return torch.cat(images).to(self.device), labels.to(self.device)


NAMES: dict[str, Callable[..., data._Indexed]] = {
    "cifar10": CIFAR10,
    "imagenette": Imagenette,
    "imagenette:imagenet": functools.partial(Imagenette, labels="imagenet"),
}


def _listed(name: str, kind: Callable[..., Any], folder: str | Path | None, **options: Any) -> Any:
    """torchvision's data set, fetched into `ROOT` if it is neither there nor forbidden."""
    root = Path(folder or ROOT).expanduser()
    try:
        return kind(root, download=False, **options)
    except (RuntimeError, FileNotFoundError) as error:
        reason = str(error).replace(" You can use download=True to download it", "").strip(". ")
    if folder is None and os.environ.get(data.OFFLINE):
        reason = f"{data.OFFLINE} is set, so it is not fetched"
    elif folder is None:
        root.mkdir(parents=True, exist_ok=True)
        try:
            return kind(root, download=True, **options)
        except (OSError, RuntimeError) as error:
            reason = f"fetching it failed ({error})"
    raise FileNotFoundError(
        f"{name} not found, or damaged, in {root}: {reason}. Connect to the internet once, with "
        f"{data.OFFLINE} unset; or unpack its archive there; or use 'photocrops', which is always "
        "there"
    )
