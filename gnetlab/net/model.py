"""GoogLeNet, with every observable step a module of its own.

`googlenet()`    builds a network from a preset, with weights or an initialization
`GoogLeNet`      the network; logits in eval, `GoogLeNetOutput` in training with heads
`Inception`      branch1x1, branch3x3, branch5x5, branch_pool, concatenated in this order
`AuxiliaryHead`  pool, 1x1 convolution, two linear layers
`ConvUnit`       convolution, batch norm if asked, ReLU
`initialize()`   draws the weights anew, by the name of an initialization
`branch_names()` dotted names of all branches, for `gnetlab.record`

Nothing is in place, no function replaces a module, and no module runs twice: hooks and Captum see
everything. Source: arXiv 1409.4842, sections 4 and 5.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.net import data
from gnetlab.net import weights as loading
from gnetlab.net.architecture import HEAD_AFTER, Architecture, Widths, architecture

BRANCHES = ("branch1x1", "branch3x3", "branch5x5", "branch_pool")
# transform_input: what the weights were trained on, mean and deviation of R, G, B in [0, 1]
INPUTS = {
    True: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Inception's, as torchvision has it
    "caffe": ((123 / 255, 117 / 255, 104 / 255), (1 / 255, 1 / 255, 1 / 255)),  # 0..255
}


class GoogLeNetOutput(NamedTuple):
    """Logits (N x classes) of the main classifier and of the heads; an absent head is None."""

    logits: Tensor
    aux1: Tensor | None
    aux2: Tensor | None


class ConvUnit(nn.Sequential):
    """Convolution (`conv`), batch norm (`bn`) where the architecture has it, ReLU (`relu`)."""

    def __init__(
        self, arch: Architecture, inputs: int, outputs: int, kernel: int, stride: int = 1
    ) -> None:
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        steps["conv"] = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, bias=arch.conv_bias
        )
        steps.update(_norm_and_relu(arch, outputs))
        super().__init__(steps)


class SeparableUnit(nn.Sequential):
    """The 7x7/2 stem that fits Table 1: depthwise with multiplier 8, then 1x1, then as ConvUnit."""

    def __init__(self, arch: Architecture, inputs: int, outputs: int) -> None:
        between = 8 * inputs
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        steps["depthwise"] = nn.Conv2d(inputs, between, 7, 2, 3, groups=inputs, bias=False)
        steps["pointwise"] = nn.Conv2d(between, outputs, 1, bias=arch.conv_bias)
        steps.update(_norm_and_relu(arch, outputs))
        super().__init__(steps)


def _norm_and_relu(arch: Architecture, channels: int) -> Iterator[tuple[str, nn.Module]]:
    if arch.norm == "batch":
        yield "bn", nn.BatchNorm2d(channels, eps=arch.batch_norm_eps)
    yield "relu", nn.ReLU()


class Inception(nn.Module):
    """Four parallel branches, concatenated along channels (Figure 2 of the paper).

    N x inputs x H x W -> N x out_channels x H x W. `branch_slices` says where in the concatenated
    output each branch lies: concat index = slice start + branch index.
    """

    def __init__(self, arch: Architecture, inputs: int, widths: Widths) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(arch, inputs, widths.conv1x1, 1)
        self.branch3x3 = _reduced(arch, inputs, widths.reduce3x3, widths.conv3x3, [3])
        kernels = {"5x5": [5], "3x3": [3], "3x3+3x3": [3, 3]}[arch.branch5x5]
        self.branch5x5 = _reduced(arch, inputs, widths.reduce5x5, widths.conv5x5, kernels)
        pool = OrderedDict[str, nn.Module](pool=nn.MaxPool2d(3, 1, 1, ceil_mode=True))
        if arch.reduce:
            pool["proj"] = ConvUnit(arch, inputs, widths.pool_proj, 1)
        self.branch_pool = nn.Sequential(pool)

        counts = [widths.conv1x1, widths.conv3x3, widths.conv5x5]
        counts.append(widths.pool_proj if arch.reduce else inputs)
        self.out_channels = sum(counts)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        self.branch_slices = {
            name: slice(start, start + count)
            for name, start, count in zip(BRANCHES, starts, counts, strict=True)
        }

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.branch1x1, self.branch3x3, self.branch5x5, self.branch_pool)
        return torch.cat([branch(x) for branch in branches], dim=1)


def _reduced(
    arch: Architecture, inputs: int, reduced: int, outputs: int, kernels: list[int]
) -> nn.Sequential:
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    if arch.reduce:
        steps["reduce"] = ConvUnit(arch, inputs, reduced, 1)
        inputs = reduced
    for i, kernel in enumerate(kernels):
        steps["conv" if i == 0 else f"conv{i + 1}"] = ConvUnit(arch, inputs, outputs, kernel)
        inputs = outputs
    return nn.Sequential(steps)


class HeadPool(nn.Module):
    """Average pool to 4 x 4: the paper's 5x5/3 where that gives 4 x 4, else adaptive.

    At 224 x 224 a head sees 14 x 14, where 5x5/3 fits; other image sizes need the adaptive form
    for the linear layer behind it to fit.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "5x5/3" and all(5 + 3 * 3 <= side < 5 + 3 * 4 for side in x.shape[2:]):
            return F.avg_pool2d(x, 5, 3)
        return F.adaptive_avg_pool2d(x, 4)


class AuxiliaryHead(nn.Module):
    """Auxiliary classifier (section 5): N x inputs x H x W -> N x classes."""

    def __init__(self, arch: Architecture, inputs: int) -> None:
        super().__init__()
        channels, hidden = arch.channels(128), arch.channels(1024)
        self.pool = HeadPool(arch.head_pool)
        self.conv = ConvUnit(arch, inputs, channels, 1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels * 4 * 4, hidden)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(arch.head_dropout)
        self.fc2 = nn.Linear(hidden, arch.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x))  # N x 128 x 4 x 4
        x = self.relu(self.fc1(self.flatten(x)))  # N x 1024
        return self.fc2(self.dropout(x))


class InputTransform(nn.Module):
    """From ImageNet's mean and deviation to those that the weights were trained with.

    kind   True: Inception's (x - 0.5) / 0.5, as torchvision does; "caffe": 0..255 with the mean
           (123, 117, 104) of R, G, B subtracted, not scaled
    """

    def __init__(self, kind: bool | str = True) -> None:
        super().__init__()
        if kind not in INPUTS:
            raise ValueError(f"transform_input={kind!r} asked; choose False, True or 'caffe'")
        colours = list(zip(data.MEAN, data.DEVIATION, *INPUTS[kind], strict=True))
        scale = torch.tensor([deviation / theirs for _, deviation, _, theirs in colours])
        shift = torch.tensor([(mean - other) / theirs for mean, _, other, theirs in colours])
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class LocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm, which on a CPU takes half precision too: in float32, for want of it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) and not _casts(x):
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class GoogLeNet(nn.Module):
    """The network of an `Architecture`: N x in_channels x H x W -> N x num_classes.

    `weights_note` says in words which weights it carries; figures print it.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.architecture = arch
        self.weights_note = "random weights"
        self.classes: tuple[str, ...] | None = None  # their names, where the weights tell
        if arch.transform_input:
            self.input_transform = InputTransform(arch.transform_input)
        channels = self._build_stem(arch)
        inputs_of_head: dict[str, int] = {}
        for stage in arch.stages:
            if stage in ("4a", "5a"):
                size = 3 if stage == "4a" else arch.pool4_size
                name = "pool3" if stage == "4a" else "pool4"
                self.add_module(name, nn.MaxPool2d(size, 2, ceil_mode=True))
            module = Inception(arch, channels, arch.module_widths(stage))
            self.add_module(f"inception{stage}", module)
            channels = module.out_channels
            inputs_of_head |= {h: channels for h in arch.heads if HEAD_AFTER[h] == stage}
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # the paper's 7x7 average pool, at any image size
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(arch.dropout)
        self.fc = nn.Linear(channels, arch.num_classes)
        # Heads come last, so that the trunk draws the same random weights with and without them.
        for head in sorted(arch.heads):
            self.add_module(head, AuxiliaryHead(arch, inputs_of_head[head]))

    def _build_stem(self, arch: Architecture) -> int:
        first, second = arch.channels(64), arch.channels(192)
        if arch.stem == "cifar":
            self.conv1 = ConvUnit(arch, arch.in_channels, second, 3)
            return second
        if arch.stem == "inception":
            self.inception1 = Inception(arch, arch.in_channels, arch.module_widths("inception1"))
            self.pool0 = nn.MaxPool2d(3, 2, ceil_mode=True)
            first = self.inception1.out_channels
        elif arch.stem == "separable":
            self.conv1 = SeparableUnit(arch, arch.in_channels, first)
        elif arch.stem == "compact":
            self.conv1 = ConvUnit(arch, arch.in_channels, first, 3)
        else:
            self.conv1 = ConvUnit(arch, arch.in_channels, first, 7, 2)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        if arch.norm == "lrn":
            self.lrn1 = LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        if arch.stem == "inception":
            self.inception2 = Inception(arch, first, arch.module_widths("inception2"))
            second = self.inception2.out_channels
        else:
            self.conv2_reduce = ConvUnit(arch, first, first, 1)
            self.conv2 = ConvUnit(arch, first, second, 3)
        if arch.norm == "lrn":
            self.lrn2 = LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        return second

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutput:
        # Shapes are the paper preset's at 224 x 224.
        self._check_input(x)
        aux: dict[str, Tensor | None] = dict.fromkeys(HEAD_AFTER)
        for name, step in self.named_children():
            if name in HEAD_AFTER or name == "avgpool":
                break
            # conv1 112 x 112, conv2 56 x 56, inception3 28 x 28, inception4 14 x 14
            x = step(x)
            if self.training:
                for head in self.architecture.heads:
                    if name == f"inception{HEAD_AFTER[head]}":
                        aux[head] = getattr(self, head)(x)
        x = self.flatten(self.avgpool(x))  # N x 1024 x 7 x 7 -> N x 1024
        logits = self.fc(self.dropout(x))
        return (
            GoogLeNetOutput(logits, **aux) if self.training and self.architecture.heads else logits
        )

    def _check_input(self, x: Tensor) -> None:
        arch, smallest = self.architecture, self.architecture.smallest_input
        if not hasattr(x, "dim"):
            raise ValueError(
                f"a {type(x).__name__} was given; this network takes one tensor, "
                f"N x {arch.in_channels} x H x W (arrays: torch.from_numpy; images without labels)"
            )
        if x.dim() != 4 or x.shape[1] != arch.in_channels:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} was given; this network takes "
                f"N x {arch.in_channels} x H x W (one image: image[None]; grey images: "
                "in_channels=1)"
            )
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels was given; the smallest that "
                f"the {arch.stem!r} stem and its pools can reduce is {smallest} x {smallest} "
                "(for small images use stem='compact' or preset 'cifar')"
            )
        if not isinstance(x, Tensor):  # what stands in for one where costs are counted
            return
        weight = next(self.parameters(), None)
        if weight is None:  # a replica of nn.DataParallel, which has tensors in their place
            return
        if x.dtype != weight.dtype and not _casts(x):
            raise ValueError(
                f"images of {x.dtype} were given; this network takes {weight.dtype}: "
                f"images.to({weight.dtype}), or for pixels of 0..255 gnetlab.net.data.normalize"
            )
        if x.device != weight.device:
            raise ValueError(
                f"images on {x.device} were given, but the network is on {weight.device}; move one "
                f"of them: images.to({str(weight.device)!r})"
            )


def _casts(x: Tensor) -> bool:
    """Whether autocast makes images of this type fit."""
    kind = x.device.type
    known = x.is_floating_point() and torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def googlenet(
    preset: str | Architecture = "paper",
    *,
    weights: str | Path | None = None,
    aux: bool | str | Iterable[str] | None = None,
    num_classes: int | None = None,
    width: float | None = None,
    init: str | tuple[str, float] | None = None,
    seed: int | None = None,
    **changes: Any,
) -> GoogLeNet:
    """GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842) from a preset, in training mode.

    preset       "paper", "torchvision", "cifar", "naive" (see `PRESETS`), or an `Architecture`
    weights      None, "imagenet" (torchvision's; implies the torchvision preset), "bundled" (comes
                 with gnetlab: paper preset, batch norm, no heads, the 16 classes of PhotoCrops),
                 "random" (seeded, with batch norm calibrated on photographs: fit to look at),
                 "auto" (the first where it can be had, else the second; random ones for a network
                 that neither fits), "bvlc:PATH" or PATH of BVLC GoogLeNet's .onnx file (the paper's
                 own network; images are normalized as for any other), or the path of a checkpoint
                 (.pth, .pt, .safetensors; our keys or torchvision's), from which classes, norm,
                 width and kernels are taken; what a plain state dict does not tell (no
                 normalization or LRN, pool4_size, transform_input, batch_norm_eps) has to be given
                 where it is not the preset's: `weights_note` says what was assumed
    aux          auxiliary heads: True, False, "aux1", "aux2"; None means the preset's own
    num_classes  None means the preset's own
    width        multiplies the channel counts, which stay at least 4; None means the preset's own
    init         None (PyTorch's), "torchvision", "gaussian", "caffe", "xavier", "kaiming", or
                 ("gain", g): see `initialize`
    seed         makes the initial weights reproducible without touching the global random state
    changes      fields of `Architecture`, for example norm="batch", stem="compact", reduce=False

    Returns a network that takes N x in_channels x H x W float images and gives logits, N x classes;
    in training mode with heads a named tuple `logits`, `aux1`, `aux2`. `weights_note` says which
    weights it carries.

    Raises ValueError for unknown names (with the nearest) and for weights that do not fit,
    FileNotFoundError for a path that is not there, RuntimeError for "imagenet" without a network.

    >>> import torch, gnetlab as gl
    >>> model = gl.googlenet(stem="compact", norm="batch", width=0.125, num_classes=10, seed=0)
    >>> images = torch.rand(2, 3, 32, 32)
    >>> model(images).aux1.shape, model.eval()(images).shape  # training, eval
    (torch.Size([2, 10]), torch.Size([2, 10]))
    >>> gl.googlenet(weights="bundled").weights_note
    'bundled weights (trained on crops of 16 photographs, not on ImageNet)'
    """
    if aux is not None:
        heads = {True: tuple(HEAD_AFTER), False: ()}.get(aux) if isinstance(aux, bool) else aux
        changes["heads"] = (heads,) if isinstance(heads, str) else tuple(heads)
    if num_classes is not None:
        changes["num_classes"] = num_classes
    if width is not None:
        changes["width"] = width
    if weights is not None:
        if init is not None:
            raise ValueError(f"weights={weights!r} and init={init!r} asked; give one of them")
        return _pretrained(preset, weights, changes, seed or 0)
    return build(architecture(preset, **changes), init=init, seed=seed)


def _pretrained(
    preset: str | Architecture, weights: str | Path, changes: dict[str, Any], seed: int
) -> GoogLeNet:
    found = loading.random_start(seed) if weights == "random" else loading.find(weights)
    fitting = preset in ("paper", found.preset)
    if weights == "auto":  # a changed network, or one with heads, fits neither, and need not
        changed = {name for name, value in changes.items() if (name, value) != ("width", 1.0)}
        fitting = fitting and changed <= {"heads", "dropout", "head_dropout"}
        fitting = fitting and not changes.get("heads")
    if found.preset and not fitting:
        if weights != "auto":
            raise ValueError(
                f"weights={weights!r} belong to preset {found.preset!r}, but {preset!r} was asked; "
                "leave the preset out"
            )
        found = loading.random_start(seed)
    if found.path is None:  # seeded random weights, made fit to look at
        model = build(architecture(preset, **(found.changes | changes)), init="kaiming", seed=seed)
        if model.architecture.norm != "batch":
            found = found._replace(note=f"random weights (seed {seed})")
        side = max(64, model.architecture.smallest_input)
        images = loading.calibration_images(side, model.architecture.in_channels)
        loading.calibrate_batch_norm(model, images)
    else:
        checkpoint = loading.read_checkpoint(found.path)
        base = architecture(found.preset or preset)
        saved = checkpoint.architecture and preset == "paper"
        if saved:
            base = loading.saved_architecture(checkpoint.architecture, found.path)
            # A network that was given a new last layer has more or fewer than it was built with.
            classes = loading.implied(checkpoint.state).get("num_classes", base.num_classes)
            base = base.change(num_classes=classes)
        elif preset == "paper" and found.preset is None:
            fields = loading.implied(checkpoint.state)
            if fields.get("norm") == "batch" and fields.get("branch5x5") == "3x3":
                base = architecture("torchvision")
            base = base.change(**fields)
            unseen = loading.assumed(base.change(**changes), changes)
            found = found._replace(
                note=f"{found.note} (assumed: {unseen})" if unseen else found.note
            )
        if "heads" not in changes and not saved:
            stored = tuple(h for h in base.heads if f"{h}.fc1.weight" in checkpoint.state)
            base = base.change(heads=stored)
        _check_classes(checkpoint.state, weights, changes)
        model = build(base.change(**(found.changes | changes)))
        loading.fill(model, checkpoint.state, found.path)
    model.weights_note, model.classes = found.note, found.classes
    return model


def _check_classes(state: dict[str, Tensor], weights: str | Path, changes: dict[str, Any]) -> None:
    """What most who ask for weights and a number of classes want is to fine-tune."""
    count, asked = len(state.get("fc.weight", ())), changes.get("num_classes")
    if count and asked not in (None, count):
        raise ValueError(
            f"weights={str(weights)!r} tell {count} classes apart, but num_classes={asked!r} was "
            "asked; leave it out, and to fine-tune give the network a new last layer: "
            f"model.fc = torch.nn.Linear(model.fc.in_features, {asked})"
        )


def build(
    arch: Architecture,
    *,
    init: str | tuple[str, float] | None = None,
    seed: int | None = None,
) -> GoogLeNet:
    """A randomly initialized network of this architecture; seeded if `seed` is given."""
    with torch.random.fork_rng(devices=[]) if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = GoogLeNet(arch)
        if init is not None:
            # Heads come last and must not shift what the trunk draws: start over.
            torch.set_rng_state(before)
            initialize(model, init)
    return model


INITS = ("torchvision", "gaussian", "caffe", "xavier", "kaiming")


def initialize(model: GoogLeNet, init: str | tuple[str, float] | None) -> None:
    """Draw the weights of convolutions and linear layers anew, and set their biases.

    `init` None leaves PyTorch's own. The others are normal with zero mean, and their biases zero:
    "torchvision": std 0.01, truncated at -2 and 2, which truncates nothing. "gaussian": std 0.01,
    as in AlexNet, over the root of the network's `width`, so that a narrow one has the same gain.
    "xavier", "kaiming": std sqrt(2 / (fan_in + fan_out)), sqrt(2 / fan_in). ("gain", g): std
    g * sqrt(2 / fan_in), so that ("gain", 1.0) is "kaiming".
    "caffe" is what BVLC trained GoogLeNet from: Caffe's "xavier", uniform within
    +-sqrt(3 / fan_in), with biases of 0.2 (0 in the classifiers).

    Raises ValueError for an unknown `init`, and for "gaussian" on a network that is not gnetlab's,
    whose width it needs.
    """
    if init is None:
        return
    kind, gain = init if isinstance(init, tuple) and len(init) == 2 else (init, 1.0)
    if (kind == "gain") != isinstance(init, tuple) or kind not in (*INITS, "gain"):
        raise ValueError(
            f"init={init!r} asked; choose {', '.join(map(repr, INITS))} or ('gain', g)"
        )
    if kind == "gaussian" and not hasattr(model, "architecture"):
        raise ValueError(
            f"init='gaussian' asked for a {type(model).__name__}, whose width is not known; give a "
            "network of gnetlab.googlenet, or choose 'torchvision', 'kaiming' or ('gain', g)"
        )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        fan_in = module.weight[0].numel()
        if kind == "torchvision":
            nn.init.trunc_normal_(module.weight, std=0.01, a=-2, b=2)
        elif kind == "gaussian":
            nn.init.normal_(module.weight, std=0.01 / model.architecture.width**0.5)
        elif kind == "caffe":
            nn.init.uniform_(module.weight, -((3 / fan_in) ** 0.5), (3 / fan_in) ** 0.5)
        elif kind == "xavier":
            nn.init.xavier_normal_(module.weight)
        else:
            nn.init.normal_(module.weight, std=gain * (2 / fan_in) ** 0.5)
        if module.bias is not None:
            classifier = name in ("fc", "aux1.fc2", "aux2.fc2")
            nn.init.constant_(module.bias, 0.2 if kind == "caffe" and not classifier else 0.0)


def check_ours(model: nn.Module) -> None:
    """Raise ValueError for anything but a network of `googlenet()`."""
    if not isinstance(model, GoogLeNet):
        raise ValueError(
            f"{type(model).__name__} is not gnetlab's GoogLeNet; give gnetlab.googlenet(...), "
            "before gnetlab.fuse (torchvision's weights fit gnetlab.googlenet('torchvision'))"
        )


def branch_names(model: nn.Module) -> list[str]:
    """Dotted names of every branch of every Inception module of `model`, in forward order.

    What `record` and `branch_attribution` take. Other networks, torchvision's and fused ones too,
    have none: an empty list.

    >>> import gnetlab as gl
    >>> names = gl.branch_names(gl.googlenet("cifar", width=0.125))
    >>> len(names), names[:4]  # doctest: +NORMALIZE_WHITESPACE
    (36, ['inception3a.branch1x1', 'inception3a.branch3x3', 'inception3a.branch5x5',
          'inception3a.branch_pool'])
    """
    return [
        f"{name}.{branch}"
        for name, module in model.named_modules()
        if isinstance(module, Inception)
        for branch in BRANCHES
    ]
