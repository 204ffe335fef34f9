"""BVLC GoogLeNet, the paper's own network as Caffe trained it, out of the ONNX model zoo's file.

`locate()`  the file of `weights="bvlc:PATH"`, or a path that ends in .onnx
`read()`    its initializers as a state dict with our names

The file is fetched by hand from `SOURCE`. It holds the network with biases, LRN and the true 5x5
branch, without auxiliary heads, and expects BGR images of 0..255 with a mean subtracted. Here
`conv1`'s kernels are put in RGB order and the network rescales its own input
(`transform_input="caffe"`), so it takes the same normalized RGB images as any other network.

Source: https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

SOURCE = (
    "https://github.com/onnx/models, "
    "validated/vision/classification/inception_and_googlenet/googlenet"
)
NOTE = "BVLC GoogLeNet weights (the paper's network, true 5x5)"
PREFIX = "bvlc"

_LAYERS = {
    "conv1/7x7_s2": "conv1",
    "conv2/3x3_reduce": "conv2_reduce",
    "conv2/3x3": "conv2",
    "1x1": "branch1x1",
    "3x3_reduce": "branch3x3.reduce",
    "3x3": "branch3x3.conv",
    "5x5_reduce": "branch5x5.reduce",
    "5x5": "branch5x5.conv",
    "pool_proj": "branch_pool.proj",
}
_NAME = re.compile(r"(?:inception_(?P<stage>\d[a-e])/)?(?P<layer>.+)_(?P<kind>[wb])_0")


def locate(weights: str | Path) -> Path | None:
    """The path in "bvlc:PATH" or of an .onnx file; None for other weights.

    Raises ValueError for "bvlc" without a path to an .onnx file, which says where it comes from.
    """
    name = str(weights)
    prefix, colon, path = name.partition(":")
    if prefix != PREFIX or (not colon and Path(name).exists()):
        return Path(name) if name.lower().endswith(".onnx") else None
    if not path.lower().endswith(".onnx"):
        raise ValueError(
            f"weights={name!r} asked; give the path of the network's ONNX file, as in "
            f"weights='bvlc:googlenet-12.onnx'. It comes from {SOURCE}"
        )
    return Path(path).expanduser()


def read(path: str | Path) -> dict[str, Tensor]:
    """Weights and biases of the file as float32, by our names; `conv1`'s input channels as RGB.

    Names that BVLC GoogLeNet does not have stay as they are, for `weights.fill` to list. Raises
    ImportError without the package onnx and ValueError for what is no ONNX file.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            f"{path} is an ONNX file, and the package onnx, which reads it, is not installed; "
            "pip install onnx"
        ) from error
    try:
        graph = onnx.load(path).graph
        # Whole numbers are shapes for Reshape, not weights.
        arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        state = {
            our_name(name): torch.from_numpy(array.astype("float32"))
            for name, array in arrays.items()
            if array.dtype.kind == "f"
        }
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf and onnx raise many kinds for a damaged file
        raise ValueError(
            f"{path} cannot be read: damaged, truncated or not an ONNX file "
            f"({type(error).__name__}: {str(error)[:120]}). Fetch it again from {SOURCE}"
        ) from error
    first = state.get("conv1.conv.weight")
    if first is not None and first.dim() == 4:
        state["conv1.conv.weight"] = first.flip(1)  # BGR -> RGB
    return state


def our_name(name: str) -> str:
    """An initializer's name in the file -> in a state dict of ours; foreign names pass through.

    >>> our_name("inception_3a/5x5_reduce_w_0")
    'inception3a.branch5x5.reduce.conv.weight'
    """
    found = _NAME.fullmatch(name)
    if not found:
        return name
    kind = {"w": "weight", "b": "bias"}[found["kind"]]
    if name.startswith("loss3/classifier_"):
        return f"fc.{kind}"
    layer = _LAYERS.get(found["layer"])
    if layer is None or ("branch" in layer) != bool(found["stage"]):
        return name
    stage = f"inception{found['stage']}." if found["stage"] else ""
    return f"{stage}{layer}.conv.{kind}"
