"""The same network for inference: batch norm folded, parallel 1x1 convolutions merged.

`fuse()`            a faster copy of a GoogLeNet, ours or torchvision's, with equal outputs
`FusedGoogLeNet`    what it returns: the stages one after another, under the paper's names
`FusedInception`    an Inception module whose three 1x1 convolutions of one input are one
`Parallel`          an Inception module with nothing merged: branches, concatenated
`FastResponseNorm`  the paper's local response normalization in a third of the time

What makes it fast on a CPU, in this order: channels-last memory (where PyTorch vectorizes max
pooling), no batch norm, ReLU in place. Merging reads the input once and starts 18 convolutions
fewer, which is for GPUs: on one CPU core the split's copies cost as much as it saves.
`benchmarks/fuse.py` measures each. Equal outputs need no retraining: eval-mode batch norm is
affine (Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.1).
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from gnetlab.net.model import BRANCHES, GoogLeNet, InputTransform, LocalResponseNorm

TORCHVISION = "torchvision.models.googlenet.GoogLeNet"
STAGES = {  # torchvision's names: ours
    "maxpool1": "pool1", "conv2": "conv2_reduce", "conv3": "conv2", "maxpool2": "pool2",
    "maxpool3": "pool3", "maxpool4": "pool4",
}  # fmt: skip
KEPT = ("input_transform", "pool0", "pool1", "pool2", "pool3", "pool4", "avgpool", "flatten", "fc")
UNITS = ("ConvUnit", "SeparableUnit", "BasicConv2d")  # the last is torchvision's
PARTS = {
    "depthwise": nn.Conv2d, "pointwise": nn.Conv2d, "conv": nn.Conv2d, "bn": nn.BatchNorm2d,
    "relu": nn.ReLU,
}  # fmt: skip


class FusedGoogLeNet(nn.Sequential):
    """A GoogLeNet's stages in order: N x channels x H x W -> N x classes."""


class FusedInception(nn.Module):
    """An Inception module with one 1x1 convolution, `reduce`, for the three that read its input.

    N x inputs x H x W -> N x outputs x H x W. `widths` splits the output of `reduce` into what
    is branch1x1, and what branch3x3 and branch5x5 go on with.
    """

    def __init__(self, reduce: nn.Module, widths: list[int], *branches: nn.Module) -> None:
        super().__init__()
        self.reduce, self.widths = reduce, widths
        self.branch3x3, self.branch5x5, self.branch_pool = branches

    def forward(self, x: Tensor) -> Tensor:
        ones, threes, fives = self.reduce(x).split(self.widths, dim=1)
        branches = [ones, self.branch3x3(threes), self.branch5x5(fives), self.branch_pool(x)]
        return torch.cat(branches, dim=1)


class Parallel(nn.Sequential):
    """Branches of one input, concatenated: N x inputs x H x W -> N x outputs x H x W."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


class FastResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm by adding shifted channels, where PyTorch's pools a volume."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        padded = F.pad(x * x, (0, 0, 0, 0, self.size // 2, (self.size - 1) // 2))
        total = padded[:, :count].clone()
        for shift in range(1, self.size):
            total += padded[:, shift : shift + count]
        return x * total.mul_(self.alpha / self.size).add_(self.k).pow_(-self.beta)


def fuse(model: nn.Module, *, merge: bool = True, channels_last: bool = True) -> FusedGoogLeNet:
    """The same network for inference, faster: N x channels x H x W -> N x classes.

    A copy in eval mode, of the model's dtype and on its device; the model itself stays as it is.
    Batch norm becomes part of the convolutions, the 1x1 convolutions of one input become one,
    ReLU works in place (so a hook that keeps a convolution's output must clone it); heads,
    dropout and hooks are left out. Weights need no gradient; MACs are those of the model.

    model          a GoogLeNet of gnetlab or torchvision
    merge          False leaves the 1x1 convolutions apart
    channels_last  False leaves the weights contiguous; inputs are welcome in any memory format

    Raises ValueError for anything but a GoogLeNet of gnetlab or torchvision, and for one whose
    parts were replaced by others.

    >>> import torch, gnetlab as gl
    >>> model = gl.googlenet("torchvision", width=0.25, seed=0).eval()
    >>> fused = gl.fuse(model)
    >>> fused.inception3a.reduce.conv  # 16 + 24 + 4 channels
    Conv2d(48, 44, kernel_size=(1, 1), stride=(1, 1))
    >>> images = torch.rand(2, 3, 64, 64)
    >>> torch.allclose(fused(images), model(images), atol=1e-4)
    True
    """
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if type(model) is not GoogLeNet and kind != TORCHVISION:
        raise ValueError(
            f"fuse() was given a {kind}; it knows gnetlab's GoogLeNet and {TORCHVISION} (give the "
            "network itself: not wrapped, compiled, fused or subclassed)"
        )
    names = STAGES if kind == TORCHVISION else {}
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    if getattr(model, "transform_input", False):  # torchvision's; ours is one of the children
        steps["input_transform"] = InputTransform().to(next(model.parameters()))
    for name, step in model.named_children():
        if name not in ("aux1", "aux2", "dropout"):
            steps[names.get(name, name)] = _stage(names.get(name, name), step, merge)
        if name == "avgpool":
            steps["flatten"] = nn.Flatten()
    # A convolution with channels-last weights returns channels-last maps, whatever it is given.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return FusedGoogLeNet(steps).eval().requires_grad_(False).to(memory_format=layout)


def _stage(name: str, step: nn.Module, merge: bool) -> nn.Module:
    if name.startswith("inception"):
        return _inception(name, step, merge)
    if name.startswith("conv"):
        return _unit(name, step)
    if type(step) in (nn.LocalResponseNorm, LocalResponseNorm):
        return FastResponseNorm(step.size, step.alpha, step.beta, step.k)
    if name not in KEPT:
        raise _unknown(name, step)
    return _without_hooks(step)


def _inception(name: str, module: nn.Module, merge: bool) -> nn.Module:
    first, *rest = module.children() if type(module).__name__ == "Inception" else [module]
    if [type(branch) for branch in rest] != [nn.Sequential] * 3:
        raise _unknown(name, module)
    three, five, pool = rest
    reduced = len(three) > 1  # else Figure 2(a): every branch reads the input itself
    merge = merge and reduced
    names = ["reduce", "conv", "conv2"][merge or not reduced :]
    branches = [
        _chain(f"{name}.branch3x3", names, three[merge:]),
        _chain(f"{name}.branch5x5", names, five[merge:]),
        _chain(f"{name}.branch_pool", ["pool", "proj"], pool),
    ]
    if not merge:
        branches = [_unit(f"{name}.branch1x1", first), *branches]
        return Parallel(OrderedDict(zip(BRANCHES, branches, strict=True)))
    units = [first, three[0], five[0]]
    widths = [unit.conv.out_channels for unit in units]
    return FusedInception(_unit(f"{name}.reduce", *units), widths, *branches)


def _chain(name: str, names: list[str], steps: nn.Sequential) -> nn.Sequential:
    if len(steps) > len(names):
        raise _unknown(name, steps)
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for part, step in zip(names, steps, strict=False):
        is_pool = isinstance(step, nn.MaxPool2d)
        chain[part] = _without_hooks(step) if is_pool else _unit(f"{name}.{part}", step)
    return nn.Sequential(chain)


def _unit(name: str, *units: nn.Module) -> nn.Sequential:
    """One convolution and ReLU for the convolution units that read the same input."""
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    weights, biases = [], []
    for unit in units:
        parts, norm = dict(unit.named_children()), getattr(unit, "bn", None)
        known = all(type(part) is PARTS.get(kind) for kind, part in parts.items())
        if type(unit).__name__ not in UNITS or not known or (norm and norm.running_mean is None):
            raise _unknown(name, unit)
        if len(units) > 1 and not _mixes_channels_only(unit.conv):
            raise _unknown(name, unit)
        if "depthwise" in parts:
            steps["depthwise"] = _without_hooks(parts["depthwise"])
        conv = parts.get("pointwise", parts.get("conv"))
        weight, bias = _folded(conv, norm)
        weights.append(weight)
        biases.append(bias)
    conv = _without_hooks(conv)
    conv.weight, conv.bias = nn.Parameter(torch.cat(weights)), nn.Parameter(torch.cat(biases))
    conv.out_channels = len(conv.bias)
    return nn.Sequential(steps | {"conv": conv, "relu": nn.ReLU(inplace=True)})


def _mixes_channels_only(conv: nn.Conv2d) -> bool:
    """Whether this convolution can be put beside others that read the same input."""
    found = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return found == ((1, 1), (1, 1), (0, 0), 1)


def _unknown(name: str, found: nn.Module) -> ValueError:
    return ValueError(
        f"{name} holds {found}, which fuse() does not know; it knows the parts that gnetlab and "
        "torchvision build a GoogLeNet of, batch norm with running statistics: fuse the network "
        "before changing its parts"
    )


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias with batch norm in them; in double, for half-precision networks too."""
    # MPS has no float64.
    place = {"dtype": torch.float64, "device": "cpu" if conv.weight.is_mps else None}
    weight = conv.weight.to(**place)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.to(**place)
    if norm is not None:
        parts = norm.running_mean, norm.running_var, norm.weight, norm.bias
        mean, variance, scale, shift = (None if t is None else t.to(**place) for t in parts)
        weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    return weight.to(conv.weight), bias.to(conv.weight)


def _without_hooks(module: nn.Module) -> nn.Module:
    new = copy.deepcopy(module)
    for part in new.modules():
        vars(part).update({k: v for k, v in vars(nn.Module()).items() if "_hooks" in k})
    return new
