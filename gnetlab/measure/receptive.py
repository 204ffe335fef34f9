"""How much of the image a unit can see, and how much of that it uses.

`receptive_fields()`            theoretical size per stage and branch, from kernels and strides
`effective_receptive_fields()`  the same by the gradient of a unit in the middle

Source of the second: Luo, Li, Urtasun and Zemel 2016, Understanding the effective receptive field,
arXiv 1701.04128.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import locate
from gnetlab.measure.devices import float64
from gnetlab.measure.hooks import in_mode, observe
from gnetlab.net.model import GoogLeNet, Inception, check_ours


def receptive_fields(model: GoogLeNet) -> pd.DataFrame:
    """Theoretical receptive field of every branch of every Inception module of `model`.

    Columns: `module` (dotted name of the branch), `stage`, `branch`, `size` (side of the square of
    input pixels that reaches one output value), `stride` (pixels between two neighbours), `start`
    (pixel where the first one's square begins; negative: in the padding). Padding and image borders
    cut it; nothing is run.

    Raises ValueError for a network that is not gnetlab's.

    >>> import gnetlab as gl
    >>> fields = gl.receptive_fields(gl.googlenet("paper"))
    >>> dict(zip(fields.branch[:4], fields["size"][:4]))  # of 3a, in pixels
    {'1x1': 27, '3x3': 43, '5x5': 59, 'pool': 43}
    """
    check_ours(model)
    seen, rows = _Field(1, 1, 0), []
    for name, step in model.named_children():
        if name == "avgpool":
            break
        if not isinstance(step, Inception):
            seen = _through(step, seen)
            continue
        fields = {branch: _through(path, seen) for branch, path in step.named_children()}
        for branch, field in fields.items():
            rows.append((f"{name}.{branch}", *locate(f"{name}.{branch}"), *field))
        seen = max(fields.values())  # the next module's input mixes all branches
    return pd.DataFrame(rows, columns=["module", "stage", "branch", "size", "stride", "start"])


class _Field(NamedTuple):
    size: int
    stride: int
    start: int


def _through(step: nn.Module, field: _Field) -> _Field:
    """What is seen behind a chain of convolutions and pools."""
    size, stride, start = field
    for layer in step.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            kernel, hop, padding = (
                v if isinstance(v, int) else v[0]
                for v in (layer.kernel_size, layer.stride, layer.padding)
            )
            size, start = size + (kernel - 1) * stride, start - padding * stride
            stride *= hop
    return _Field(size, stride, start)


def effective_receptive_fields(
    model: GoogLeNet, images: Tensor, *, share: float = 0.95
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """How widely the gradient of a branch's middle unit spreads over the image.

    images  N x C x H x W; the average over them, large enough to hold the fields
    share   of the squared gradient that the square of `size` holds

    Returns a frame, `module`, `stage`, `branch`, `theoretical`, `size` (side in pixels of the
    square around the field's middle), `ratio` (the second over the first), both NaN for a branch
    whose unit no pixel moves; and per branch the squared gradient over the image, H x W, which sums
    to 1 (zeros for such a branch). The model runs in eval mode.
    """
    fields = receptive_fields(model)
    images = images.detach().clone().requires_grad_(True)
    outputs: dict[str, Tensor] = {}
    energies: dict[str, np.ndarray] = {}
    sizes = []

    def keep(name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs[name] = output

    # The caller may be looking without gradients.
    with torch.enable_grad(), in_mode(model, training=False):
        with observe(model, list(fields.module), keep):
            model(images)
        for row in fields.itertuples():
            y, x = (side // 2 for side in outputs[row.module].shape[2:])
            unit = outputs[row.module][:, :, y, x].sum()
            (gradient,) = torch.autograd.grad(unit, images, retain_graph=True)
            energy = float64(gradient).square().sum((0, 1)).cpu().numpy()
            energies[row.module] = energy / max(energy.sum(), 1e-300)
            middle = [row.start + i * row.stride + (row.size - 1) / 2 for i in (y, x)]
            sizes.append(_side_holding(energies[row.module], middle, share))
    frame = fields[["module", "stage", "branch"]].assign(theoretical=fields["size"], size=sizes)
    return frame.assign(ratio=frame["size"] / frame.theoretical), energies


def _side_holding(energy: np.ndarray, middle: list[float], share: float) -> float:
    """Side of the square around `middle` that holds `share` of the energy, in pixels; NaN of 0."""
    if not energy.any():
        return float("nan")
    rows, columns = (np.abs(np.arange(n) - m) for n, m in zip(energy.shape, middle, strict=True))
    distance = np.maximum(rows[:, None], columns[None, :]).ravel()
    order = np.argsort(distance)
    within = np.cumsum(energy.ravel()[order])
    reached = np.searchsorted(within, share * within[-1])
    return float(2 * distance[order][min(reached, len(order) - 1)] + 1)
