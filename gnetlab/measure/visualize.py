"""What a channel looks for: images that excite it most, made by gradient ascent.

`visualize_channel()`  one image per channel of a module, and the activation that it reaches
`Visualized`           what it returns

Source: Olah, Mordvintsev and Schubert 2017, Feature Visualization, Distill,
https://distill.pub/2017/feature-visualization. Parametrization, colours and transformations are
those of Lucid (Apache-2.0), https://github.com/tensorflow/lucid.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.measure.costs import locate
from gnetlab.measure.hooks import in_mode, observe
from gnetlab.measure.memory import in_parts
from gnetlab.net import data

OBJECTIVES = ("channel", "neuron")
START = 0.01  # standard deviation of the spectrum at the start
PADDING = 6  # pixels of grey around the image on each side, where jitter leaves it in the middle
JITTERS = (4, 2)  # pixels to each side, before and after scaling and rotating
SCALES = tuple(1 + (i - 5) / 50 for i in range(11))
ANGLES = (*range(-10, 11), 0, 0, 0, 0, 0)  # degrees
# Square root of the colours' covariance in ImageNet, from Lucid, scaled to a largest norm of 1.
COLOURS = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
COLOURS /= np.linalg.norm(COLOURS, axis=0).max()


class Visualized(NamedTuple):
    """`images`: uint8 RGB, count x size x size x 3; `frame`: a row for each, in the same order."""

    images: np.ndarray
    frame: pd.DataFrame


class _Unit(NamedTuple):
    """A channel of a module, and the module to watch for it: its last ReLU, where it has one."""

    module: str
    channel: int
    concat_index: int | None
    watched: str
    rectified: bool


class _Reached(Exception):
    """The forward pass has come as far as it needs to."""


def visualize_channel(
    model: nn.Module,
    name: str,
    channels: int | Iterable[int],
    *,
    steps: int = 256,
    size: int = 128,
    objective: str = "channel",
    learning_rate: float = 0.05,
    transform: bool = True,
    seed: int = 0,
) -> Visualized:
    """For each of some channels of a module, the image that gradient ascent makes it love.

    model          any network for RGB images
    name           a module: "inception3a.branch5x5" (channels count in the branch), "inception3a"
                   (channels count in the concatenated output), "conv1", "fc" (classes)
    channels       one or several; together they take less time than one by one, and come out the
                   same but for what rounding grows to
    steps          of Adam, with `learning_rate`
    size           side of the images in pixels
    objective      "channel": mean of the channel's map; "neuron": the unit at its centre
    transform      shift, scale and rotate the image at random in every step, on grey ground, so
                   that what is found survives it; False for a single unit of an early layer, which
                   sees little more than the shifts
    seed           of the start and the transformations; equal seeds give equal images

    An image is a spectrum weighted by 1 / frequency, in colours that are uncorrelated in
    photographs. A channel that is zero everywhere is raised where it is nearest to waking up, ahead
    of its ReLU, if that is an nn.ReLU and the module's last step (else the image stays grey). The
    forward pass stops at the module. Columns of the frame: `module`, `stage`, `branch`, `channel`
    (in the branch), `concat_index` (in the Inception module's output, NA elsewhere), `start`,
    `reached` (the objective on the whole image, untransformed: at the start, nearly grey, and at
    the end; no unit).

    The model is put into eval mode for the call; its gradients and the global random state stay as
    they are. Raises ValueError for unknown names, channels and objectives, RuntimeError for a
    module that does not run.

    Source: Olah, Mordvintsev and Schubert 2017, https://distill.pub/2017/feature-visualization.

    >>> import gnetlab as gl
    >>> model = gl.googlenet("cifar", width=0.125, seed=0)
    >>> found = gl.visualize_channel(model, "inception3a", [0, 1], steps=2, size=32)
    >>> found.images.shape, list(found.frame.module.unique())
    ((2, 32, 32, 3), ['inception3a.branch1x1'])
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} asked; choose 'channel' or 'neuron'")
    if steps < 0 or size < 1:
        raise ValueError(f"steps={steps}, size={size} asked; give steps >= 0 and size >= 1")
    channels = [channels] if isinstance(channels, int | np.integer) else list(channels)
    channels = [c.item() if isinstance(c, Tensor) else c for c in channels]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        in_mode(model, training=False),
        _out_of_place(model),
    ):
        units = _units(model, name, channels, next(model.parameters()).new_zeros(1, 3, size, size))

        def excite(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            options = objective, learning_rate, transform, seed
            return _ascent(model, units[part], steps, size, *options)

        image, start, reached = map(torch.cat, zip(*in_parts(excite, len(units)), strict=True))
    rows = []
    for unit, *values in zip(units, start.tolist(), reached.tolist(), strict=True):
        values = [max(value, 0.0) if unit.rectified else value for value in values]
        place = (unit.module, *locate(unit.module), unit.channel, unit.concat_index)
        rows.append((*place, *values))
    columns = ["module", "stage", "branch", "channel", "concat_index", "start", "reached"]
    frame = pd.DataFrame(rows, columns=columns).astype({"concat_index": "Int64"})
    pixels = (image * 255).round().byte().permute(0, 2, 3, 1)
    return Visualized(pixels.cpu().numpy(), frame)


@contextlib.contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """ReLUs leave their inputs as they are, to be looked at."""
    changed = [m for m in model.modules() if isinstance(m, nn.ReLU) and m.inplace]
    try:
        for module in changed:
            module.inplace = False
        yield
    finally:
        for module in changed:
            module.inplace = True


def _ascent(
    model: nn.Module, units: list[_Unit], steps: int, size: int, objective: str,
    learning_rate: float, transform: bool, seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Images (N x 3 x size x size), and how much they excite their units before and after (N)."""
    generator, like = torch.Generator().manual_seed(seed), next(model.parameters())
    # The same start for every channel: alone or among others, it ends at the same image.
    noise = START * torch.randn(3, size, size // 2 + 1, 2, generator=generator)
    spectrum = noise.to(like.device).repeat(len(units), 1, 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([spectrum], learning_rate)
    with torch.no_grad():
        start = _excitation(model, units, objective, _image(spectrum, size).to(like))
    for _ in range(steps):
        image = _image(spectrum, size)
        image = _transformed(image, generator) if transform else image
        total = _excitation(model, units, objective, image.to(like)).sum()
        spectrum.grad = -torch.autograd.grad(total, spectrum)[0]  # and nothing else's
        optimizer.step()
    with torch.no_grad():
        image = _image(spectrum, size)
        reached = _excitation(model, units, objective, image.to(like))
    return image, start, reached


def _units(model: nn.Module, name: str, channels: list[int], blank: Tensor) -> list[_Unit]:
    """Where these channels of a module are; `blank` is an image to learn their number from."""
    count = _outputs(model, {name}, blank)[name].shape[1]
    wrong = [c for c in channels if not isinstance(c, int | np.integer) or not 0 <= c < count]
    if wrong or not channels:
        asked = f"channel {wrong[0]!r} of {name!r} asked" if wrong else f"no channel of {name!r}"
        raise ValueError(f"{asked}; it has {count}: give some of 0 ... {count - 1}")
    units = []
    for channel in map(int, channels):
        module, index, concat = name, channel, None
        for branch, part in getattr(model.get_submodule(name), "branch_slices", {}).items():
            if part.start <= channel < part.stop:
                module, index, concat = f"{name}.{branch}", channel - part.start, channel
        parent, _, child = name.rpartition(".")
        part = getattr(model.get_submodule(parent), "branch_slices", {}).get(child)
        concat = part.start + channel if part else concat
        watched = _last_step(model, module)
        rectified = isinstance(model.get_submodule(watched), nn.ReLU)
        units.append(_Unit(module, index, concat, watched, rectified))
    return units


def _last_step(model: nn.Module, name: str) -> str:
    """The ReLU that ends a sequence, or else the module itself."""
    module, path = model.get_submodule(name), name
    while isinstance(module, nn.Sequential) and len(module):
        child, module = list(module.named_children())[-1]
        path = f"{path}.{child}"
    return path if isinstance(module, nn.ReLU) else name


def _outputs(model: nn.Module, names: set[str], images: Tensor) -> dict[str, Tensor]:
    """Outputs of these modules (of a ReLU its input), running the model no further than them."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs[name] = inputs[0] if isinstance(module, nn.ReLU) else output
        if outputs.keys() == names:
            raise _Reached

    with observe(model, sorted(names), keep), contextlib.suppress(_Reached):
        model(images)
    if outputs.keys() != names:
        missing = ", ".join(sorted(names - outputs.keys()))
        raise RuntimeError(
            f"{missing} never ran; auxiliary heads run only in training mode: give another"
        )
    return outputs


def _excitation(model: nn.Module, units: list[_Unit], objective: str, images: Tensor) -> Tensor:
    """How much each image (N x 3 x H x W in 0 ... 1) excites its own unit: N.

    Below zero for a ReLU that is zero everywhere: what its largest input lacks.
    """
    pixels = data.normalize(images * 255).to(images.dtype)
    outputs = _outputs(model, {unit.watched for unit in units}, pixels)
    excited = []
    for i, unit in enumerate(units):
        values = outputs[unit.watched][i, unit.channel]
        if objective == "neuron":
            values = values[tuple(side // 2 for side in values.shape)]
        alive = not unit.rectified or bool(values.max() > 0)
        active = values.relu() if unit.rectified else values
        excited.append(active.mean() if alive else values.max())
    return torch.stack(excited)


def _image(spectrum: Tensor, size: int) -> Tensor:
    """N x 3 x size x (size // 2 + 1) x 2 -> RGB in 0 ... 1, N x 3 x size x size."""
    rows = torch.fft.fftfreq(size, device=spectrum.device)[:, None]
    frequency = torch.hypot(rows, torch.fft.rfftfreq(size, device=spectrum.device))
    weight = size / frequency.clamp(min=1 / size)
    image = torch.fft.irfft2(torch.view_as_complex(spectrum) * weight, s=(size, size)) / 4
    colours = torch.tensor(COLOURS, dtype=image.dtype, device=image.device)
    return torch.einsum("ij,njhw->nihw", colours, image).sigmoid()


def _transformed(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted, scaled and turned at random, all images alike; grey around, PADDING on each side."""
    random = torch.rand(2, generator=generator).tolist()
    scale = SCALES[int(random[0] * len(SCALES))]
    angle = math.radians(ANGLES[int(random[1] * len(ANGLES))])
    shift = sum(torch.randint(-j, j + 1, (2,), generator=generator) for j in JITTERS).tolist()
    count, colours, side, _ = image.shape
    wide = side + 2 * PADDING
    cos, sin = (f(angle) * wide / side / scale for f in (math.cos, math.sin))
    x, y = (2 * pixels / side for pixels in shift)
    affine = torch.tensor([[cos, -sin, x], [sin, cos, y]], device=image.device)
    grid = F.affine_grid(affine.expand(count, 2, 3), [count, colours, wide, wide], False)
    return F.grid_sample(image - 0.5, grid, align_corners=False) + 0.5
