"""What becomes of the cost when the architecture or the image changes; from numbers alone.

`closed_form()`       multiply-adds and parameters per stage and branch, from an `Architecture`
`adjusted_costs()`    the same, with one module's reductions set: what the sliders show
`width_costs()`       at several widths, with the exponent of growth
`resolution_costs()`  at several image sizes, beside VGG-16
`implementations()`   the known implementations of GoogLeNet, how they differ, what each costs
`early_inception()`   the network, and the same with Inception modules from the first layer on
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from gnetlab.measure.costs import layer_costs
from gnetlab.measure.latency import measure_latency
from gnetlab.net.architecture import MODULES, Architecture, Widths, architecture
from gnetlab.net.model import build


class _Layer(NamedTuple):
    """A convolution or linear layer: `fan_in` weights for each of its outputs."""

    stage: str
    branch: str
    fan_in: int
    channels: int
    positions: int
    bias: bool = True
    norm: bool = False


def _pooled(side: int, kernel: int = 3) -> int:
    """A side in pixels after a pool of stride 2 that rounds up."""
    return -(-(side - kernel) // 2) + 1


def _stem(arch: Architecture, side: int) -> Iterator[_Layer | tuple[int, int]]:
    """The stem's convolutions; the last item is (side, channels) of what it puts out."""
    first, second, inputs = arch.channels(64), arch.channels(192), arch.in_channels
    unit = {"bias": arch.conv_bias, "norm": arch.norm == "batch"}
    if arch.stem == "cifar":
        yield _Layer("stem", "", 9 * inputs, second, side**2, **unit)
        yield side, second
        return
    if arch.stem == "inception":
        first = yield from _module(
            arch, "inception1", inputs, side, arch.module_widths("inception1")
        )
        side = _pooled(_pooled(side))
        widths = arch.module_widths("inception2")
        second = yield from _module(arch, "inception2", first, side, widths)
        yield _pooled(side), second
        return
    if arch.stem == "compact":
        yield _Layer("stem", "", 9 * inputs, first, side**2, **unit)
    else:
        side = (side - 1) // 2 + 1
        if arch.stem == "separable":
            yield _Layer("stem", "", 49, 8 * inputs, side**2, bias=False)
            yield _Layer("stem", "", 8 * inputs, first, side**2, **unit)
        else:
            yield _Layer("stem", "", 49 * inputs, first, side**2, **unit)
    side = _pooled(side)
    yield _Layer("stem", "", first, first, side**2, **unit)
    yield _Layer("stem", "", 9 * first, second, side**2, **unit)
    yield _pooled(side), second


def _module(
    arch: Architecture, stage: str, inputs: int, side: int, widths: Widths
) -> Iterator[_Layer]:
    """An Inception module's convolutions; returns its output channels."""
    unit = {"bias": arch.conv_bias, "norm": arch.norm == "batch"}
    stage = "stem" if stage.startswith("inception") else stage
    yield _Layer(stage, "1x1", inputs, widths.conv1x1, side**2, **unit)
    kernels = {"5x5": [25], "3x3": [9], "3x3+3x3": [9, 9]}[arch.branch5x5]
    for branch, reduced, outputs, windows in (
        ("3x3", widths.reduce3x3, widths.conv3x3, [9]),
        ("5x5", widths.reduce5x5, widths.conv5x5, kernels),
    ):
        channels = inputs
        if arch.reduce:
            yield _Layer(stage, branch, inputs, reduced, side**2, **unit)
            channels = reduced
        for window in windows:
            yield _Layer(stage, branch, window * channels, outputs, side**2, **unit)
            channels = outputs
    if arch.reduce:
        yield _Layer(stage, "pool", inputs, widths.pool_proj, side**2, **unit)
    last = widths.pool_proj if arch.reduce else inputs
    return widths.conv1x1 + widths.conv3x3 + widths.conv5x5 + last


def _layers(arch: Architecture, side: int, modules: Mapping[str, Widths]) -> Iterator[_Layer]:
    for item in _stem(arch, side):
        if isinstance(item, _Layer):
            yield item
        else:
            side, channels = item
    for stage in arch.stages:
        if stage in ("4a", "5a"):
            side = _pooled(side, 3 if stage == "4a" else arch.pool4_size)
        widths = modules.get(stage) or arch.module_widths(stage)
        channels = yield from _module(arch, stage, channels, side, widths)
    yield _Layer("head", "", channels, arch.num_classes, 1)


def closed_form(
    arch: Architecture | str = "paper",
    side: int = 224,
    *,
    modules: Mapping[str, Widths] | None = None,
) -> pd.DataFrame:
    """What the network of an `Architecture` costs, from its numbers; no network is made.

    arch      an architecture or a preset's name; auxiliary heads are left out
    side      of the square image, pixels
    modules   other widths for some Inception modules: stage -> `Widths` (not multiplied by `width`)

    Columns: `stage`, `branch`, `macs`, `parameters` (counts). Takes about 0.3 ms.

    >>> int(closed_form("cifar", 32).parameters.sum())
    6166250
    """
    arch = architecture(arch)
    if side < arch.smallest_input:
        raise ValueError(
            f"side = {side} asked; the {arch.stem!r} stem and its pools need at least "
            f"{arch.smallest_input}"
        )
    sums: dict[tuple[str, str], list[int]] = {}
    for layer in _layers(arch, side, modules or {}):
        total = sums.setdefault((layer.stage, layer.branch), [0, 0])
        weights = layer.fan_in * layer.channels
        total[0] += weights * layer.positions
        total[1] += weights + layer.channels * (layer.bias + 2 * layer.norm)
    rows = [(*place, *counts) for place, counts in sums.items()]
    return pd.DataFrame(rows, columns=["stage", "branch", "macs", "parameters"])


def adjusted_costs(
    side: int, width: float, stage: str, reduce3x3: int, reduce5x5: int
) -> pd.DataFrame:
    """The paper's network at a size and width, with one module's reductions set (channels).

    Columns as `closed_form`.
    """
    arch = architecture("paper", heads=(), width=width)
    widths = arch.module_widths(stage)._replace(reduce3x3=reduce3x3, reduce5x5=reduce5x5)
    return closed_form(arch, side, modules={stage: widths})


def width_costs(
    widths: Iterable[float], arch: Architecture | str = "paper", side: int = 224
) -> pd.DataFrame:
    """Costs at several widths, one row each, and how they grow.

    Columns: `width`, `macs`, `module_macs` (of the nine modules alone), `parameters` (counts), and
    `exponent`, `module_exponent`: the slope of log macs over log width since the row before (NaN
    in the first). A chain of convolutions has 2; what hangs on the image or the classes, 1.
    """
    arch = architecture(arch)
    rows = []
    for width in widths:
        costs = closed_form(arch.change(width=width), side)
        of_modules = costs[costs.stage.str.partition("_")[0].isin(list(MODULES))]
        rows.append((width, costs.macs.sum(), of_modules.macs.sum(), costs.parameters.sum()))
    frame = pd.DataFrame(rows, columns=["width", "macs", "module_macs", "parameters"])
    growth = np.log(frame[["width", "macs", "module_macs"]]).diff()
    return frame.assign(
        exponent=growth.macs / growth.width, module_exponent=growth.module_macs / growth.width
    )


def resolution_costs(sides: Iterable[int]) -> pd.DataFrame:
    """GoogLeNet with three stems, and VGG-16, at several image sizes (pixels).

    Columns: `network`, `side`, `macs` (count). VGG-16 is counted twice: with its own classifier
    (which pools to 7 x 7 whatever comes), and as commonly used for 32 x 32, with one linear layer
    behind the convolutions. Sizes that a network cannot take have no row.
    """
    from torchvision.models import vgg16

    with torch.device("meta"):
        vgg = vgg16()
    googlenets = {
        f"GoogLeNet, {stem} stem": architecture("paper", stem=stem, heads=())
        for stem in ("paper", "compact", "cifar")
    }
    rows = []
    for side in sides:
        for name, arch in googlenets.items():
            if side >= arch.smallest_input:
                rows.append((name, side, int(closed_form(arch, side).macs.sum())))
        if side >= 32:
            shape = (3, side, side)
            convolutions = int(layer_costs(vgg.features, shape).macs.sum())
            rows.append(("VGG-16", side, int(layer_costs(vgg, shape).macs.sum())))
            rows.append(("VGG-16, one linear layer", side, convolutions + 512 * 10))
    return pd.DataFrame(rows, columns=["network", "side", "macs"])


_INCEPTION5H = {
    "4a": MODULES["4a"]._replace(conv3x3=204),
    "5a": MODULES["5a"]._replace(reduce5x5=48),
}
# name, preset, changes, module widths, side, in what it differs. Sources: reference
# implementations' own code; see the notebook.
_IMPLEMENTATIONS = (
    ("Table 1 as printed, BVLC's Caffe model", "paper", {}, {}, 224, "the reference here"),
    (
        "the paper's operations, separable stem", "paper", {"stem": "separable"}, {}, 224,
        "7x7 depthwise x8 and 1x1, as TF-slim's inception_v2; fits conv1's row of Table 1",
    ),
    (
        "Inception5h (DeepDream, Distill)", "paper", {"num_classes": 1008}, _INCEPTION5H, 224,
        "4a's 3x3 has 204 channels, 5a's 5x5 reduction 48; 1008 logits",
    ),
    (
        "torchvision", "torchvision", {}, {}, 224,
        "3x3 for 5x5, batch norm (eps 1e-3), 2x2 pool4, adaptive head pool, main dropout 0.2",
    ),
    ("kuangliu, weiaicunzai", "cifar", {}, {}, 32, "32 px, two 3x3 for 5x5, 3x3 stem, no heads"),
    ("huyvnphan", "cifar", {"branch5x5": "3x3"}, {}, 32, "32 px, one 3x3 for 5x5"),
    ("Figure 2(a), naive", "naive", {}, {}, 224, "no 1x1 reductions, the pool passes everything"),
)  # fmt: skip


def implementations() -> pd.DataFrame:
    """The known implementations, as far as their shape differs, from this package's presets.

    Columns: `implementation`, `branch5x5`, `norm`, `stem`, `side` (pixels), `parameters`, `macs`
    (counts, heads left out), `differs`. Only what decides the shape is modelled; huyvnphan's stem
    and batch norm are taken to be kuangliu's.
    """
    rows = []
    for name, preset, changes, modules, side, differs in _IMPLEMENTATIONS:
        arch = architecture(preset, heads=(), **changes)
        costs = closed_form(arch, side, modules=modules)
        rows.append(
            {
                "implementation": name,
                "branch5x5": arch.branch5x5,
                "norm": arch.norm or "none",
                "stem": arch.stem,
                "side": side,
                "parameters": int(costs.parameters.sum()),
                "macs": int(costs.macs.sum()),
                "differs": differs,
            }
        )
    return pd.DataFrame(rows)


def early_inception(
    side: int = 224,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    min_run_time: float = 2.0,
) -> pd.DataFrame:
    """The paper's network, and the same with Inception modules in place of conv1 and conv2.

    Columns: `stem` ("plain", "inception"), `macs`, `training_macs` (forward and backward, heads
    included), `parameters` (heads included), `stored_bytes` (activations kept for the backward
    pass), `stem_bytes` (those of the stem alone), for one image; `step_seconds`, the time of a
    training step on `device` (seconds per batch), and `batch_size`, how many images that is (fewer
    than asked if they do not fit into memory); both NA without a device.
    """
    rows, models = [], {}
    for name, stem in (("plain", "paper"), ("inception", "inception")):
        with torch.device("meta" if device is None else "cpu"):
            model = models[name] = build(architecture("paper", stem=stem))
        costs = layer_costs(model, (3, side, side), training=True)
        deployed = layer_costs(model, (3, side, side))
        rows.append(
            {
                "stem": name,
                "macs": int(deployed.macs.sum()),
                "training_macs": int(costs.macs.sum() + costs.backward_macs.sum()),
                "parameters": int(costs.parameters.sum()),
                "stored_bytes": int(costs.stored_bytes.sum()),
                "stem_bytes": int(costs.stored_bytes[costs.stage == "stem"].sum()),
            }
        )
    frame = pd.DataFrame(rows)
    if device is None:
        return frame.assign(step_seconds=np.nan, batch_size=pd.array([pd.NA] * 2, "Int64"))
    steps = measure_latency(
        models, input_size=(3, side, side), device=device, step="training",
        batch_sizes=(batch_size,), min_run_time=min_run_time, rounds=3,
    )  # fmt: skip
    return frame.assign(step_seconds=steps.seconds, batch_size=steps.batch_size.astype("Int64"))
