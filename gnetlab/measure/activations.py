"""What the branches put out, measured over any number of images in constant memory.

`branch_statistics()`  per channel: mean, variance, zero fraction, energy, share of the module's
`branch_summary()`     the same per branch, with dead channels and the effective rank
`random_control()`     the same network with random weights, for what the architecture alone gives
`liveliest_channels()`  of every branch the maps that vary most over one image
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import locate
from gnetlab.measure.devices import float64
from gnetlab.measure.hooks import in_mode, record
from gnetlab.measure.memory import in_parts
from gnetlab.net.model import GoogLeNet, branch_names, build
from gnetlab.net.weights import calibrate_batch_norm


class _Sums(NamedTuple):
    """Per channel, over images and positions, in float64; `count` is values per channel."""

    count: int
    total: Tensor
    squares: Tensor
    nonzero: Tensor


def _accumulate(sums: _Sums | None, maps: Tensor) -> _Sums:
    # vector_norm reads a map once and makes no copy of it. Half precision is summed in float32, and
    # only a map's own positions; images are added up in float64, where nothing is lost.
    wide = torch.float64 if maps.dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(maps, order, (2, 3), dtype=wide) for order in (2, 0)]
    new = _Sums(
        maps.numel() // maps.shape[1],
        float64(maps.sum((2, 3), dtype=wide)).sum(0),
        float64(norms[0]).square().sum(0),
        float64(norms[1]).sum(0),
    )
    return new if sums is None else _Sums(*(a + b for a, b in zip(sums, new, strict=True)))


class Moments(NamedTuple):
    """Over images and positions, in float64: values per channel, sums (C), products (C x C)."""

    count: int
    total: Tensor
    products: Tensor

    def covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)


def add_moments(moments: Moments | None, maps: Tensor) -> Moments:
    """A `reduce=` for `record`."""
    values = maps.transpose(0, 1).flatten(1).float()
    # Half precision would overflow, and float32 sums over all images would lose digits.
    new = Moments(values.shape[1], float64(values.sum(1)), float64(values @ values.T))
    if moments is None:
        return new
    return Moments(*(a + b for a, b in zip(moments, new, strict=True)))


def branch_statistics(model: nn.Module, batches: Tensor | Iterable[Tensor]) -> pd.DataFrame:
    """Statistics of every channel of every branch of `model`.

    batches   images, N x C x H x W each, on the model's device: one tensor, or any number of them

    Columns: `module` (dotted name of the branch), `stage`, `branch`, `channel` (index within the
    branch), `concat_index` (index in the module's output), `mean`, `variance` (population),
    `zero_fraction` (share of exact zeros), `energy` (mean square), `energy_share` (of its
    module's energy; sums to 1 per module), `channel_share` (1 / channels of the module), one row
    per channel, over all images and positions. No units: activations are what they are.

    The model runs in eval mode and without gradients; its mode is restored. Memory does not grow
    with the number of batches. Raises ValueError for a network that is not gnetlab's, and for no
    images.

    >>> import gnetlab as gl
    >>> from gnetlab.net.data import load
    >>> images, labels = load("photocrops").train_batch(0, batch_size=8)
    >>> frame = gl.branch_statistics(gl.googlenet("cifar", width=0.125, seed=0), images)
    >>> frame.shape  # channels of all branches x columns
    (686, 11)
    >>> frame.groupby("stage", sort=False).energy_share.sum().round(6).to_dict()["3a"]
    1.0
    >>> frame.zero_fraction.between(0, 1).all()
    np.True_
    """
    return _statistics(_streamed(model, batches, _accumulate))


def _streamed(
    model: nn.Module, batches: Tensor | Iterable[Tensor], reduce: Callable[[Any, Tensor], Any]
) -> Mapping[str, Any]:
    names = branch_names(model)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no Inception modules of gnetlab; give "
            "gnetlab.googlenet(...), before gnetlab.fuse (torchvision's weights fit "
            "gnetlab.googlenet('torchvision'))"
        )
    return streamed(model, names, batches, reduce)


def streamed(
    model: nn.Module,
    names: Iterable[str],
    batches: Tensor | Iterable[Tensor],
    reduce: Callable[[Any, Tensor], Any],
) -> dict[str, Any]:
    """`record(model, names, reduce=reduce)` over batches, in eval mode: name -> last state.

    A batch that does not fit into memory goes through in halves: `reduce` must treat images alike,
    and return a new state rather than change the one it is given.
    """
    names, states = list(names), {}

    def go_on(images: Tensor) -> None:
        with record(model, names, reduce=reduce, start=states) as found:
            model(images)
        states.update(found)  # not where memory ran out on the way

    with in_mode(model, training=False), torch.no_grad():
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            if len(batch):
                in_parts(lambda part, batch=batch: go_on(batch[part]), len(batch))
    if not states:
        raise ValueError("no images were given; give a batch, N x C x H x W, or several")
    return states


def _statistics(sums: Mapping[str, _Sums]) -> pd.DataFrame:
    frames = [_branch_frame(name, state) for name, state in sums.items()]
    frame = pd.concat(frames, ignore_index=True)
    modules = frame.groupby(frame.module.str.rpartition(".")[0], sort=False)
    return frame.assign(
        concat_index=modules.cumcount(),
        energy_share=frame.energy / modules.energy.transform(_sum),
        channel_share=1 / modules.channel.transform("size"),
    )[
        [
            "module", "stage", "branch", "channel", "concat_index", "mean", "variance",
            "zero_fraction", "energy", "energy_share", "channel_share",
        ]
    ]  # fmt: skip


def _sum(values: pd.Series) -> float:
    return values.sum(skipna=False)  # pandas' own sum of NaN is 0: a silent branch, not a sick one


def _branch_frame(name: str, sums: _Sums) -> pd.DataFrame:
    stage, branch = locate(name)
    mean, energy = (sums.total / sums.count).cpu(), (sums.squares / sums.count).cpu()
    return pd.DataFrame(
        {
            "module": name,
            "stage": stage,
            "branch": branch,
            "channel": np.arange(len(mean)),
            "mean": mean.numpy(),
            "variance": (energy - mean**2).clamp_min(0).numpy(),
            "zero_fraction": 1 - (sums.nonzero / sums.count).cpu().numpy(),
            "energy": energy.numpy(),
        }
    )


def branch_summary(model: nn.Module, batches: Tensor | Iterable[Tensor]) -> pd.DataFrame:
    """What each branch puts out over `batches` (each N x C x H x W), one row per branch.

    Columns: `module`, `stage`, `branch`, `channels` (count), `energy_share`, `channel_share`
    (both sum to 1 per stage; energy's is NA in a module that puts out NaN, or only zeros),
    `energy_ratio` (the first over the second: 1 is an equal share per channel), `zero_fraction`
    (mean over channels), `dead` (channels that are zero everywhere),
    `effective_rank` (how many channels of equal, uncorrelated strength would vary like these:
    the participation ratio tr(C)^2 / tr(C^2) of their covariance C over images and positions,
    corrected for the sample's size; NA where nothing varies, or the sample is too small to
    tell), `rank_share` (of the channels).

    Neighbouring positions see nearly the same: give several images, or the rank comes out low.
    """

    def both(state: tuple[_Sums, Moments] | None, maps: Tensor) -> tuple[_Sums, Moments]:
        sums, moments = state or (None, None)
        return _accumulate(sums, maps), add_moments(moments, maps)

    states = _streamed(model, batches, both)
    frame = _per_branch(_statistics({name: sums for name, (sums, _) in states.items()}))
    rank = [_effective_rank(moments) for _, moments in states.values()]
    frame = frame.assign(effective_rank=rank)
    return frame.assign(rank_share=frame.effective_rank / frame.channels)


def _effective_rank(moments: Moments) -> float:
    covariance = moments.covariance()
    # Below this the variance is what float32 products leave when the mean is taken off.
    least = 1e-6 * moments.products.trace().item() / moments.count
    if moments.count < 2 or covariance.trace().item() <= least:
        return float("nan")
    ratio = covariance.trace().item() ** 2 / covariance.square().sum().item()
    # Of N independent samples even full-rank noise shows a ratio below N.
    corrected = 1 / ratio - 1 / moments.count
    return 1 / corrected if corrected > 1e-9 else float("nan")


def random_control(model: GoogLeNet, images: Tensor, *, seed: int = 0) -> GoogLeNet:
    """The same architecture with Kaiming's random weights, on the device of `images`, in eval mode.

    Its batch norm, if any, is calibrated on `images` (N x C x H x W): what a statistic shows here,
    it owes to the architecture and not to training.
    """
    control = build(model.architecture, init="kaiming", seed=seed)
    control = control.to(images.device, next(model.parameters()).dtype)
    with torch.no_grad():
        calibrate_batch_norm(control, images)
    return control.eval()


def _per_branch(statistics: pd.DataFrame) -> pd.DataFrame:
    groups = statistics.groupby(["module", "stage", "branch"], sort=False)
    frame = groups.agg(
        channels=("channel", "size"),
        energy_share=("energy_share", _sum),
        channel_share=("channel_share", "sum"),
        zero_fraction=("zero_fraction", "mean"),
        dead=("energy", lambda energy: int((energy == 0).sum())),
    ).reset_index()
    return frame.assign(energy_ratio=frame.energy_share / frame.channel_share)


def liveliest_channels(
    model: nn.Module, image: Tensor, count: int = 12
) -> dict[str, dict[str, np.ndarray]]:
    """Of every branch the `count` feature maps that vary most over one image, strongest first.

    image 1 x C x H x W. Returns stage -> branch -> count x h x w float32. The first channels in
    memory order show chance; these show what a branch reacts to.
    """
    evaluating = in_mode(model, training=False)
    with evaluating, torch.no_grad(), record(model, branch_names(model)) as recorded:
        model(image)
    sheet: dict[str, dict[str, np.ndarray]] = {}
    for name, values in recorded.items():
        stage, branch = locate(name)
        maps = values[0].float()
        order = maps.std(dim=(1, 2), correction=0).argsort(descending=True)
        sheet.setdefault(stage, {})[branch] = maps[order[:count]].cpu().numpy()
    return sheet
