"""What a network costs, layer by layer, without computing a convolution.

`layer_costs()`   one row per layer that runs: shape, parameters, MACs, bytes, memory
`summed()`        the same per stage, branch, kind or model
`locate()`        stage and branch of a module's name

One multiply-add is one MAC; `macs` counts those of convolutions, linear layers and matrix
products, without biases. The paper's "ops" are MACs. `flops = 2 * macs`.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from gnetlab.measure.rules import Shape
from gnetlab.measure.shapes import Step, forward_pass

# Counts per image; all of them are exact integers.
COUNTS = (
    "parameters", "macs", "activations", "bias_additions", "elementwise", "comparisons",
    "input_bytes", "output_bytes", "weight_bytes", "live_bytes", "depth",
)  # fmt: skip
COLUMNS = (
    "module", "stage", "branch", "kind", "operation", "output_shape", *COUNTS, "intensity",
)  # fmt: skip
_PER_NETWORK = {"parameters", "weight_bytes", "depth"}  # not per image


def layer_costs(
    model: nn.Module,
    input_size: Shape = (3, 224, 224),
    *,
    training: bool = False,
    engine: str = "auto",
) -> pd.DataFrame:
    """One row per layer that runs, in order of execution, for one image of `input_size`.

    A layer is a leaf module, or a function that a container calls in its forward (a concatenation,
    a functional ReLU); functions that only look at memory differently have no row. Columns:

    module, stage, branch   dotted name; stem, 3a ... 5b, head, aux1, aux2 (for other networks
                   their blocks); the path through a concatenation: 1x1, 3x3, 5x5, pool in
                   GoogLeNet's modules, else the path's kernels ("3x3+3x3"); empty outside
    kind, operation   class name, or the function's; what PyTorch function it comes to
    output_shape   without the batch
    parameters     that take part, each counted at its first use (not where a function gets a
                   copy: torchvision's Swin V2 clones its biases of queries, keys and values)
    macs           NA marks a layer that calls what no rule knows: not counted, and not zero
    activations    output elements
    bias_additions, elementwise, comparisons   other arithmetic, see `rules.Work`
    input_bytes, output_bytes, weight_bytes   moved, were nothing cached; max pooling writes
                   positions too
    live_bytes     activations alive while the layer runs, its output included; the largest is the
                   pass's peak memory beyond the weights
    depth          layers with weights on the longest path that ends here
    intensity      FLOPs per byte moved, 2 * macs / bytes

    `training=True` counts what runs in training mode, auxiliary heads included, and adds
    `backward_macs` and `stored_bytes` (kept for the backward pass, each memory at the layer that
    first needs it; `live_bytes` then holds them too).

    Works on any module that takes one image batch. The model is not touched, and runs on shapes
    alone (`engine`, see `shapes.forward_pass`). Raises ValueError for a size that is a single
    number, and what the model itself raises for an image of this size.

    >>> import gnetlab as gl
    >>> costs = gl.layer_costs(gl.googlenet("torchvision"))
    >>> int(costs.macs.sum()), int(costs.parameters.sum())
    (1498376192, 6624904)
    >>> costs[costs.stage == "3a"].groupby("branch", sort=False).macs.sum().to_dict()
    {'1x1': 9633792, '3x3': 101154816, '5x5': 6021120, 'pool': 4816896, '': 0}
    >>> small = gl.layer_costs(gl.googlenet("cifar"), (3, 32, 32), training=True)
    >>> bool(small.backward_macs.sum() > small.macs.sum())
    True
    """
    if isinstance(input_size, int):
        raise ValueError(
            f"input_size={input_size} asked; give channels, height and width of an image, as in "
            "(3, 224, 224)"
        )
    steps, joins, images, itemsize = forward_pass(
        model, input_size, training=training, engine=engine
    )
    columns: dict[str, object] = {
        "module": [step.module for step in steps],
        "stage": _stages(model, [step.module for step in steps]),
        "branch": _branches(steps, joins),
        "kind": [step.kind for step in steps],
        "operation": [step.operation for step in steps],
        "output_shape": [step.output_shape for step in steps],
    }
    counts = (*COUNTS, "backward_macs", "stored_bytes") if training else COUNTS
    table = zip(*map(operator.attrgetter(*counts), steps), strict=True)
    for name, values in zip(counts, table, strict=False):
        per = 1 if name in _PER_NETWORK else images
        columns[name] = _integers(values, per, name in ("macs", "activations"))
    moved = columns["input_bytes"] + columns["output_bytes"] + columns["weight_bytes"]
    macs = columns["macs"].to_numpy(dtype=float, na_value=np.nan)
    columns["intensity"] = np.divide(2 * macs, moved, out=np.full(len(steps), np.nan),
                                     where=moved > 0)  # fmt: skip
    order = [*COLUMNS, *counts[len(COUNTS) :]]
    frame = pd.DataFrame({name: columns[name] for name in order})
    frame.attrs["itemsize"] = itemsize
    return frame


def _integers(values: Sequence[int | None], per: int, missing: bool):
    if not missing:
        return np.array(values, dtype=np.int64) // per
    known = np.array([v or 0 for v in values], dtype=np.int64) // per
    return pd.arrays.IntegerArray(known, np.array([v is None for v in values], dtype=bool))


def summed(costs: pd.DataFrame, by: str | Sequence[str] = ()) -> pd.DataFrame:
    """Costs added up over the layers that have the same `by` columns; without any, over all.

    Columns: `by`, then the counts of `layer_costs`; `bytes` (moved: input, output and weights);
    `outputs` (of convolutions and linear layers alone, what others call activations); `live_bytes`
    and `depth` are the largest; `intensity` is of the sums. `macs` leave out what is not counted.
    """
    by = [by] if isinstance(by, str) else list(by)
    moved = costs.input_bytes + costs.output_bytes + costs.weight_bytes
    outputs = costs.activations.where((costs.macs > 0).fillna(False), 0)
    costs = costs.assign(bytes=moved, outputs=outputs)
    largest = ["live_bytes", "depth"]
    added = [
        name for name in (*COUNTS, "backward_macs", "stored_bytes", "bytes", "outputs")
        if name in costs and name not in largest
    ]  # fmt: skip
    how = dict.fromkeys(added, "sum") | dict.fromkeys(largest, "max")
    keys = by or [np.zeros(len(costs), dtype=int)]
    table = costs.groupby(keys, sort=False).agg(how).reset_index(drop=not by)
    return table.assign(intensity=2 * table.macs.astype(float) / table.bytes)


_ROLES = ("1x1", "3x3", "5x5", "pool")  # the order of concatenation in GoogLeNet's modules


def _branches(steps: list[Step], joins: list[tuple[str, list[int]]]) -> list[str]:
    """The branch of each step, from the dataflow: what leads to one input of a concatenation only.

    A concatenation counts if each of its inputs had something done to it alone. Of nested ones the
    outermost decides.
    """
    branches = [""] * len(steps)
    for module, inputs in joins:
        paths = []
        for i, above in enumerate(inputs):
            others = 0
            for other in inputs[:i] + inputs[i + 1 :]:
                others |= other
            alone = above & ~others
            first = max(0, (alone & -alone).bit_length() - 1)
            bits = reversed(f"{alone >> first:b}")
            paths.append([j for j, bit in enumerate(bits, first) if bit == "1"])
        if not all(paths):
            continue
        inception = re.fullmatch(r"(.*\.)?inception\d([a-e](_\d+)?)?", module) and len(paths) == 4
        names = _ROLES if inception else _names([[steps[j] for j in path] for path in paths])
        for path, name in zip(paths, names, strict=True):
            for j in path:
                branches[j] = name
    return branches


def _names(paths: list[list[Step]]) -> list[str]:
    """A name for each path of a concatenation: pool, or its kernels; equal ones are numbered."""
    names: list[str] = []
    for path in paths:
        kernels = ["x".join(map(str, s.kernel)) for s in path if math.prod(s.kernel) > 1]
        pooled = any("pool" in step.operation for step in path)
        name = "pool" if pooled else "+".join(kernels) or "1x1"
        alike = sum(other.partition(" ")[0] == name for other in names)
        names.append(f"{name} ({alike + 1})" if alike else name)
    return names


_AFTER = {"pool3": "3b", "maxpool3": "3b", "pool4": "4e", "maxpool4": "4e"}
_STEM = re.compile(r"input_transform|conv[123](_reduce)?|(max)?pool[012]|lrn[12]|inception[12]")


@functools.lru_cache(maxsize=4096)
def _stage(top: str) -> str:
    found = re.fullmatch(r"inception(\d[a-e](?:_\d+)?)", top)
    if found:
        return found[1]
    if top in _AFTER:
        return _AFTER[top]
    if _STEM.fullmatch(top):
        return "stem"
    return "head" if top in ("avgpool", "flatten", "dropout", "fc", "classifier") else top


_BRANCHES = {
    "branch1x1": "1x1", "branch3x3": "3x3", "branch5x5": "5x5", "branch_pool": "pool",
    "branch1": "1x1", "branch2": "3x3", "branch3": "5x5", "branch4": "pool",
}  # fmt: skip


def locate(module: str) -> tuple[str, str]:
    """Stage and branch of a dotted name, ours or torchvision's; "stem", "" for the stem.

    pool3 and pool4 belong to the stage whose output they reduce, 3b and 4e. A module's stage is
    told inside another network too, such as nn.Sequential or nn.DataParallel. The name alone does
    not say whether the network is a GoogLeNet, which `layer_costs` looks at.

    >>> locate("inception4c.branch5x5.reduce.conv"), locate("conv2"), locate("aux1.fc1")
    (('4c', '5x5'), ('stem', ''), ('aux1', ''))
    >>> locate("module.inception4c_2.branch_pool")
    ('4c_2', 'pool')
    """
    inner = module.find(".inception")
    top, _, rest = module[inner + 1 :].partition(".")
    stage = _stage(top)
    return stage, _BRANCHES.get(rest.partition(".")[0], "") if top.startswith("inception") else ""


def _stages(model: nn.Module, names: list[str]) -> list[str]:
    """Stage of each name; a conv1 or a pool3 of a network without Inception modules is its own."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    blocks = _block_stages(model)
    googlenet = any(re.match(r"inception\d[a-e]", name) for name, _ in model.named_children())
    stages = []
    for name in names:
        stage, top = locate(name)[0], name.partition(".")[0]
        if not googlenet and (top in _AFTER or _STEM.fullmatch(top)) and ".inception" not in name:
            stage = top
        stages.append(blocks.get(name, stage))
    return stages


def _block_stages(model: nn.Module) -> dict[str, str]:
    """For networks that are one `features` sequence with pools (VGG, AlexNet): block1 ..."""
    features = getattr(model, "features", None)
    plain = isinstance(features, nn.Sequential) and not any(m._modules for m in features)
    if not plain or not any(isinstance(m, nn.MaxPool2d) for m in features):
        return {}
    stages, block = {}, 1
    for name, module in features.named_children():
        stages[f"features.{name}"] = f"block{block}"
        block += isinstance(module, nn.MaxPool2d)
    return stages
