"""Images and data sets, most of which work offline, and the preprocessing of all of them.

`photographs()`   16 photographs and textures out of scikit-image's wheel
`open_image()`    a photograph by name, or the reader's own file
`preprocess()`    RGB uint8 -> normalized 1 x 3 x size x size
`load()`          a labelled data set by name: "photocrops", "fashion-mnist", "folder:PATH", ...
`fingerprint()`   what a data set holds, as a SHA-256
`PhotoCrops`      classification set made of the photographs: which one is this crop from?
`FashionMNIST`, `ImageFolder`

Every data set has `classes`, `in_channels`, `size`, `train_batch(step, batch_size, seed)` and
`test_batches(batch_size, count)`. A training batch depends on nothing but its three arguments, so
that an interrupted training goes on exactly where it stopped. Images are float32, normalized with
ImageNet's mean and deviation (grey ones with the data set's own).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

# What Pillow raises for a file it cannot read; SyntaxError is for a broken PNG.
_UNREADABLE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError,
)  # fmt: skip
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB in [0, 1]
OFFLINE = "GNETLAB_OFFLINE"  # an environment variable; set to anything: never fetch
FASHION_MNIST_FOLDERS = (
    "/usr/share/datasets/fashion-mnist",  # Debian's package dataset-fashion-mnist
    "~/.cache/gnetlab/FashionMNIST/raw",
)

# name: (function of skimage.data, what it shows)
_PHOTOGRAPHS = {
    "astronaut": ("astronaut", "portrait of Eileen Collins, NASA"),
    "brick": ("brick", "brick wall, CC0 Textures"),
    "camera": ("camera", "cameraman, Lav Varshney, CC0"),
    "cat": ("chelsea", "Chelsea the cat, Stéfan van der Walt, CC0"),
    "cell": ("cell", "cell under a microscope, Dorothea Schnieder and others, CC0"),
    "coffee": ("coffee", "cup of coffee, Rachel Michetti, CC0"),
    "coins": ("coins", "Greek coins from Pompeii, Brooklyn Museum"),
    "grass": ("grass", "grass, Dylan Kahn, CC0"),
    "gravel": ("gravel", "gravel, CC0 Textures"),
    "hubble": ("hubble_deep_field", "eXtreme Deep Field, NASA and ESA"),
    "moon": ("moon", "surface of the moon, NASA"),
    "motorcycle": ("stereo_motorcycle", "motorcycle, Middlebury stereo benchmark, CC0"),
    "page": ("page", "scanned page of a book"),
    "retina": ("retina", "fundus of the eye, Häggström, CC0"),
    "rocket": ("rocket", "launch of Falcon 9, SpaceX, CC0"),
    "tissue": ("immunohistochemistry", "stained colon tissue, Johns Hopkins"),
}


class Photograph(NamedTuple):
    """An image with its name and origin; `pixels` is H x W x 3 uint8 RGB."""

    name: str
    pixels: np.ndarray
    source: str


@functools.cache
def _photograph(name: str) -> Photograph:
    import skimage.data

    function, source = _PHOTOGRAPHS[name]
    pixels = getattr(skimage.data, function)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    pixels = np.ascontiguousarray(pixels[:, :, :3])
    pixels.flags.writeable = False  # shared by all callers
    return Photograph(name, pixels, f"{source} (scikit-image)")


def photographs() -> dict[str, Photograph]:
    """The 16 photographs by name, in alphabetical order; they come with scikit-image: no download.

    Name -> `Photograph`: `name`, `pixels` (H x W x 3 uint8 RGB, read-only), `source` (what it shows
    and its license). Functions that take an image take these names too.

    >>> import gnetlab as gl
    >>> list(gl.photographs())[:5]
    ['astronaut', 'brick', 'camera', 'cat', 'cell']
    >>> gl.photographs()["cat"].pixels.shape
    (300, 451, 3)
    >>> from gnetlab.net.data import preprocess  # what a network takes
    >>> preprocess(gl.photographs()["cat"].pixels, size=64).shape
    torch.Size([1, 3, 64, 64])
    """
    return {name: _photograph(name) for name in _PHOTOGRAPHS}


def open_image(image: str | Path) -> Photograph:
    """A photograph by name, or an image file by path, as RGB.

    An image of floats has values in 0..1. Raises FileNotFoundError for what is neither and
    ValueError for an unreadable file, or floats beyond 0..1.
    """
    if str(image) in _PHOTOGRAPHS:
        return _photograph(str(image))
    path = Path(image).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"image {str(image)!r}: no such file, nor one of the photographs; give the path of a "
            f"PNG, JPEG, WebP or TIFF file, or one of {', '.join(_PHOTOGRAPHS)}"
        )
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)  # as the camera was held
            if upright.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            elif upright.mode == "F":  # floats, which Pillow would cut off in the same way
                upright = Image.fromarray(_bytes(np.asarray(upright)))
            pixels = np.asarray(upright.convert("RGB"))
    except _UNREADABLE as error:
        raise ValueError(
            f"image {path} cannot be read ({error}); give a PNG, JPEG, WebP or TIFF file"
        ) from error
    return Photograph(path.stem, pixels, path.name)


def _bytes(values: np.ndarray) -> np.ndarray:
    """Floats in 0..1 -> uint8."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"floats from {low:g} to {high:g}, where 0..1 is black to white: scale them to that, "
            "or save 8 or 16 bits"
        )
    return (255 * values).round().astype(np.uint8)


def normalize(pixels: Tensor) -> Tensor:
    """N x 3 x H x W uint8 or float in 0..255 -> float32 with ImageNet's mean and deviation."""
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / deviation


def crop(pixels: np.ndarray, size: int = 224) -> np.ndarray:
    """The central square, size x size x 3 uint8: short side resized to 256/224 of it, antialiased.

    What `preprocess` shows the network, to be drawn beside its maps.
    """
    height, width = pixels.shape[:2]
    scale = round(size * 256 / 224) / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    square = image[0, :, top : top + size, left : left + size]
    return square.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def preprocess(pixels: np.ndarray, size: int = 224) -> Tensor:
    """H x W x 3 uint8 RGB -> 1 x 3 x size x size, normalized: resize, centre crop."""
    return normalize(torch.from_numpy(crop(pixels, size)).permute(2, 0, 1)[None])


def load(
    name: str, *, size: int | None = None, device: torch.device | str = "cpu"
) -> PhotoCrops | _Indexed:
    """A labelled data set: "photocrops", "fashion-mnist", "folder:PATH", "cifar10", "imagenette".

    "imagenette:imagenet" labels Imagenette's images by ImageNet's 1000 classes. `size` is the side
    of the images in pixels (None: 32; of Imagenette 128). Raises ValueError for an unknown name
    and FileNotFoundError for missing data; both say what there is and how to get it.
    """
    check_name(name)
    if name == "photocrops":
        return PhotoCrops(size=size or 32, device=device)
    if name == "fashion-mnist":
        return FashionMNIST(size=size or 32, device=device)
    if name.startswith("folder:"):
        return ImageFolder(name.removeprefix("folder:"), size=size or 32, device=device)
    from gnetlab.net import datasets  # it builds on this file

    return datasets.NAMES[name](size=size, device=device)


def check_name(name: str) -> None:
    """Raise ValueError for a data set that `load` does not know."""
    from gnetlab.net import datasets

    known = ("photocrops", "fashion-mnist", *datasets.NAMES)
    if name in known or name.startswith("folder:"):
        return
    raise ValueError(
        f"unknown data set {name!r}. Known: 'photocrops' (always there), 'fashion-mnist' (Debian: "
        "apt install dataset-fashion-mnist; else fetched), 'folder:PATH' (PATH/train/CLASS/*.jpg "
        f"and PATH/test/CLASS/*.jpg), {', '.join(map(repr, datasets.NAMES))} (fetched)"
    )


class PhotoCrops:
    """Which photograph is this crop from? 16 classes, 3 channels, always available.

    Training and test crops come from disjoint regions: test crops from the middle fifth of a
    photograph's longer side, training crops from both sides of it, with gaps of 8 px. A crop is a
    square of 48 to 160 px of the photograph (those larger than 512 px are reduced first), smaller
    where its region is, half of them mirrored, resized to size x size.

    All crops of a batch are cut by one `grid_sample` on the device, out of an atlas that holds
    every photograph at full, half and quarter resolution: a crop reads from the level nearest to
    its own reduction, which keeps aliasing low.
    """

    classes = tuple(_PHOTOGRAPHS)
    TEST_SHARE = 0.2
    LARGEST = 512

    def __init__(
        self,
        *,
        size: int = 32,
        scale: tuple[int, int] = (48, 160),
        test_size: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        self.in_channels, self.size, self.scale, self.test_size = 3, size, scale, test_size
        self.device = torch.device(device)
        self._atlas, self._places = _atlas(self.LARGEST)
        self._atlas = self._atlas.to(self.device)

    def train_batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images (batch_size x 3 x size x size) and labels (batch_size) on the device."""
        check_batch(batch_size)
        return self._cut(*self._draw("train", batch_size, seed * 1_000_003 + step))

    def test_batches(
        self, batch_size: int = 256, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The fixed test set of `test_size` crops, or only `count`, as many of each photograph."""
        whole = self._draw("test", self.test_size, 10**9 + 7)
        if count is not None:
            whole = [drawn[_in_turn(whole[0])[:count]] for drawn in whole]
        for part in zip(*(drawn.split(batch_size) for drawn in whole), strict=True):
            yield self._cut(*part)

    def regions(self, split: str, photograph: int) -> list[tuple[int, int, int, int]]:
        """Top, left, height, width in pixels of the parts of a photograph that `split` may see."""
        _, height, width = self._places[photograph][0]
        long, short = max(height, width), min(height, width)
        first, last = (round(long * (1 + sign * self.TEST_SHARE) / 2) for sign in (-1, 1))
        gap = 8  # reducing to a quarter mixes pixels up to 4 away: no crop sees across
        spans = [(0, first - gap), (last + gap, long)] if split == "train" else [(first, last)]
        if height >= width:
            return [(start, 0, end - start, short) for start, end in spans]
        return [(0, start, short, end - start) for start, end in spans]

    def _regions(self, split: str, labels: Tensor, random: Tensor) -> Tensor:
        """One part, chosen by `random` in [0, 1), of each labelled photograph: count x 4."""
        parts = torch.tensor([self.regions(split, i) for i in range(len(self._places))])
        return parts[labels, (random * parts.shape[1]).long()]

    def _draw(self, split: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, squares (top, left, side in pixels of the photograph) and whether mirrored."""
        # Drawn on the CPU, so that every device sees the same crops.
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(self._places), (count,), generator=generator)
        random = torch.rand(5, count, generator=generator)
        top, left, height, width = self._regions(split, labels, random[4]).unbind(1)
        low, high = self.scale
        side = (low + random[0] * (high - low)).minimum(torch.minimum(height, width))
        top, left = top + random[1] * (height - side), left + random[2] * (width - side)
        return labels, torch.stack([top, left, side], dim=1), random[3] < 0.5

    def _cut(self, labels: Tensor, squares: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        count, size = len(labels), self.size
        top, left, side = (values[:, None] for values in squares.unbind(1))
        level = (side[:, 0] / size).log2().round().clamp(0, 2).long()
        origin = torch.tensor([[row for row, _, _ in levels] for levels in self._places])
        origin, reduction = origin[labels, level][:, None], 2.0 ** level[:, None]
        steps = (torch.arange(size) + 0.5) / size
        rows = (top + side * steps) / reduction + origin
        columns = (left + side * steps) / reduction + 1  # 1: the border on the left
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        height, width = self._atlas.shape[2:]
        shape = (count, size, size)
        x = (columns * (2 / width) - 1)[:, None, :].expand(shape)
        y = (rows * (2 / height) - 1)[:, :, None].expand(shape)
        grid = torch.stack([x, y], dim=-1).view(1, count * size, size, 2).to(self.device)
        pixels = F.grid_sample(self._atlas, grid, align_corners=False)
        images = pixels.view(3, count, size, size).transpose(0, 1).contiguous()
        return images, labels.to(self.device)


def fingerprint(data: Any) -> str:
    """SHA-256 of a data set's images and labels, or of its files, with the classes' names.

    Whatever the folder, device and image size: the same data give the same digits.
    """
    digest = hashlib.sha256(repr(tuple(data.classes)).encode())
    if isinstance(data, PhotoCrops):
        digest.update(data._atlas.cpu().numpy().tobytes())
    for split in ("train", "test"):
        if hasattr(data, "_images"):
            digest.update(data._images[split].cpu().numpy().tobytes())
            digest.update(data._labels[split].cpu().numpy().tobytes())
        elif hasattr(data, "_samples"):
            for path, label in data._samples[split]:
                digest.update(f"{Path(path).name} {label}".encode())
                digest.update(Path(path).read_bytes())
    return digest.hexdigest()


@functools.cache
def _atlas(largest: int) -> tuple[Tensor, list[list[tuple[int, int, int]]]]:
    """All photographs at three resolutions, one above the other: 1 x 3 x H x W, normalized.

    With it, for every photograph and level: the row where it starts (its column is 1), its height
    and its width.
    """
    images, places, row = [], [], 0
    for photograph in photographs().values():
        image = torch.from_numpy(photograph.pixels.copy()).permute(2, 0, 1)[None].float()
        shrink = max(1.0, max(image.shape[2:]) / largest)
        levels = []
        for level in range(3):
            shape = [max(1, round(side / shrink / 2**level)) for side in image.shape[2:]]
            small = F.interpolate(image, shape, mode="bilinear", antialias=True)
            levels.append((row + 1, *shape))
            # A border of the outermost pixels: bilinear reading at the edge mixes nothing foreign.
            small = F.pad(normalize(small), (1, 1, 1, 1), mode="replicate")
            images.append(small)
            row += small.shape[2]
        places.append(levels)
    width = max(image.shape[3] for image in images)
    images = [F.pad(image, (0, width - image.shape[3])) for image in images]
    return torch.cat(images, dim=2), places


class _Indexed(ABC):
    """A data set of numbered images: shuffled anew every epoch, from the seed."""

    classes: tuple[str, ...]
    in_channels: int
    size: int
    device: torch.device

    @abstractmethod
    def _count(self, split: str) -> int:
        """Number of images in a split."""

    @abstractmethod
    def _fetch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of these numbers, on the device."""

    def train_batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images (batch_size x C x size x size) and labels (batch_size) on the device."""
        count = self._count("train")
        check_batch(batch_size, count)
        per_epoch = count // batch_size
        epoch, position = divmod(step, per_epoch)
        order = _shuffled(count, seed * 1_000_003 + epoch)
        return self._fetch("train", order[position * batch_size : (position + 1) * batch_size])

    def test_batches(
        self, batch_size: int = 256, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set, in order, or only `count` images, as many of each class."""
        if count is None:
            chosen = torch.arange(self._count("test"))
        elif hasattr(self, "_labels"):
            chosen = _in_turn(self._labels["test"].cpu())[:count]
        else:
            chosen = _in_turn(torch.tensor([label for _, label in self._samples["test"]]))[:count]
        for indices in chosen.split(batch_size):
            yield self._fetch("test", indices)


def _in_turn(labels: Tensor) -> Tensor:
    """Indices of all labels, such that no class comes again before every other has."""
    order = labels.argsort(stable=True)
    first = torch.searchsorted(labels[order], labels[order])
    return order[(torch.arange(len(order)) - first).argsort(stable=True)]


def check_batch(batch_size: int, count: int | None = None) -> None:
    """Raise ValueError for a batch without images, or with more than there are."""
    if batch_size < 1 or (count is not None and batch_size > count):
        there = "" if count is None else f", but there are {count} images to train on"
        most = "" if count is None else f" and at most {count}"
        raise ValueError(f"batch_size={batch_size} asked{there}; give at least 1{most}")


@functools.lru_cache(maxsize=2)
def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class FashionMNIST(_Indexed):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of 28 x 28, padded to 32.

    Read from `folder`, else from Debian's package, else fetched through torchvision. The whole
    set lies on the device. `size` 32 pads; another size resizes.
    """

    classes = (
        "t-shirt", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    in_channels = 1

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.device = size, torch.device(device)
        place = _fashion_mnist_folder(folder)
        self._images, self._labels = {}, {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = _read_idx(place / f"{prefix}-images-idx3-ubyte", dimensions=3)
            labels = _read_idx(place / f"{prefix}-labels-idx1-ubyte", dimensions=1)
            if len(images) != len(labels):
                raise ValueError(
                    f"{place} has {len(images)} {split} images and {len(labels)} labels, which "
                    "belong to different data sets; install it again"
                )
            self._images[split] = torch.from_numpy(images).unsqueeze(1).to(self.device)
            self._labels[split] = torch.from_numpy(labels).long().to(self.device)

    def _count(self, split: str) -> int:
        return len(self._labels[split])

    def _fetch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.device)
        images = F.pad(self._images[split][indices].float() / 255, (2, 2, 2, 2))
        if self.size != 32:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return (images - 0.2860) / 0.3530, self._labels[split][indices]


def _fashion_mnist_folder(folder: str | Path | None) -> Path:
    places = [Path(p).expanduser() for p in ([folder] if folder else FASHION_MNIST_FOLDERS)]
    for place in places:
        if any(place.glob("train-images-idx3-ubyte*")):
            return place
    if folder is None and os.environ.get(OFFLINE):
        reason = f"{OFFLINE} is set, so it is not fetched"
    elif folder is None:
        from torchvision.datasets import FashionMNIST as Fetched

        try:
            Fetched(places[-1].parent.parent, download=True)
            return places[-1]
        except (OSError, RuntimeError) as error:
            reason = f"fetching it failed ({error})"
    else:
        reason = "no train-images-idx3-ubyte there"
    raise FileNotFoundError(
        f"Fashion-MNIST not found in {', '.join(map(str, places))}: {reason}. On Debian or Ubuntu: "
        "apt install dataset-fashion-mnist; elsewhere connect to the internet once; or use "
        "'photocrops', which is always there"
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file (LeCun's MNIST format) of bytes, gzipped or not, as a uint8 array."""
    zipped = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
        kind = content[:4]  # two zeros, the type of the values (8: bytes), the dimensions
        if kind != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it starts with {kind.hex()}, not with 000008{dimensions:02}")
        shape = np.frombuffer(content, ">u4", dimensions, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole IDX file ({error}); install it again") from error


class ImageFolder(_Indexed):
    """Your own images: PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg (or val), RGB."""

    in_channels = 3

    def __init__(
        self, folder: str | Path, *, size: int = 32, device: torch.device | str = "cpu"
    ) -> None:
        from torchvision.datasets import ImageFolder as Listed

        self.size, self.device = size, torch.device(device)
        root = Path(folder).expanduser()
        held_out = root / "test" if (root / "test").is_dir() else root / "val"
        for place in (root / "train", held_out):
            if not place.is_dir():
                raise FileNotFoundError(
                    f"folder:{folder} asked, but {place} is not a folder; expected "
                    "PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg (or val)"
                )
        try:
            listed = {"train": Listed(root / "train"), "test": Listed(held_out)}
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"folder:{folder} asked: {str(error).splitlines()[0]}. It takes at least one image "
                "per class: PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg (or val)"
            ) from error
        if listed["train"].classes != listed["test"].classes:
            differ = sorted(set(listed["train"].classes) ^ set(listed["test"].classes))
            raise ValueError(
                f"{root}: train and test have different classes: {', '.join(differ)}; each class "
                "needs a folder in both"
            )
        self.classes = tuple(listed["train"].classes)
        self._samples = {split: found.samples for split, found in listed.items()}

    def _count(self, split: str) -> int:
        return len(self._samples[split])

    def _fetch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self._samples[split][i] for i in indices.tolist()]
        images = [preprocess(open_image(path).pixels, self.size) for path, _ in chosen]
        labels = torch.tensor([label for _, label in chosen])
        return torch.cat(images).to(self.device), labels.to(self.device)
