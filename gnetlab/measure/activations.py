"""What the branches put out, measured over any number of images in constant memory.

`branch_statistics()`  per channel: mean, variance, zero fraction, energy, share of the module's
`per_branch()`         the same summed up per branch
`liveliest_channels()`  of every branch the maps that vary most over one image
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import locate
from gnetlab.measure.hooks import in_mode, record
from gnetlab.net.model import branch_names


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
        maps.sum((2, 3), dtype=wide).double().sum(0),
        norms[0].double().square().sum(0),
        norms[1].double().sum(0),
    )
    return new if sums is None else _Sums(*(a + b for a, b in zip(sums, new, strict=True)))


def branch_statistics(model: nn.Module, batches: Tensor | Iterable[Tensor]) -> pd.DataFrame:
    """Statistics of every channel of every branch over `batches` (each N x C x H x W).

    Columns: `module` (dotted name of the branch), `stage`, `branch`, `channel` (index within the
    branch), `concat_index` (index in the module's output), `mean`, `variance` (population),
    `zero_fraction` (share of exact zeros), `energy` (mean square), `energy_share` (of its
    module's energy; sums to 1 per stage), `channel_share` (1 / channels of the module), one row
    per channel, over all images and positions.

    The model runs in eval mode and without gradients; its mode is restored. Memory does not grow
    with the number of batches.
    """
    names = branch_names(model)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no Inception modules of gnetlab; load torchvision's "
            "weights into gnetlab.googlenet('torchvision') instead"
        )
    evaluating = in_mode(model, training=False)
    with evaluating, torch.no_grad(), record(model, names, reduce=_accumulate) as sums:
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            model(batch)
    frames = [_branch_frame(name, sums[name]) for name in names]
    frame = pd.concat(frames, ignore_index=True)
    stages = frame.groupby("stage", sort=False)
    return frame.assign(
        concat_index=stages.cumcount(),
        energy_share=frame.energy / stages.energy.transform("sum"),
        channel_share=1 / stages.channel.transform("size"),
    )[
        [
            "module", "stage", "branch", "channel", "concat_index", "mean", "variance",
            "zero_fraction", "energy", "energy_share", "channel_share",
        ]
    ]  # fmt: skip


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


def per_branch(statistics: pd.DataFrame) -> pd.DataFrame:
    """`branch_statistics` summed up per branch.

    Columns: `module`, `stage`, `branch`, `channels` (count), `energy_share`, `channel_share`
    (both sum to 1 per stage), `energy_ratio` (the first over the second: 1 is an equal share per
    channel), `zero_fraction` (mean over channels), `dead` (channels that are zero everywhere).
    """
    groups = statistics.groupby(["module", "stage", "branch"], sort=False)
    frame = groups.agg(
        channels=("channel", "size"),
        energy_share=("energy_share", "sum"),
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
