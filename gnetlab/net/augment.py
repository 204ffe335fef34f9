"""Crops of the photographs under strong augmentation: what `gnetlab train bundled` learns from.

`AugmentedCrops`  PhotoCrops whose training crops are turned, sheared, recoloured and made noisy

Few images suffice for good early filters if augmentation is strong: Asano, Rupprecht and Vedaldi
2020, A critical analysis of self-supervision, or what we can learn from a single image, ICLR,
arXiv 1904.13132.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gnetlab.net.data import DEVIATION, MEAN, PhotoCrops, check_batch


class AugmentedCrops(PhotoCrops):
    """`PhotoCrops` with strong augmentation of the training crops; the test crops are as they are.

    A training crop is a square turned by up to 25 degrees, on demand by quarters too, of an aspect
    ratio of up to 4:3, mirrored in half of the cases; its colours are mixed by a random matrix near
    the identity, its contrast and brightness changed, a fifth of them grey, and noise is added.
    All of a crop lies inside a training region of its photograph.

    quarters   the class is the photograph and the quarter turn (64 classes: 4 * photograph +
               quarter), or the photograph alone, which is then not turned by quarters (16)
    """

    def __init__(
        self,
        *,
        size: int = 64,
        scale: tuple[int, int] = (40, 180),
        quarters: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(size=size, scale=scale, device=device)
        self.quarters = quarters
        if quarters:
            turns = ("upright", "a quarter turned", "upside down", "three quarters turned")
            self.classes = tuple(f"{name}, {turn}" for name in self.classes for turn in turns)

    def train_batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images (batch_size x 3 x size x size) and labels (batch_size) on the device."""
        check_batch(batch_size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        labels = torch.randint(len(self._places), (batch_size,), generator=generator)
        quarter = torch.randint(4 if self.quarters else 1, (batch_size,), generator=generator)
        grid = self._grid(labels, quarter, generator)
        pixels = F.grid_sample(self._atlas, grid.to(self.device), align_corners=False)
        images = pixels.view(3, batch_size, self.size, self.size).transpose(0, 1)
        labels = 4 * labels + quarter if self.quarters else labels
        return recolour(images, generator), labels.to(self.device)

    def test_batches(
        self, batch_size: int = 256, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The fixed test set of `PhotoCrops`: neither turned nor recoloured."""
        for images, labels in super().test_batches(batch_size, count):
            yield images, 4 * labels if self.quarters else labels

    def _grid(self, labels: Tensor, quarter: Tensor, generator: torch.Generator) -> Tensor:
        """Where in the atlas each pixel is read: 1 x (batch * size) x size x 2."""
        count, size = len(labels), self.size
        random = torch.rand(7, count, generator=generator)
        top, left, height, width = self._regions("train", labels, random[1]).float().unbind(1)
        angle = (random[0] * 2 - 1) * math.radians(25) + quarter * math.pi / 2
        aspect = (4 / 3) ** (random[2] - 0.5)  # of the sides, their product stays
        low, high = self.scale
        # The turned square needs this much more room than its side.
        room = (angle.cos().abs() + angle.sin().abs()) * aspect.maximum(1 / aspect)
        longest = torch.minimum(height, width) / room
        side = (low + random[3] * (high - low)).minimum(longest)
        middle_y = top + side * room / 2 + random[4] * (height - side * room)
        middle_x = left + side * room / 2 + random[5] * (width - side * room)
        level = (side / size).log2().round().clamp(0, 2).long()
        origin = torch.tensor([[row for row, _, _ in levels] for levels in self._places])
        reduction = (2.0**level)[:, None, None]
        steps = (torch.arange(size) + 0.5) / size - 0.5
        u = steps[None, None, :] * (side * aspect * (1 - 2 * (random[6] < 0.5)))[:, None, None]
        v = steps[None, :, None] * (side / aspect)[:, None, None]
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        rows = (middle_y[:, None, None] + u * sin + v * cos) / reduction
        columns = (middle_x[:, None, None] + u * cos - v * sin) / reduction + 1
        rows = rows + origin[labels, level][:, None, None]
        high, wide = self._atlas.shape[2:]
        grid = torch.stack([columns * (2 / wide) - 1, rows * (2 / high) - 1], dim=-1)
        return grid.view(1, count * size, size, 2)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random colours, contrast, greyness and noise: N x 3 x H x W normalized, and back.

    Drawn on the CPU, so that every device sees the same.
    """
    count, device = len(images), images.device
    mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=device).view(1, 3, 1, 1)
    mixing = torch.eye(3) + 0.35 * torch.randn(count, 3, 3, generator=generator)
    mixing = mixing / mixing.sum(2, keepdim=True).clamp(min=0.3)  # grey stays about grey
    grey = torch.rand(count, generator=generator) < 0.2
    mixing[grey] = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 0.3 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    noise = 0.05 * torch.rand(count, 1, 1, 1, generator=generator)
    rgb = images * deviation + mean
    rgb = torch.einsum("nij,njhw->nihw", mixing.to(device), rgb)
    level = rgb.mean((1, 2, 3), keepdim=True)
    rgb = (rgb - level) * contrast.to(device) + level + brightness.to(device)
    grain = torch.randn(images.shape, generator=generator).to(device) * noise.to(device)
    return ((rgb + grain).clamp(-0.2, 1.2) - mean) / deviation
