"""The networks that costs are checked on, and what is known of them from elsewhere."""

import functools
import warnings

import pytest
import torch

import gnetlab as gl
from gnetlab.measure.costs import layer_costs

OURS = {
    "paper": lambda: gl.googlenet("paper"),
    "separable": lambda: gl.googlenet("paper", stem="separable"),
    "torchvision": lambda: gl.googlenet("torchvision"),
    "cifar": lambda: gl.googlenet("cifar"),
    "naive": lambda: gl.googlenet("naive"),
}
THEIRS = [
    "googlenet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
    "alexnet", "resnet18", "resnet50", "inception_v3", "mobilenet_v2", "squeezenet1_1",
]  # fmt: skip
SIDES = {"cifar": 32, "inception_v3": 299}  # pixels; the others 224
# Known exactly, from the literature of the reference and torchvision's own metadata.
MACS = {
    "paper": 1_582_671_872,
    "separable": 1_498_677_248,
    "torchvision": 1_498_376_192,
    "googlenet": 1_498_376_192,
    "cifar": 1_521_756_160,
    "vgg11": 7_609_090_048,
    "vgg13": 11_308_466_176,
    "vgg16": 15_470_264_320,
    "vgg19": 19_632_062_464,
    "alexnet": 714_188_480,
    "resnet18": 1_814_073_344,
    "resnet50": 4_089_184_256,
    "inception_v3": 5_713_216_096,
    "mobilenet_v2": 300_774_272,
}
PARAMETERS = {
    "paper": 6_998_552,
    "separable": 6_983_576 + 8_280,  # weights and biases
    "torchvision": 6_624_904,
    "googlenet": 6_624_904,
    "cifar": 6_166_250,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "alexnet": 61_100_840,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
}
NETWORKS = pytest.mark.parametrize("name", [*OURS, *THEIRS])


def build(name):
    """A network on the meta device, in eval mode."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces a new initialization
        if name in OURS:
            return OURS[name]().eval()
        import torchvision.models

        slow = name in ("googlenet", "inception_v3")
        options = {"init_weights": False} if slow else {}
        return getattr(torchvision.models, name)(**options).eval()


@functools.cache
def costs_of(name):
    side = SIDES.get(name, 224)
    return layer_costs(build(name), (3, side, side))
